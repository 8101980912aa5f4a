"""Preference pairs: built by the serving processor, packed behind one prompt, scored as if each answer were a sequence of its own."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor

from llavakit.errors import DataError
from llavakit.geometry import ImageGrid
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.pretrained.causal_lm import LlamaForCausalLM
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.training.data import batch_digest
from llavakit.training.preference import Answered, PreferenceSample, encode_pair, pack_pairs, preference_sample
from llavakit.training.preference_config import CorruptionConfig
from llavakit.types import Conversation, ImagePart, Message, TextPart
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene
from tests.preferences import Pairs, plain_logprobs
from tests.tiny import NUM_IMAGE_TOKENS, VARIANTS, decoder_config, llama, llava, scale_weights, tiny_processor, tiny_tokenizer
from tests.toy_run import NO_TILES

PICTURE = to_png(render(draw_scene(random.Random(0)), 40, 30))
ASKED = Conversation((Message("user", (ImagePart(PICTURE), TextPart("What is it?"))),))
TALK = Conversation((*ASKED.messages, Message("assistant", (TextPart("A dot."),)), Message("user", (TextPart("Which colour?"),))))


def pair(chosen: list[int], rejected: list[int], num_prompt: int) -> PreferenceSample:
    preferred, other = (Answered(tuple(ids), tuple(place >= num_prompt for place in range(len(ids)))) for ids in (chosen, rejected))
    return PreferenceSample(preferred, other, NO_TILES, ())


def scored_plainly(core: LlamaCore | LlavaCore, samples: list[PreferenceSample]) -> Tensor:
    sums = []
    for sample in samples:
        views = [(sample.chosen, sample.tiles_N3SS), (sample.rejected, sample.tiles_N3SS)]
        if sample.spoilt_N3SS is not None:
            views.append((sample.chosen, sample.spoilt_N3SS))
        sums += [plain_logprobs(core, answered, tiles, sample.grids) for answered, tiles in views]
    return torch.stack(sums)


def test_pairs_lie_end_to_end_behind_what_they_share() -> None:
    batch = pack_pairs([pair([1, 3, 4, 5, 6], [1, 3, 4, 7], 2), pair([1, 8, 2], [1, 9, 8, 2], 1)], multiple_of=6)
    assert batch.ids_T.tolist() == [1, 3, 4, 5, 6, 7, 1, 8, 2, 9, 8, 2]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 9, 12]
    assert batch.stems_B.tolist() == [-1, 0, 0, -1, 3, 3]
    # The shared answer token 4 counts for both answers; both first own tokens are predicted by it.
    assert batch.rows_M.tolist() == [1, 2, 3, 1, 2, 6, 7, 6, 9, 10]
    assert batch.labels_M.tolist() == [4, 5, 6, 4, 7, 8, 2, 9, 8, 2]
    assert batch.lengths_A.tolist() == [3, 2, 2, 3]
    assert batch.pairs_P3.tolist() == [[0, 1, -1], [2, 3, -1]]
    assert batch.pixels_N3SS is None
    assert batch.reference_A is None


def test_an_answer_that_goes_on_where_the_other_ends_needs_no_branch() -> None:
    batch = pack_pairs([pair([1, 3, 4], [1, 3, 4, 5], 2)], multiple_of=8)
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.rows_M.tolist() == [1, 1, 2]
    assert batch.lengths_A.tolist() == [1, 2]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_packed_pairs_score_as_separate_sequences(variant: object) -> None:
    core = llava(variant)  # type: ignore[arg-type]
    samples = [Pairs(spoilt=True).sample(index) for index in range(5)]
    weights_A = torch.arange(1.0, 1 + sum(sample.num_answers for sample in samples)).sin()
    found_A, expected_A = core.logprobs_packed(pack_pairs(samples, multiple_of=64)), scored_plainly(core, samples)
    # Measured: 1e-7 relative for sums of about -100; sums in another order.
    torch.testing.assert_close(found_A, expected_A, rtol=1e-5, atol=1e-5)
    # What is added to all keys changes no attention: its gradient is zero but for rounding.
    weights = [weight for name, weight in core.named_parameters() if not name.endswith("k_proj.bias")]
    found, expected = (torch.autograd.grad(sums_A @ weights_A, weights, allow_unused=True) for sums_A in (found_A, expected_A))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_windows_reach_across_the_border_of_a_branch() -> None:
    core = scale_weights(LlamaForCausalLM(decoder_config("mistral-window")))
    samples = [Pairs(pictures=False).sample(index) for index in range(6)]
    assert max(len(sample.rejected.ids) for sample in samples) > 9  # the window
    torch.testing.assert_close(core.logprobs_packed(pack_pairs(samples)), scored_plainly(core, samples), rtol=1e-5, atol=1e-5)


def test_the_order_of_packing_changes_nothing() -> None:
    core, samples = llama(), [Pairs(pictures=False).sample(index) for index in range(4)]
    forward, backward = (core.logprobs_packed(pack_pairs(order)).view(-1, 2) for order in (samples, samples[::-1]))
    torch.testing.assert_close(backward.flip(0), forward, rtol=1e-6, atol=1e-5)


def test_a_picture_is_encoded_once_for_its_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    core, samples = llava(), [Pairs().sample(index) for index in (0, 2)]
    seen: list[int] = []
    encode = core.encode_images

    def count(tiles: Tensor, grids: tuple[ImageGrid, ...], *, dtype: torch.dtype | None) -> Tensor:
        seen.append(tiles.shape[0])
        return encode(tiles, grids, dtype=dtype)

    monkeypatch.setattr(core, "encode_images", count)
    core.logprobs_packed(pack_pairs(samples))
    assert seen == [2]
    num_shared = sum(sample.num_shared for sample in samples)
    assert pack_pairs(samples).ids_T.numel() == sum(len(s.chosen.ids) + len(s.rejected.ids) for s in samples) - num_shared
    assert num_shared > 2 * NUM_IMAGE_TOKENS


def test_half_precision_scores_in_float32() -> None:
    core, batch = llava(), pack_pairs([Pairs().sample(index) for index in range(3)])
    sums_A = core.logprobs_packed(batch, dtype=torch.bfloat16)
    assert sums_A.dtype == torch.float32
    torch.testing.assert_close(sums_A, core.logprobs_packed(batch), rtol=0.05, atol=1.0)
    sums_A.sum().backward()
    names = ("multi_modal_projector.linear_1.weight", "language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight")
    for grad in (core.get_parameter(name).grad for name in names):
        assert grad is not None
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        assert grad.any()


def test_packing_is_pure_and_digests_tell_batches_apart() -> None:
    samples = [Pairs(spoilt=True).sample(index) for index in range(3)]
    digests = [batch_digest(pack_pairs(given)) for given in (samples, [Pairs(spoilt=True).sample(i) for i in range(3)], samples[::-1])]
    known = [replace(sample, reference=(0.0,) * sample.num_answers) for sample in samples]
    assert digests[0] == digests[1]
    assert len({*digests, batch_digest(pack_pairs(known))}) == 3


def test_the_processor_that_serves_builds_the_pair() -> None:
    processor = tiny_processor()
    sample = preference_sample(processor, ASKED, "A red dot.", "A blue square.")
    asked = processor.prompt(ASKED)
    for answered, text in ((sample.chosen, "A red dot."), (sample.rejected, "A blue square.")):
        whole = processor.prompt(Conversation((*ASKED.messages, Message("assistant", (TextPart(text),)))), add_generation_prompt=False)
        assert answered == Answered(whole.ids, whole.loss_mask)
    assert sample.num_shared >= len(asked.ids)
    assert sample.chosen.ids[: len(asked.ids)] == asked.ids
    assert torch.equal(sample.tiles_N3SS, asked.tiles_N3SS)
    assert sample.spoilt_N3SS is None


def test_earlier_answers_of_a_talk_carry_no_loss() -> None:
    processor = tiny_processor()
    sample = preference_sample(processor, TALK, "Red.", "Blue.")
    assert sample.chosen.loss_mask.index(True) == len(processor.prompt(TALK).ids)


@pytest.mark.parametrize("template", ["v1", "v0", "llava_llama_2", "mistral_instruct", "plain", "llama_2"])
def test_pairs_share_the_prompt_in_every_template(template: str) -> None:
    processor = tiny_processor(template)
    pair = encode_pair(processor, ASKED, "red dot", "red square", [processor.tile_grid])
    sample = PreferenceSample(*pair, NO_TILES, (processor.tile_grid,))
    learned = [index for index, counts in zip(sample.rejected.ids, sample.rejected.loss_mask, strict=True) if counts]
    text = tiny_tokenizer().decode(learned)
    assert "square" in text
    assert "What" not in text


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("A dot.", "A dot.", "are the same"),
        ("", "A dot.", "chosen answer is empty"),
        ("A dot.", " \n", "rejected answer is empty"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(chosen: str, rejected: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preference_sample(tiny_processor(), ASKED, chosen, rejected)


def test_ids_that_are_no_pair_are_refused() -> None:
    with pytest.raises(DataError, match="follow different prompts"):
        pair([1, 3, 4, 5], [1, 9, 4, 6], 3)
    with pytest.raises(DataError, match="follow different prompts"):
        pair([3, 4], [5, 4], 0)
    with pytest.raises(DataError, match="rejected answer is empty"):
        pair([1, 3, 4, 5], [1, 3], 2)
    with pytest.raises(DataError, match="needs as many reference values, got 1"):
        replace(pair([1, 3], [1, 4], 1), reference=(0.0,))
    with pytest.raises(DataError, match="without any pair"):
        pack_pairs([])
    known = replace(pair([1, 3], [1, 4], 1), reference=(-1.0, -2.0))
    with pytest.raises(DataError, match="1 of 2 pairs have reference values"):
        pack_pairs([known, pair([1, 3], [1, 4], 1)])


@pytest.mark.parametrize("kind", ["crop", "blank", "noise"])
@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_spoilt_pictures_keep_their_tokens_and_depend_on_the_sample_alone(kind: str, aspect: str) -> None:
    processor = tiny_processor() if aspect == "pad" else _anyres_processor()
    corruption = CorruptionConfig(kind=kind)  # type: ignore[arg-type]
    first, again = (preference_sample(processor, ASKED, "Red.", "Blue.", corruption=corruption) for _ in range(2))
    other = preference_sample(processor, ASKED, "Red.", "Blue.", corruption=replace(corruption, seed=1))
    assert first.spoilt_N3SS is not None
    assert again.spoilt_N3SS is not None
    assert other.spoilt_N3SS is not None
    assert first.spoilt_N3SS.shape == first.tiles_N3SS.shape
    assert torch.equal(first.spoilt_N3SS, again.spoilt_N3SS)
    assert not torch.allclose(first.spoilt_N3SS, first.tiles_N3SS)
    assert torch.equal(first.spoilt_N3SS, other.spoilt_N3SS) == (kind == "blank")


def _anyres_processor() -> LlavaProcessor:
    return tiny_processor(image_processor=ImageProcessor(size_px=28, crop_px=28, aspect="anyres", pinpoints=((28, 56), (56, 28), (56, 56))))


def test_questions_without_pictures_have_nothing_to_spoil() -> None:
    asked = Conversation((Message("user", (TextPart("What is red?"),)),))
    assert preference_sample(tiny_processor(), asked, "A colour.", "A dot.", corruption=CorruptionConfig()).spoilt_N3SS is None


def test_a_crop_shows_one_part_of_the_picture() -> None:
    """A picture of stripes, each of its own brightness: a small crop shows few of them."""
    wide = Image.new("RGB", (64, 64))
    for column in range(64):
        wide.paste((column * 4,) * 3, (column, 0, column + 1, 64))
    asked = Conversation((Message("user", (ImagePart(to_png(wide)), TextPart("What?"))),))
    sample = preference_sample(tiny_processor(), asked, "Red.", "Blue.", corruption=CorruptionConfig(crop_share=0.04))
    assert sample.spoilt_N3SS is not None
    whole, part = (float(tiles.max() - tiles.min()) for tiles in (sample.tiles_N3SS[:, 0], sample.spoilt_N3SS[:, 0]))
    assert 0.05 < part / whole < 0.25  # shares of the width from 0.1 to 0.2


def test_pixels_follow_the_places_of_their_pictures() -> None:
    samples = [Pairs(spoilt=True).sample(index) for index in (0, 1, 2)]
    batch = pack_pairs(samples)
    expected = [tiles for sample in samples for tiles in (sample.tiles_N3SS, sample.spoilt_N3SS) if tiles is not None]
    assert batch.pixels_N3SS is not None
    assert torch.equal(batch.pixels_N3SS, torch.cat(expected))
    assert batch.grids == (ImageGrid(4, 4),) * 4
    assert batch.pairs_P3.tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, 7]]
    assert [stop - start for start, stop in pairwise(batch.cu_seqlens.tolist())][3] == len(samples[0].chosen.ids)
