"""What can be wrong with a checkpoint that is converted: one error each, its exit code, and nothing at the destination."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavakit.cli.main import run
from tests.folders import edit_json
from tests.original_folders import make_original
from tests.tiny import NUM_PIECES

NAME = "model.layers.0.mlp.up_proj.weight"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    values = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in values.items() if tensor is not None}, path)


def header(folder: Path, action: Callable[[dict[str, Any]], object]) -> None:
    """Change a file's header and keep its data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8 : 8 + length])
    action(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _not_finite(folder: Path, value: float) -> None:
    weight = load_file(folder / "model.safetensors")[NAME]
    weight[1, 2] = value
    change(folder, **{NAME: weight})


def _index(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _link(folder: Path) -> None:
    path, outside = folder / "model.safetensors", folder.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def _unreadable(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _overlapping(values: dict[str, Any]) -> None:
    first, second = (name for name in list(values)[:2])
    values[second]["data_offsets"] = values[first]["data_offsets"]


def _more_tokens(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=NUM_PIECES - 10)
    rows = load_file(folder / "model.safetensors")
    change(folder, **{name: rows[name][: NUM_PIECES - 10] for name in ("model.embed_tokens.weight", "lm_head.weight")})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda folder: _not_finite(folder, float("nan")), f"{NAME} holds NaN or infinite"),
    "infinite": (lambda folder: _not_finite(folder, float("inf")), f"{NAME} holds NaN or infinite"),
    "truncated": (_truncated, "truncated or has a tail"),
    "unreadable": (_unreadable, "is not a regular file"),
    "overlapping": (lambda folder: header(folder, _overlapping), "overlap or leave a hole"),
    "an index outside": (lambda folder: _index(folder, "../outside.safetensors"), "a plain file name"),
    "a missing shard": (lambda folder: _index(folder, "model-00001-of-00001.safetensors"), "cannot read"),
    "a link outside": (_link, "outside"),
    "a missing tensor": (lambda folder: change(folder, **{NAME: None}), f"missing language_model.{NAME}"),
    "an unknown tensor": (lambda folder: change(folder, strange=torch.ones(1)), "unexpected strange [1]"),
    "another shape": (lambda folder: change(folder, **{NAME: torch.ones(3, 4)}), "has shape [3, 4], expected"),
    "a doubled tensor": (
        lambda folder: change(folder, **{"model.vision_tower.vision_tower.embeddings.class_embedding": torch.ones(32)}),
        "are both vision_tower.vision_model.embeddings.class_embedding",
    ),
    "integers": (lambda folder: change(folder, **{NAME: torch.ones(96, 64, dtype=torch.int32)}), "only floating-point weights are read"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer"),
    "fewer rows than tokens": (_more_tokens, "rows"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_fault_is_one_error_and_nothing_is_written(tmp_path: Path, kind: str, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    action, told = FAULTS[kind]
    made = make_original(tmp_path / "made", "v1.5", tower_inside=True)
    action(made.path)
    assert run(["convert", str(made.path), str(tmp_path / "out"), "--to", to]) == 3
    message = capsys.readouterr().err
    assert message.startswith("llava: ")
    assert message.count("\n") == 1
    assert told in message
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_all_problems_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_original(tmp_path / "made", "v1.5", tower_inside=True)
    change(made.path, **{NAME: None, "strange": torch.ones(1), "model.norm.weight": torch.ones(3)})
    assert run(["convert", str(made.path), str(tmp_path / "out")]) == 3
    message = capsys.readouterr().err
    assert all(told in message for told in (f"missing language_model.{NAME}", "unexpected strange", "model.norm.weight has shape [3]"))


def test_a_base_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta, base = (make_original(tmp_path / name, kind, tower_inside=True) for name, kind in (("delta", "v1.5"), ("base", "v1.6 mistral")))
    change(base.path, **{"model.layers.1.mlp.up_proj.weight": None})
    assert run(["convert", str(delta.path), str(tmp_path / "out"), "--base", str(base.path)]) == 3
    assert "the base is not the one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_original(tmp_path / "made", "v1.5", tower_inside=True)
    opened = Path.open

    class Full:
        """A file on a disk with little room."""

        def __init__(self, file: IO[bytes]) -> None:
            self._file, self._room = file, 50_000

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            self._room -= len(data)
            if self._room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

    def open_full(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = opened(path, mode, *rest, **options)
        return Full(file) if path.suffix == ".safetensors" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", open_full)
    assert run(["convert", str(made.path), str(tmp_path / "out")]) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_destination_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_original(tmp_path / "made", "v1.5", tower_inside=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert run(["convert", str(made.path), str(tmp_path / "out")]) == 6
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
