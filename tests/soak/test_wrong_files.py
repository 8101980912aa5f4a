"""A checkpoint's JSON files with any value replaced by a wrong one: our error or a working processor; 400 always, all in the soak."""

import contextlib
import copy
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import write_result
from llavakit.checkpoint.load import load_config, load_processor
from llavakit.errors import LlavaError
from llavakit.processing.image import ImageProcessor
from llavakit.processing.processor import LlavaProcessor
from llavakit.types import Conversation
from llavakit.world.render import render, to_png
from llavakit.world.scenes import Backdrop, Scene
from tests.original_folders import make_original
from tests.tiny import (
    SIDE,
    family_config,
    llama3_tokenizer_folder,
    llama_config,
    llava_config,
    qwen_tokenizer_folder,
    tiny_processor,
    tiny_tokenizer,
)

PICTURE = to_png(render(Scene((), Backdrop("plain", (9, 99, 199), (0, 0, 0), 0)), 30, 20))
WRONG: tuple[Any, ...] = (
    None, [], {}, "x", "", "<s>", -1, 0, 1, 2**31, 10**30, 3.5, float("inf"), float("nan"), True, False,
    [1], ["a", "b"], [[1, 2]], [None], {"a": 1},
)  # fmt: skip
NUM_SAMPLED = 400
Place = tuple[str | int, ...]


def llava_15(folder: Path) -> None:
    tiny_processor().save_pretrained(folder)
    (folder / "config.json").write_text(llava_config().to_json())


def llava_16(folder: Path) -> None:
    pinpoints = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))
    images = ImageProcessor(size_px=SIDE, crop_px=SIDE, aspect="anyres", pinpoints=pinpoints)
    tiny_processor("mistral_instruct", images).save_pretrained(folder)
    (folder / "config.json").write_text(family_config("1.6-mistral").to_json())


def text_alone(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder)
        (folder / "config.json").write_text(llama_config().to_json())
        (folder / "tokenizer.model").unlink(missing_ok=True)

    return make


def original(kind: str) -> Callable[[Path], None]:
    """Write original LLaVA's layout without its weights; the tower's config.json, where it is outside, lies in a folder of its own."""

    def make(folder: Path) -> None:
        made = make_original(folder, kind).path
        for path in made.iterdir():
            if path.suffix in (".json", ".model"):
                path.rename(folder / path.name)
        shutil.rmtree(made)

    return make


KINDS = {
    "1.5": llava_15,
    "1.6": llava_16,
    "original v1": original("v1"),
    "original v1.5": original("v1.5"),
    "original v1.6": original("v1.6 mistral"),
    "text, Llama": text_alone(lambda folder: tiny_tokenizer().save_pretrained(folder)),
    "text, Llama 3": text_alone(llama3_tokenizer_folder),
    "text, Qwen": text_alone(qwen_tokenizer_folder),
}


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Yield the places of a document; of a list the first two entries, of a vocabulary none inside."""
    yield before
    if before == ("model", "vocab"):
        yield (*before, "a")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*before, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            yield from places(item, (*before, index))


def replaced(document: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


def use(folder: Path) -> None:
    """Load what the files describe and use all of it."""
    processor = load_processor(folder, load_config(folder))
    processor.prompt(Conversation.ask("what?", *([PICTURE] if isinstance(processor, LlavaProcessor) else [])))
    assert isinstance(processor.end_ids, frozenset)
    tokenizer = processor.tokenizer
    tokenizer.decode(tokenizer.encode("a <image> b", "and"))  # type: ignore[attr-defined]
    tokenizer.files()


def outcomes(folder: Path, kind: str, choose: Callable[[list[tuple[str, Place, Any]]], list[tuple[str, Place, Any]]]) -> list[bool]:
    """Try wrong files; returns of each whether it was refused. Anything but our own errors comes through."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    KINDS[kind](folder)
    texts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.json"))}
    if kind.startswith("1."):
        texts.pop("tokenizer.json", None)  # tokenizer.model is what is read
    cases = [(name, place, value) for name, text in texts.items() for place in places(json.loads(text)) for value in WRONG]
    refused = []
    for name, place, value in choose(cases):
        (folder / name).write_text(json.dumps(replaced(json.loads(texts[name]), place, value)))
        outcome = False
        with contextlib.suppress(LlavaError):
            use(folder)
            outcome = True
        refused.append(not outcome)
        (folder / name).write_text(texts[name])
    return refused


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep the warnings of thousands of folders out of the report."""
    caplog.set_level(logging.CRITICAL, logger="llavakit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_wrong_files(tmp_path: Path, kind: str) -> None:
    chance = random.Random(kind)
    refused = outcomes(tmp_path / "model", kind, lambda cases: chance.sample(cases, NUM_SAMPLED // len(KINDS)))
    assert 0 < sum(refused) < len(refused)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_all_wrong_files(tmp_path: Path) -> None:
    counts = {}
    for kind in KINDS:
        refused = outcomes(tmp_path / "model", kind, lambda cases: cases)
        counts[kind] = {"files": len(refused), "refused": sum(refused), "worked": len(refused) - sum(refused)}
    write_result("wrong_files", "make soak", counts)
    assert sum(count["files"] for count in counts.values()) > 10_000
