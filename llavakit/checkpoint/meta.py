"""Llama in Meta's own layout: params.json and consolidated.NN.pth, one file for each rank of its model parallelism.

Owns: MetaFolder, which shows these files as whole tensors under our names, and the configuration that params.json means.
Invariants: files that do not fit together are refused on shapes alone; memory holds one tensor and one file's part of it.
Meta turns pairs of neighbouring rotary dimensions, everyone else the two halves of a head, so queries and keys change their order.
Source: llama/model.py and llama/generation.py of Meta's repositories (names, parallel dimensions, rotary order, feed-forward width).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from llavakit.checkpoint.rotary_order import to_halves
from llavakit.errors import CheckpointError, ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig
from llavakit.storage.documents import read_json
from llavakit.storage.hub import check_inside
from llavakit.storage.pickle_tensors import PickleFile
from llavakit.storage.tensors import TensorSpec

__all__ = ["PARAMS_NAME", "MetaFolder", "is_meta_folder"]

_LOG = logger("checkpoint")
PARAMS_NAME = "params.json"
_FILES = "consolidated.*.pth"
_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
    "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip
_LLAMA_1_EPS = 1e-6
_LLAMA_3_2_WIDTHS = (2048, 3072)  # 1B and 3B


@dataclass(frozen=True, slots=True)
class _Rule:
    """What becomes of one kind of tensor."""

    pattern: str
    target: str
    """Our name; {} is the layer."""
    dim: int | None
    """Along which the files are put together; None where each file has all of it."""
    is_rotary: bool = False
    """Whether its rows are turned by the rotary embedding."""


_RULES = (
    _Rule(r"tok_embeddings\.weight", "model.embed_tokens.weight", 1),
    _Rule(r"output\.weight", "lm_head.weight", 0),
    _Rule(r"norm\.weight", "model.norm.weight", None),
    _Rule(r"layers\.(\d+)\.attention\.wq\.weight", "model.layers.{}.self_attn.q_proj.weight", 0, is_rotary=True),
    _Rule(r"layers\.(\d+)\.attention\.wk\.weight", "model.layers.{}.self_attn.k_proj.weight", 0, is_rotary=True),
    _Rule(r"layers\.(\d+)\.attention\.wv\.weight", "model.layers.{}.self_attn.v_proj.weight", 0),
    _Rule(r"layers\.(\d+)\.attention\.wo\.weight", "model.layers.{}.self_attn.o_proj.weight", 1),
    _Rule(r"layers\.(\d+)\.feed_forward\.w1\.weight", "model.layers.{}.mlp.gate_proj.weight", 0),
    _Rule(r"layers\.(\d+)\.feed_forward\.w2\.weight", "model.layers.{}.mlp.down_proj.weight", 1),
    _Rule(r"layers\.(\d+)\.feed_forward\.w3\.weight", "model.layers.{}.mlp.up_proj.weight", 0),
    _Rule(r"layers\.(\d+)\.attention_norm\.weight", "model.layers.{}.input_layernorm.weight", None),
    _Rule(r"layers\.(\d+)\.ffn_norm\.weight", "model.layers.{}.post_attention_layernorm.weight", None),
)
_DROPPED = "rope.freqs"  # rotary frequencies are computed from the config


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one of our tensors comes from."""

    name: str
    """In the files."""
    dim: int | None
    is_rotary: bool


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder holds Meta's files."""
    return (folder / PARAMS_NAME).is_file() and any(folder.glob(_FILES))


