"""checkpoint.opening and pieces: weights read whole and in pieces, from safetensors, pickles and what is computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavakit.checkpoint import pieces
from llavakit.checkpoint.opening import open_checkpoint
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.pieces import PieceReader
from llavakit.errors import CheckpointError
from tests.meta_files import MetaLlama
from tests.original_folders import make_original
from tests.tiny import VARIANTS, save_llava


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 1000)


def same_in_pieces(folder: Path, sources: Sources, dtype: torch.dtype | None) -> set[bool]:
    """Compare all weights in both ways; returns whether some came in several pieces."""
    several, reader = set(), PieceReader()
    with open_checkpoint(folder, sources) as checkpoint:
        for weight in checkpoint.weights.values():
            parts = [piece.clone() for piece in reader.pieces(weight, weight.spec.dtype if dtype is None else dtype)]
            assert torch.equal(torch.cat(parts), weight.read(dtype).reshape(-1))
            several.add(len(parts) > 1)
    return several


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pickled", [False, True])
def test_pieces_make_the_whole(tmp_path: Path, pickled: bool, dtype: torch.dtype | None) -> None:
    made = make_original(tmp_path, "v1.5", pickled=pickled)
    assert same_in_pieces(made.path, Sources(allow_pickle=pickled), dtype) == {True, False}


def test_what_is_computed_comes_whole(tmp_path: Path) -> None:
    folder = MetaLlama().save(tmp_path / "meta")
    assert same_in_pieces(folder, Sources(allow_pickle=True), None) == {False}


def test_a_piece_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = save_llava(tmp_path / "model")
    path, name = folder / "model.safetensors", "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name][-1, -1] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"up_proj.*NaN or infinite"):
        list(PieceReader().pieces(checkpoint.weights[name], torch.float32))


def test_a_shared_weight_has_both_names(tmp_path: Path) -> None:
    variant = next(variant for variant in VARIANTS if variant.is_tied)
    with open_checkpoint(save_llava(tmp_path / "model", variant)) as checkpoint:
        head, table = (checkpoint.weights[f"language_model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
        assert head == table
