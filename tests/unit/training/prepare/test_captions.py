"""Captions: which are chosen, and what becomes of them."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llavakit.errors import DataError
from llavakit.training.prepare.captions import captioned_rows, coco_rows
from llavakit.training.prepare.concepts import balanced, noun_phrases, word_runs
from llavakit.training.prepare.published import LeftOut


def captions_of(rows: list[Any]) -> list[tuple[str, str]]:
    return [(row["image"], row["conversations"][1]["value"]) for row in rows if not isinstance(row, LeftOut)]


def test_rare_concepts_are_taken_whole_and_common_ones_up_to_a_hundred() -> None:
    captions = ["dog"] * 250 + ["cat"] * 3 + ["owl"] * 2 + ["dog, cat"]
    chosen = balanced(captions, lambda caption: caption.split(", "), seed=1)
    picked = [captions[number] for number in chosen]
    assert picked.count("cat") == 3
    assert picked.count("owl") == 0
    assert "dog, cat" in picked
    assert picked.count("dog") in (99, 100)
    assert chosen == sorted(chosen) == balanced(captions, lambda caption: caption.split(", "), seed=1)
    assert chosen != balanced(captions, lambda caption: caption.split(", "), seed=2)


def test_a_concept_counts_once_a_caption() -> None:
    assert balanced(["dog dog dog"], lambda caption: caption.split()) == []


def test_runs_of_words_are_concepts() -> None:
    assert word_runs("A brown dog's bowl is on the red-hot stove, near 3 cats.") == ["brown dog's bowl", "red-hot stove", "cats"]
    assert word_runs("In the of!") == []


def test_noun_phrases_are_those_of_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str) -> Any:
        if model == "absent":
            raise OSError("no such model")
        return lambda text: SimpleNamespace(noun_chunks=[SimpleNamespace(text=part) for part in text.split(" on ")])

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    assert list(noun_phrases()("A Dog on a sofa")) == ["a dog", "a sofa"]
    with pytest.raises(DataError, match="spacy download absent"):
        noun_phrases("absent")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match="pip install spacy"):
        noun_phrases()


def test_a_table_of_cc3m_names_its_pictures_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'a "dog\thttps://x/y.jpg\n\thttps://x/z.jpg\r\n\na\rcat\tcat.jpg\nan owl\thttps://x/o.jpg\n')
    rows = list(captioned_rows(tmp_path / "a.tsv", None))
    assert captions_of(rows) == [("GCC_train_000000000.jpg", 'a "dog'), ("cat.jpg", "a\rcat"), ("GCC_train_000000003.jpg", "an owl")]
    assert [row for row in rows if isinstance(row, LeftOut)] == [LeftOut("without a caption or a picture's name")]


def test_rows_of_captions_are_balanced(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    values: list[Any] = [{"image": f"{n}.jpg", "caption": "a dog"} for n in range(3)]
    values += [{"image": "x.jpg", "blip_caption": "an owl"}, {"image": "y.jpg", "conversations": turns}, {"caption": "lost"}, 7]
    (tmp_path / "a.json").write_text(json.dumps(values))
    kept = list(captioned_rows(tmp_path / "a.json", word_runs))
    assert captions_of(kept) == [(f"{n}.jpg", "a dog") for n in range(3)]
    assert sum(isinstance(row, LeftOut) for row in kept) == 4
    assert captions_of(list(captioned_rows(tmp_path / "a.json", None)))[3:] == [("x.jpg", "an owl"), ("y.jpg", "a cat")]


def test_coco_gives_a_row_a_picture(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(3)]
    notes = [{"image_id": n, "caption": f"{word} {n}\n"} for n in range(2) for word in ("one", "two", "three")]
    random.Random(0).shuffle(notes)
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    rows = list(coco_rows(tmp_path / "captions.json"))
    assert rows == list(coco_rows(tmp_path / "captions.json"))
    assert rows[2] == LeftOut("without a caption")
    for number, (image, caption) in enumerate(captions_of(rows)):
        assert image == f"{number:012d}.jpg"
        assert caption in {f"{word} {number}" for word in ("one", "two", "three")}
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="must hold a list 'annotations'"):
        list(coco_rows(tmp_path / "x.json"))
