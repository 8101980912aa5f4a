"""Tiny Llamas in Meta's own layout, and Meta's own arithmetic on them, written anew for the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tests.tiny import tiny_tokenizer

__all__ = ["MetaLlama"]

_EPS = 1e-5
_BY_COLUMNS = ("tok_embeddings", "wo", "w2")
"""What Meta's ranks share along the second dimension; norms each has whole, all else lies along the first."""


@dataclass(frozen=True, kw_only=True)
class MetaLlama:
    """A model of Meta's layout with random weights."""

    num_files: int = 1
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_layers: int = 2
    dim: int = 32
    ffn: int = 48
    vocab_size: int = 384
    theta: float = 10000.0
    dtype: torch.dtype = torch.float32
    is_cut_by_rows: bool = False
    """Whether the embedding is shared by rows, as in Llama 3."""

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head(self) -> int:
        return self.dim // self.num_heads

    def weights(self) -> dict[str, Tensor]:
        """Draw all tensors, whole, by Meta's names."""
        generator = torch.Generator().manual_seed(self.num_heads)
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim), "norm.weight": (self.dim,)}
        shapes["output.weight"] = (self.vocab_size, self.dim)
        for layer in range(self.num_layers):
            for name, rows, cols in (
                ("attention.wq", self.dim, self.dim), ("attention.wk", self.kv_heads * self.head, self.dim),
                ("attention.wv", self.kv_heads * self.head, self.dim), ("attention.wo", self.dim, self.dim),
                ("feed_forward.w1", self.ffn, self.dim), ("feed_forward.w2", self.dim, self.ffn), ("feed_forward.w3", self.ffn, self.dim),
            ):  # fmt: skip
                shapes[f"layers.{layer}.{name}.weight"] = (rows, cols)
            shapes[f"layers.{layer}.attention_norm.weight"] = shapes[f"layers.{layer}.ffn_norm.weight"] = (self.dim,)
        drawn = {name: torch.randn(shape, generator=generator) * shape[-1] ** (-0.5 * (len(shape) - 1)) for name, shape in shapes.items()}
        return {name: tensor.to(self.dtype) for name, tensor in drawn.items()}

    def save(self, folder: Path, *, with_tokenizer: bool = True) -> Path:
        """Write the files."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.weights()
        for rank in range(self.num_files):
            parts = {name: self._part(name, tensor, rank) for name, tensor in weights.items()}
            torch.save({**parts, "rope.freqs": torch.zeros(self.head // 2)}, folder / f"consolidated.{rank:02d}.pth")
        params: dict[str, float] = {"dim": self.dim, "n_layers": self.num_layers, "n_heads": self.num_heads, "norm_eps": _EPS}
        params |= {"multiple_of": 8, "vocab_size": -1}
        if self.num_kv_heads is not None:
            params["n_kv_heads"] = self.num_kv_heads
        if self.theta != 10000.0:
            params["rope_theta"] = self.theta
        (folder / "params.json").write_text(json.dumps(params))
        if with_tokenizer:
            (folder / "tokenizer.model").write_bytes(tiny_tokenizer().files()["tokenizer.model"])
        return folder

    def _part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        if tensor.dim() == 1:
            return tensor
        is_by_columns = name.split(".")[-2] in _BY_COLUMNS and not (self.is_cut_by_rows and name.startswith("tok"))
        return tensor.chunk(self.num_files, dim=int(is_by_columns))[rank].clone()

    def logits(self, ids: Tensor) -> Tensor:
        """Run Meta's forward: neighbouring pairs of dimensions are complex numbers that turn with the position."""
        weights = {name: tensor.float() for name, tensor in self.weights().items()}
        x_TD, length = weights["tok_embeddings.weight"][ids], len(ids)
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.head, 2).float() / self.head)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)

        def turned(heads: Tensor) -> Tensor:
            pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns).flatten(2)

        for layer in range(self.num_layers):

            def weight(name: str, layer: int = layer) -> Tensor:
                return weights[f"layers.{layer}.{name}.weight"]

            h_TD = _norm(x_TD, weight("attention_norm"))
            q, k, v = ((h_TD @ weight(f"attention.{name}").T).view(length, -1, self.head) for name in ("wq", "wk", "wv"))
            repeats = self.num_heads // self.kv_heads
            k, v = turned(k).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            scores = torch.einsum("thd,shd->hts", turned(q), k) * self.head**-0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            x_TD = x_TD + torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(length, -1) @ weight("attention.wo").T
            h_TD = _norm(x_TD, weight("ffn_norm"))
            gate = functional.silu(h_TD @ weight("feed_forward.w1").T) * (h_TD @ weight("feed_forward.w3").T)
            x_TD = x_TD + gate @ weight("feed_forward.w2").T
        return _norm(x_TD, weights["norm.weight"]) @ weights["output.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS) * weight
