"""The packed core's own rules: placeholders equal features, the dtype rule, where gradients go."""

import pytest
import torch

from llavakit.errors import InputError
from llavakit.model.llava import IMAGE_PLACEHOLDER, LlavaCore, PackedBatch
from llavakit.model.surgery import freeze
from llavakit.ops.attention import Packed
from llavakit.ops.loss import IGNORE
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, VOCAB, llava

PIXELS = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def batch(num_text: int = 6) -> PackedBatch:
    """One sequence: a picture, then text of which all but the first token is supervised."""
    ids = torch.tensor([1, *[IMAGE_TOKEN] * NUM_IMAGE_TOKENS, *range(10, 10 + num_text)])
    labels = torch.full_like(ids, IGNORE)
    labels[-num_text:-1] = ids[-num_text + 1 :]
    return PackedBatch(ids, labels, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), PIXELS)


@pytest.mark.parametrize("num_features", [0, NUM_IMAGE_TOKENS - 1, 2 * NUM_IMAGE_TOKENS])
def test_placeholders_must_equal_features(num_features: int) -> None:
    core = llava()
    features = torch.zeros(num_features, 64) if num_features else None
    with pytest.raises(InputError, match=f"{NUM_IMAGE_TOKENS} image positions but the pictures give {num_features} features"):
        core.embed(batch().ids_T, features)


def test_features_without_placeholders_are_refused() -> None:
    with pytest.raises(InputError, match="0 image positions"):
        llava().embed(torch.tensor([1, 2]), torch.zeros(NUM_IMAGE_TOKENS, 64))


def test_features_land_in_order_and_both_placeholders_mean_the_same() -> None:
    core, ids = llava(), torch.tensor([5, IMAGE_TOKEN, 6, IMAGE_PLACEHOLDER])
    features = torch.stack((torch.full((64,), 3.0), torch.full((64,), 4.0)))
    x_TD = core.embed(ids, features)
    assert torch.equal(x_TD[[1, 3]], features)
    assert torch.equal(x_TD[[0, 2]], core.language_model.embed(torch.tensor([5, 6])))


@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE + 1), (1, 1, SIDE, SIDE), (3, SIDE, SIDE)])
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="pixels must be"):
        llava().encode_images(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="pixels must be normalised floats, got"):
        llava().encode_images(torch.zeros(1, 3, SIDE, SIDE, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    pixels = PIXELS.to(dtype, copy=True)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(InputError, match="pixels hold NaN or infinite"):
        llava().encode_images(pixels)


@pytest.mark.parametrize("ids", [[1, VOCAB], [1, -1], [IMAGE_TOKEN, 2**40], [IMAGE_TOKEN, -100]])
def test_ids_outside_the_vocabulary_are_refused_before_the_look_up(ids: list[int]) -> None:
    features = torch.zeros(ids.count(IMAGE_TOKEN), 64) if IMAGE_TOKEN in ids else None
    with pytest.raises(InputError, match=rf"ids must lie in 0\.\.{VOCAB - 1}, got"):
        llava().embed(torch.tensor(ids), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_ids_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="ids must be integers, got"):
        llava().embed(torch.ones(3, dtype=dtype))


def test_only_the_tower_layers_that_are_needed_run() -> None:
    core = llava()
    last = core.vision_tower.vision_model.encoder.layers[-1]
    with torch.no_grad():
        for weight in (*last.parameters(), *core.vision_tower.vision_model.post_layernorm.parameters()):
            weight.fill_(torch.nan)
    assert core.encode_images(PIXELS).isfinite().all()


def test_activations_follow_dtype_and_gradients_the_weights() -> None:
    core = llava()
    terms = core.loss_packed(batch(), dtype=torch.bfloat16)
    terms.sum.backward()
    assert terms.sum.dtype == torch.float32
    gradient = core.language_model.lm_head.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    x_TD = core.embed(torch.tensor([1, 2, 3]), dtype=torch.bfloat16)
    h_TD = core.forward_packed(x_TD, torch.arange(3), Packed(torch.tensor([0, 3])))
    assert h_TD.dtype == core.logits(h_TD).dtype == torch.bfloat16


def test_bfloat16_activations_are_near_float32_ones() -> None:
    core = llava()
    with torch.no_grad():
        exact, rough = (float(core.loss_packed(batch(), dtype=dtype).sum) for dtype in (torch.float32, torch.bfloat16))
    assert rough == pytest.approx(exact, rel=0.03)
    assert rough != exact


def test_a_frozen_tower_keeps_no_graph_and_a_trained_one_gets_gradients() -> None:
    core = llava()
    freeze(core, ("multi_modal_projector.*",))
    core.loss_packed(batch()).sum.backward()
    assert core.multi_modal_projector.get_parameter("linear_1.weight").grad is not None
    assert tower_gradients(core) == 0
    freeze(core, ("vision_tower.*",))
    core.loss_packed(batch()).sum.backward()
    used = [name for name, _ in core.vision_tower.named_parameters() if "layers.2." not in name and "post_layernorm" not in name]
    assert tower_gradients(core) == len(used)


def tower_gradients(core: LlavaCore) -> int:
    return sum(weight.grad is not None for weight in core.vision_tower.parameters())


def test_taps_receive_every_hidden_state() -> None:
    core, taps = llava(), list[torch.Tensor]()
    x_TD = core.embed(torch.tensor([1, 2, 3]))
    h_TD = core.forward_packed(x_TD, torch.arange(3), Packed(torch.tensor([0, 3])), taps)
    assert len(taps) == 3
    assert taps[0] is x_TD
    assert taps[-1] is h_TD
