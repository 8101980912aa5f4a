"""generate() against transformers': penalties, filters, beams and their arguments, ids and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llavakit.checkpoint.generation import GenerationDefaults
from llavakit.errors import InputError, PromptError
from llavakit.ops.sampling import adjust, token_probabilities
from llavakit.pretrained.causal_lm import LlamaForCausalLM, LlavaLlamaForCausalLM
from llavakit.types import SamplingParams
from tests.tiny import (
    IMAGE_TOKEN,
    NUM_IMAGE_TOKENS,
    SIDE,
    VARIANTS,
    Variant,
    copy_weights,
    hf_llama,
    hf_llava,
    llama_config,
    llava_config,
)

FEW_ENDS = (7, 19, 40)


def ids_of(seed: int, width: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (2, width), generator=torch.Generator().manual_seed(seed))


def mask_of(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return mask


def pair(variant: Variant, scale: float = 0.15) -> tuple[Any, LlamaForCausalLM]:
    """The oracle and our twin, with logits so flat that searches differ from greedy choices."""
    oracle = hf_llama(variant)
    with torch.no_grad():
        oracle.lm_head.weight *= scale
    return oracle, copy_weights(oracle, LlamaForCausalLM(llama_config(variant)))


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
@pytest.mark.parametrize("min_tokens", [0, 9])
def test_adjusted_scores_equal_transformers(penalty: float, ngram: int, min_tokens: int) -> None:
    ids = torch.randint(0, 12, (1, 30), generator=torch.Generator().manual_seed(ngram))
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 3
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    processors += [NoRepeatNGramLogitsProcessor(ngram)] if ngram else []
    processors += [MinLengthLogitsProcessor(25 + min_tokens, [3, 4])] if min_tokens else []
    expected = LogitsProcessorList(processors)(ids, scores.clone())
    params = SamplingParams(repetition_penalty=penalty, no_repeat_ngram_size=ngram, min_tokens=min_tokens)
    assert torch.equal(adjust(scores[0], params, ids[0].tolist(), 5, {3, 4}), expected[0])


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_equals_transformers_behind_the_other_filters(min_p: float) -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.95), MinPLogitsWarper(min_p)])
    found = token_probabilities(scores[0], SamplingParams(temperature=0.8, top_k=20, top_p=0.95, min_p=min_p))
    assert torch.equal(found, warpers(None, scores).softmax(-1)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(FEW_ENDS)},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "eos_token_id": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_greedy_ids_with_penalties_equal_transformers(variant: Variant, options: dict[str, Any]) -> None:
    oracle, ours = pair(variant)
    ids = ids_of(variant.seed)
    expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(ours.generate(ids, max_new_tokens=14, pad_token_id=0, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "early_stopping": True, "eos_token_id": list(FEW_ENDS)},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "eos_token_id": list(FEW_ENDS)},
        {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 2, "eos_token_id": 7},
        {"num_beams": 4, "length_penalty": 0.0, "eos_token_id": list(FEW_ENDS)},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_beams_equal_transformers_ids_and_scores(variant: Variant, options: dict[str, Any]) -> None:
    oracle, ours = pair(variant)
    ids = ids_of(variant.seed + 20)
    # transformers fills with the end token where the pad token is 0.
    given: dict[str, Any] = {"attention_mask": mask_of(ids), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 5, **options}
    expected = oracle.generate(ids, return_dict_in_generate=True, output_scores=True, **given)
    found = ours.generate(ids, return_dict_in_generate=True, **given)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


def test_a_search_finds_what_greedy_choices_miss() -> None:
    _, ours = pair(VARIANTS[0])
    ids = ids_of(20)
    assert not torch.equal(ours.generate(ids, max_new_tokens=10), ours.generate(ids, max_new_tokens=10, num_beams=4))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beams_with_pictures_equal_transformers(num_beams: int) -> None:
    variant = VARIANTS[1]
    oracle = hf_llava(variant)
    ours = copy_weights(oracle, LlavaLlamaForCausalLM(llava_config(variant)))
    text = ids_of(3)
    ids = torch.cat((text[:, :3], torch.full((2, NUM_IMAGE_TOKENS), IMAGE_TOKEN), text[:, 3:]), 1)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 5, "num_beams": num_beams}
    expected = oracle.generate(input_ids=ids, pixel_values=pixels, **given)
    assert torch.equal(ours.generate(ids, pixel_values=pixels, **given), expected)


def test_embeddings_give_new_ids_alone_as_in_transformers() -> None:
    oracle, ours = pair(VARIANTS[1])
    ids = ids_of(5)
    embeds, mask = oracle.get_input_embeddings()(ids), mask_of(ids)
    expected = oracle.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=7, pad_token_id=0), expected)


def test_both_spellings_of_lengths() -> None:
    _, ours = pair(VARIANTS[0])
    ids = ids_of(6)
    assert torch.equal(ours.generate(ids, max_length=15), ours.generate(ids, max_new_tokens=6))
    assert ours.generate(ids).shape[1] <= 9 + 20
    with pytest.raises(PromptError, match="max_tokens must be at least 1"):
        ours.generate(ids, max_length=9)


def test_own_processors_see_ids_and_change_scores() -> None:
    _, ours = pair(VARIANTS[0])
    ids, seen = ids_of(7)[:1], []

    def only_eleven(every: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(every.tolist()[0])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([11]), 0.0)

    assert ours.generate(ids, max_new_tokens=3, logits_processor=[only_eleven])[0, 9:].tolist() == [11, 11, 11]
    assert seen == [ids[0].tolist(), [*ids[0].tolist(), 11], [*ids[0].tolist(), 11, 11]]


def test_stopping_criteria_end_a_row_where_transformers_ends_it() -> None:
    oracle, ours = pair(VARIANTS[0], scale=1.0)
    ids = ids_of(3)
    free = ours.generate(ids, max_new_tokens=12)
    wanted = int(free[0, 12])

    class SawIt(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **_: Any) -> torch.Tensor:
            return input_ids[:, 9:].eq(wanted).any(1)

    # Without an end token transformers lets ended rows run on beside the others.
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 383}
    expected = oracle.generate(ids, do_sample=False, stopping_criteria=StoppingCriteriaList([SawIt()]), **options)
    got = ours.generate(ids, stopping_criteria=[SawIt()], **options)
    assert got.tolist() == expected.tolist()
    assert ours.generate(ids[:1], stopping_criteria=[lambda row, _: row.shape[1] == 11], **options).shape == (1, 11)
    with pytest.raises(InputError, match="set num_beams to 1"):
        ours.generate(ids, stopping_criteria=[SawIt()], num_beams=2)


def test_a_streamer_gets_the_prompt_and_each_token() -> None:
    class Kept:
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.is_over = False

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.is_over = True

    _, ours = pair(VARIANTS[0])
    streamer = Kept()
    out = ours.generate(ids_of(8)[:1], max_new_tokens=5, streamer=streamer)
    assert streamer.ids == out[0].tolist()
    assert streamer.is_over
    with pytest.raises(InputError, match="one row, got 2"):
        ours.generate(ids_of(8), streamer=streamer)
    with pytest.raises(InputError, match="num_beams to 1"):
        ours.generate(ids_of(8)[:1], streamer=streamer, num_beams=2)


def test_several_draws_come_back_row_by_row() -> None:
    _, ours = pair(VARIANTS[0], scale=0.02)
    ids = ids_of(9)
    out = ours.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=6, seed=1, eos_token_id=[])
    assert torch.equal(out[:, :9], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.tolist()}) == 6
    assert torch.equal(out[:1], ours.generate(ids[:1], do_sample=True, max_new_tokens=6, seed=1, eos_token_id=[]))


def test_the_checkpoints_own_settings_come_behind_the_callers() -> None:
    _, ours = pair(VARIANTS[0])
    ids = ids_of(10)[:1]
    greedy = ours.generate(ids, max_new_tokens=6, eos_token_id=[])
    ours.generation = GenerationDefaults(end_ids=(int(greedy[0, 10]),), do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=6), greedy[:, :11])
    ours.generation = GenerationDefaults(do_sample=True, temperature=1e-4)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, eos_token_id=[]), greedy)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, eos_token_id=[], do_sample=False), greedy)


def test_original_llavas_own_call_works() -> None:
    model = LlavaLlamaForCausalLM(llava_config())
    pixels = torch.randn(1, 3, SIDE, SIDE)
    ids = torch.tensor([[1, -200, 5]])
    given: dict[str, Any] = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 4, "use_cache": True}
    out = model.generate(inputs=ids, images=pixels, image_sizes=[(SIDE, SIDE)], **given)
    assert out.shape[1] <= NUM_IMAGE_TOKENS + 2 + 4
    with pytest.raises(InputError, match="inputs and input_ids are the same thing"):
        model.generate(ids, inputs=ids)


@pytest.mark.parametrize(
    "file",
    [
        {"max_length": 20},
        {"max_new_tokens": 7},
        {"num_beams": 3, "max_new_tokens": 6},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 12},
        {"min_new_tokens": 9, "max_length": 25},
    ],
    ids=str,
)
def test_the_files_settings_equal_transformers(file: dict[str, Any], tmp_path: Path) -> None:
    oracle, _ = pair(VARIANTS[0])
    oracle.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 19], "pad_token_id": 5, **file}))
    again = type(oracle).from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = ids_of(11)
    expected = again.generate(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).generate(ids), expected)


def test_a_file_that_draws_does_not_stand_in_a_searchs_way() -> None:
    _, ours = pair(VARIANTS[0])
    ids = ids_of(12)
    expected = ours.generate(ids, num_beams=2, max_new_tokens=5)
    ours.generation = GenerationDefaults(do_sample=True, temperature=0.6)
    assert torch.equal(ours.generate(ids, num_beams=2, max_new_tokens=5), expected)
