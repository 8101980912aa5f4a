"""Ids and masks of LLaVA's own training code, as it gave them itself (llava_masks.json says how), and where ours agree without it."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llavakit.engine.llm import MINIATURE
from llavakit.errors import ConfigError, DataError
from llavakit.geometry import num_image_tokens
from llavakit.processing.chat import find_template
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.training.exact import EXACT_TEMPLATES, exact_chat
from llavakit.training.forms import row_of
from llavakit.training.pictures import PictureFolder
from llavakit.training.records import RecordSource
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.odd_rows import Held

GOLDEN = json.loads((Path(__file__).parent / "llava_masks.json").read_text())
PLACE = -200


@cache
def processor(template: str, legacy: bool) -> LlavaProcessor:
    tokenizer = LlamaTokenizer.from_pretrained(MINIATURE, legacy=legacy)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return replace(LlavaProcessor.from_pretrained(MINIATURE), tokenizer=tokenizer, template=find_template(template))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", EXACT_TEMPLATES)
def test_ids_and_masks_are_those_of_the_original(template: str, legacy: bool) -> None:
    own = processor(template, legacy)
    cases = [case for case in GOLDEN["cases"] if (case["template"], case["legacy"]) == (template, legacy)]
    assert len(cases) >= 3
    for case in cases:
        row, _ = row_of(GOLDEN["rows"][case["row"]])
        found = exact_chat(own, row, [own.tile_grid] * len(row.pictures))
        slots = num_image_tokens(own.tile_grid)
        learned = set(case["learned"])
        ids = [index for known in case["ids"] for index in ([own.image_token_id] * slots if known == PLACE else [known])]
        mask = [place in learned for place, known in enumerate(case["ids"]) for _ in range(slots if known == PLACE else 1)]
        assert (list(found.ids), list(found.loss_mask)) == (ids, mask), case["row"]


ORDINARY = (0, 1, 4)


@pytest.mark.parametrize("template", ["v1", "llava_v1", "llama_2", "llava_llama_2", "plain"])
def test_of_ordinary_rows_the_default_learns_the_same(template: str) -> None:
    own = processor(template, True)
    for number in ORDINARY if template != "plain" else (3,):
        row, _ = row_of(GOLDEN["rows"][number])
        grids = [own.tile_grid] * len(row.pictures)
        exact = exact_chat(own, row, grids)
        ours = own.encode_chat(row.conversation([b""] * len(grids)), grids, add_generation_prompt=False)[1]
        assert exact.ids == ours.ids, number
        assert exact.loss_mask == ours.loss_mask, number


def test_a_row_of_which_the_original_learns_nothing_is_told() -> None:
    turns = [{"from": "human", "value": "what is ASSISTANT: here?"}, {"from": "gpt", "value": "text"}]
    rows, files = Held({"conversations": turns}), PictureFolder(Path("."))
    lost = RecordSource(rows, files, processor("v1", True), is_exact=True).measure(0)
    assert [fault.kind for fault in lost.problems] == ["markup in text", "nothing learned"]
    assert RecordSource(rows, files, processor("v1", True)).measure(0).num_supervised > 0


def test_samples_are_what_was_measured() -> None:
    picture = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    source = RecordSource(Held({"image": picture, "conversations": turns}), PictureFolder(Path(".")), processor("v0", True), is_exact=True)
    sample, measured = source.sample(0), source.measure(0)
    assert (sample.num_tokens, sum(sample.loss_mask[1:])) == (measured.num_tokens, measured.num_supervised)
    assert sample.tiles_N3SS.shape[0] == 1
    plain = RecordSource(Held({"image": picture, "conversations": turns}), PictureFolder(Path(".")), processor("v0", True))
    assert plain.sample(0).ids != sample.ids


@pytest.mark.parametrize("template", ["v0", "v1", "llama_2", "chatml_direct"])
def test_texts_that_spell_a_picture_are_a_fault_or_text(template: str) -> None:
    turns = [{"from": "human", "value": "How do I show a picture?"}, {"from": "gpt", "value": "Write <image> in the prompt."}]
    for row in ({"conversations": turns}, {"image": "a", "conversations": [{**turns[0], "value": "<image>\nHow?"}, turns[1]]}):
        own = processor(template, True)
        with pytest.raises(DataError, match=r"data\.masks=answers"):
            exact_chat(own, row_of(row)[0], [own.tile_grid] * ("image" in row))


def test_turns_out_of_order_are_a_fault() -> None:
    turns = [{"from": speaker, "value": "x"} for speaker in ("human", "human", "gpt")]
    with pytest.raises(DataError, match="take turns"):
        exact_chat(processor("v0", True), row_of({"conversations": turns})[0], [])


@pytest.mark.parametrize(
    "value",
    [
        {"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ],
)
def test_what_the_original_could_not_read_is_a_fault(value: Any) -> None:
    with pytest.raises(DataError, match=r"data\.masks=answers"):
        exact_chat(processor("v1", True), row_of(value)[0], [])


def test_other_templates_are_refused() -> None:
    with pytest.raises(ConfigError, match="v1_hf"):
        RecordSource(Held(), PictureFolder(Path(".")), processor("v1_hf", True), is_exact=True)
