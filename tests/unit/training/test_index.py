"""The index: whole, the same with any number of processes, continued after an interruption, rebuilt for another key."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from llavakit.errors import TrainingError
from llavakit.training import index as module
from llavakit.training.checks import Fault, Measures
from llavakit.training.index import build_index, index_key, load_index


class Lines:
    """Row i has i + 1 tokens; every seventh cannot train, every fifth is odd."""

    def __init__(self, count: int, *, log: Path | None = None, dies_at: int | None = None) -> None:
        self.count, self.log, self.dies_at = count, log, dies_at

    def __len__(self) -> int:
        return self.count

    def measure(self, index: int) -> Measures:
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{index}\n")
        faults = [Fault("torn", f"row {index} is torn", True)] * (index % 7 == 0) + [Fault("odd", "it is odd", False)] * (index % 5 == 0)
        return Measures(index + 1, index // 2, index % 3, tuple(faults), id=index % 45)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", 8)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_row_is_measured_once_and_its_problems_are_told(tmp_path: Path, workers: int) -> None:
    found = build_index(Lines(50), tmp_path / "index", key="a", workers=workers)
    assert found.num_tokens.tolist() == [0 if index % 7 == 0 else index + 1 for index in range(50)]
    assert found.num_supervised.tolist() == [index // 2 for index in range(50)]
    assert found.num_tiles.tolist() == [index % 3 for index in range(50)]
    assert (len(found), found.num_fatal, found.counts) == (50, 8, {"duplicate id": 10, "odd": 10, "torn": 8})
    lines = [json.loads(line) for line in (tmp_path / "index" / "problems.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines if line["is_fatal"]] == list(range(0, 50, 7))
    assert [line["row"] for line in lines if line["kind"] == "duplicate id"] == [0, 1, 2, 3, 4, 45, 46, 47, 48, 49]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_it_is_built_once_for_a_key(tmp_path: Path) -> None:
    log = tmp_path / "measured"
    first = build_index(Lines(20, log=log), tmp_path / "index", key="a")
    again = build_index(Lines(20, log=log), tmp_path / "index", key="a")
    assert again.num_tokens.tolist() == first.num_tokens.tolist()
    assert len(log.read_text().splitlines()) == 20
    assert len(build_index(Lines(30, log=log), tmp_path / "index", key="b")) == 30
    assert len(log.read_text().splitlines()) == 50


def test_a_damaged_index_is_built_again(tmp_path: Path) -> None:
    build_index(Lines(20), tmp_path / "index", key="a")
    weights = tmp_path / "index" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert build_index(Lines(20), tmp_path / "index", key="a").num_tokens.tolist()[1:7] == [2, 3, 4, 5, 6, 7]


def test_a_killed_build_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "measured"
    with pytest.raises(TrainingError, match="was killed"):
        build_index(Lines(50, log=log, dies_at=37), tmp_path / "index", key="a", workers=2)
    done = set(log.read_text().split())
    assert len(build_index(Lines(50, log=log), tmp_path / "index", key="a", workers=2)) == 50
    assert "0" in done
    assert log.read_text().split().count("0") == 1


class Mended(Lines):
    """Rows of which some get well."""

    is_well = False

    def measure(self, index: int) -> Measures:
        found = super().measure(index)
        lost = (Fault("missing picture", "gone", is_fatal=True),) if index in (3, 9) and not self.is_well else ()
        return Measures(found.num_tokens, found.num_supervised, found.num_tiles, (*found.problems, *lost))


def test_rows_whose_pictures_come_back_are_measured_again(tmp_path: Path) -> None:
    log = tmp_path / "measured"
    source, kinds = Mended(20, log=log), ("missing picture",)
    first = build_index(source, tmp_path / "index", key="a", volatile=kinds)
    assert first.counts["missing picture"] == 2
    assert build_index(source, tmp_path / "index", key="a", volatile=kinds).num_fatal == first.num_fatal
    source.is_well = True
    again = build_index(source, tmp_path / "index", key="a", volatile=kinds)
    assert again.num_tokens.tolist()[3] == 4
    assert again.num_fatal == first.num_fatal - 2
    assert "missing picture" not in again.counts
    assert len(log.read_text().splitlines()) == 20 + 2 + 2
    assert load_index(tmp_path / "index").counts == again.counts


def test_an_empty_chunk_is_measured_again(tmp_path: Path) -> None:
    key = "a" * 64
    parts = tmp_path / f".index-{key[:16]}"
    parts.mkdir()
    (parts / "1.json").write_text("")
    (tmp_path / ".index-oldkey").mkdir()
    assert len(build_index(Lines(20), tmp_path / "index", key=key)) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_keys_tell_values_apart() -> None:
    assert index_key({"a": 1, "b": [2]}) == index_key({"b": [2], "a": 1}) != index_key({"a": 1, "b": [3]})