class MetaFolder:
    """The tensors of a folder, whole, by our names. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open all files. Raises: CheckpointError for files that are damaged, unknown, or do not fit together."""
        self._files: list[PickleFile] = []
        self._params = read_json(folder / PARAMS_NAME)
        if strange := sorted(set(self._params) - _KNOWN):
            _LOG.warning("params.json states %s, which plain Llama models do not; it is left out", ", ".join(strange))
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            for path in _paths(folder):
                check_inside(path, folder)
                self._files.append(PickleFile(path))
            self._sources = _match(self._files)
            self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in self._sources}
            self.config = self._read_config()
            opened.pop_all()

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype. Raises: CheckpointError where files disagree about what they all hold."""
        source, spec = self._sources[name], self.specs[name]
        if source.dim is None:
            tensor, *others = (file.read(source.name) for file in self._files)
            if not all(torch.equal(tensor, other) for other in others):
                raise CheckpointError(f"{source.name} is not the same in all files; they belong to different models")
            return tensor
        tensor, start = torch.empty(spec.shape, dtype=spec.dtype), 0
        for file in self._files:
            length = file.specs[source.name].shape[source.dim]
            tensor.narrow(source.dim, start, length).copy_(file.read(source.name))
            start += length
        return to_halves(tensor, self.config.head_width) if source.is_rotary else tensor

    def place(self, name: str) -> None:
        """Tensors are put together from several files."""

    def in_file_order(self) -> Iterator[str]:
        """Iterate over our names in the order of the first file's data."""
        yield from sorted(self._sources, key=lambda name: self._files[0].specs[self._sources[name].name].start)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        source = self._sources[name]
        parts = [file.specs[source.name] for file in self._files]
        shapes = [part.shape for part in parts]
        if len({part.dtype for part in parts}) > 1 or len({_others(shape, source.dim) for shape in shapes}) > 1:
            raise CheckpointError(f"{source.name} has {', '.join(map(str, shapes))} in the files; they belong to different models")
        first = parts[0]
        if source.dim is None:
            return first
        whole = list(first.shape)
        whole[source.dim] = sum(shape[source.dim] for shape in shapes)
        return TensorSpec(first.dtype, tuple(whole), first.start, first.start + sum(part.num_bytes for part in parts))

    def _read_config(self) -> LlamaConfig:
        """Translate params.json, which leaves the widths of vocabulary and feed-forward block and the context to be known."""
        params = self._params
        embedding, gate = self.specs["model.embed_tokens.weight"].shape, self.specs["model.layers.0.mlp.gate_proj.weight"].shape
        try:
            config = LlamaConfig(
                vocab_size=embedding[0],
                hidden_size=_stated(params, "dim"),
                intermediate_size=gate[0],
                num_hidden_layers=_stated(params, "n_layers"),
                num_attention_heads=_stated(params, "n_heads"),
                num_key_value_heads=params.get("n_kv_heads"),
                rms_norm_eps=_stated(params, "norm_eps"),
                rope_theta=params.get("rope_theta", 10000.0),
                rope_scaling=_scaling(params) if params.get("use_scaled_rope") else None,
                max_position_embeddings=_context(params),
            )
        except ConfigError as error:
            raise CheckpointError(f"{PARAMS_NAME} does not describe these files: {error}") from error
        stated = params.get("vocab_size", -1)
        if stated not in (-1, config.vocab_size):
            raise CheckpointError(f"{PARAMS_NAME} states vocab_size={stated!r}, the embedding has {config.vocab_size} rows")
        return config


def _paths(folder: Path) -> list[Path]:
    """Return the files in the order of their ranks. Raises: CheckpointError where one is missing."""
    paths = sorted(folder.glob(_FILES))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    if not paths or [path.name for path in paths] != expected:
        raise CheckpointError(f"{folder} has {', '.join(path.name for path in paths) or 'no weights'}; expected consolidated.00.pth and on")
    return paths


def _match(files: list[PickleFile]) -> dict[str, _Source]:
    """Find the rule of every tensor. Raises: CheckpointError listing the names that are unknown or not in all files."""
    names = list(files[0].specs)
    problems = [f"{name} is not in {file.path.name}" for file in files for name in names if name not in file.specs]
    problems += [f"{name} is only in {file.path.name}" for file in files for name in file.specs if name not in files[0].specs]
    sources = {}
    for name in names:
        if name == _DROPPED:
            continue
        found = next(((rule, match) for rule in _RULES if (match := re.fullmatch(rule.pattern, name))), None)
        if found is None or len(files[0].specs[name].shape) != (1 if found[0].dim is None else 2):
            problems.append(f"unexpected {name} {list(files[0].specs[name].shape)}")
            continue
        rule, match = found
        sources[rule.target.format(*match.groups())] = _Source(name, rule.dim, rule.is_rotary)
    problems += [f"missing {rule.target.format(0)}" for rule in _RULES if rule.target.format(0) not in sources]
    if problems:
        raise CheckpointError(f"the files are not those of a Llama: {'; '.join(problems[:20])}")
    embedding, output = sources["model.embed_tokens.weight"], sources["lm_head.weight"]
    if len(files) > 1 and files[0].specs[embedding.name].shape == files[0].specs[output.name].shape:
        sources["model.embed_tokens.weight"] = _Source(embedding.name, 0, False)  # Llama 3 cuts the embedding by rows, like the head
    return sources


def _others(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """Return the number of dimensions, and the lengths along which files must agree."""
    return len(shape), *(length for place, length in enumerate(shape) if place != dim)


def _stated(params: Mapping[str, Any], name: str) -> Any:
    if name not in params:
        raise ConfigError(f"{name} is missing")
    return params[name]


def _scaling(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary scaling of Llama 3.1 and later; most params.json leave its numbers to the release, which its width tells."""
    usual = 32.0 if _stated(params, "dim") in _LLAMA_3_2_WIDTHS else 8.0
    return {
        "rope_type": "llama3",
        "factor": params.get("rope_scaling_factor", usual),
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def _context(params: Mapping[str, Any]) -> int:
    """Return the positions that the release was trained on, which its files do not state."""
    if params.get("use_scaled_rope"):
        return 131072
    theta = params.get("rope_theta", 10000.0)
    if theta == 1e6:
        return 16384  # Code Llama
    if theta == 5e5:
        return 8192  # Llama 3
    return 2048 if params.get("norm_eps") == _LLAMA_1_EPS else 4096
