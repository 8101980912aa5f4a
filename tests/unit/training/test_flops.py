"""Operations of a step: by hand for a small model, whatever trains of it, and nothing for padding."""

import pytest
import torch

from llavakit.model.llava import LlavaCore
from llavakit.model.surgery import freeze
from llavakit.training.data import Sample
from llavakit.training.flops import CoreFlops, peak_flops
from llavakit.training.packing import pack
from tests.tiny import IMAGE_TOKEN, NUM_IMAGE_TOKENS, SIDE, llava
from tests.toy_run import NO_TILES

TEXT = Sample((5,) * 10, (False,) * 6 + (True,) * 4, NO_TILES, ())


def picture_sample(core: LlavaCore) -> Sample:
    ids = (IMAGE_TOKEN,) * NUM_IMAGE_TOKENS + (7,) * 8
    return Sample(ids, (False,) * NUM_IMAGE_TOKENS + (True,) * 8, torch.zeros(1, 3, SIDE, SIDE), (core.config.image_grid,))


def parts(core: LlavaCore) -> tuple[int, int, int, int]:
    """Multiplications per token in the layers, per row of the head, per patch in tower and projector."""
    text, vision = core.config.text_config, core.config.vision_config
    kv = text.num_kv_heads * text.head_width
    layers = text.num_hidden_layers * (2 * text.hidden_size**2 + 2 * text.hidden_size * kv + 3 * text.hidden_size * text.intermediate_size)
    tower = vision.num_hidden_layers * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    tower += 3 * vision.patch_size**2 * vision.hidden_size
    projector = vision.hidden_size * text.hidden_size + text.hidden_size**2
    return layers, text.vocab_size * text.hidden_size, tower, projector


@pytest.mark.parametrize(
    ("trainable", "factors"),
    [
        (("*",), (6, 6, 6, 6)),
        (("language_model.*", "multi_modal_projector.*"), (6, 6, 2, 6)),
        (("multi_modal_projector.*",), (4, 4, 2, 6)),
        (("language_model.lm_head.*",), (2, 6, 2, 2)),
    ],
)
def test_operations_by_hand(trainable: tuple[str, ...], factors: tuple[int, int, int, int]) -> None:
    core = llava()
    freeze(core, trainable)
    text, vision = core.config.text_config, core.config.vision_config
    layers, head, tower, projector = parts(core)
    lengths, num_rows, num_patches = (10, NUM_IMAGE_TOKENS + 8), 4 + 8, NUM_IMAGE_TOKENS + 1
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    attention = 2 * text.num_hidden_layers * text.hidden_size * pairs
    expected = factors[0] * (layers * sum(lengths) + attention) + factors[1] * head * num_rows
    expected += factors[2] * (tower * num_patches + 2 * vision.num_hidden_layers * vision.hidden_size * num_patches**2)
    expected += factors[3] * projector * num_patches
    assert CoreFlops(core).batch(pack([TEXT, picture_sample(core)])) == pytest.approx(expected)


def test_a_filler_counts_nothing() -> None:
    count = CoreFlops(llava())
    assert count.batch(pack([TEXT], multiple_of=64)) == count.batch(pack([TEXT]))


def test_the_peak_of_a_cpu_is_what_a_product_reaches() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
