"""Tiny quantised folders, written value by value from the published definitions; no code of ours packs or unpacks here.

GPTQ: the codes of one output are one number, input after input from the lowest bits on, cut into words of 32 bits; so are the zeros of
one group, output after output, each less 1 in v1 (0 becomes the highest value). AWQ (gemm): a word holds eight outputs of one input, in
the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["RECIPES", "Module", "Recipe", "awq_words", "bit_stream", "draw_module", "quantise_folder", "rounded"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LINEAR = re.compile(r"(?!.*vision).*layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
Grid = list[list[int]]


@dataclass(frozen=True)
class Recipe:
    """How to quantise."""

    method: str = "gptq"
    version: str = "gptq"
    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    is_symmetric: bool = False
    has_index: bool = True

    def settings(self) -> dict[str, Any]:
        """What config.json says of it."""
        shape = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return {**shape, "version": self.version, "zero_point": True, "modules_to_not_convert": ["vision_tower"]}
        return {**shape, "checkpoint_format": self.version, "desc_act": self.act_order, "sym": self.is_symmetric}


RECIPES = {
    **{f"GPTQ {bits} bits": Recipe(bits=bits) for bits in (2, 3, 4, 8)},
    **{f"GPTQ v2 {bits} bits": Recipe(version="gptq_v2", bits=bits) for bits in (3, 4)},
    "GPTQ act-order": Recipe(act_order=True),
    "GPTQ one group, no g_idx": Recipe(group_size=-1, has_index=False),
    "GPTQ symmetric, uneven groups": Recipe(group_size=40, is_symmetric=True),
    "GPTQ groups wider than the weight": Recipe(group_size=10**30, has_index=False),
    "AWQ": Recipe("awq", "gemm"),
    "AWQ one group": Recipe("awq", "gemm", group_size=-1),
}


@dataclass(frozen=True)
class Module:
    """One quantised weight: its files' tensors by their suffixes, and what they stand for."""

    tensors: dict[str, Tensor]
    dense: Tensor


def bit_stream(values: Sequence[int], bits: int) -> list[int]:
    """Cut the number that values make together into words."""
    number = sum(value << (bits * place) for place, value in enumerate(values))
    return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(values) * bits // 32)]


def awq_words(values: Sequence[int]) -> list[int]:
    """Put eight values into each word in AWQ's order."""
    return [sum(values[start + value] << (4 * place) for place, value in enumerate(_AWQ_ORDER)) for start in range(0, len(values), 8)]


def words_tensor(words: Grid) -> Tensor:
    """Store words as safetensors do, with a sign."""
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in words], dtype=torch.int32)


def rounded(value: float) -> float:
    """Round to float16."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def draw_module(recipe: Recipe, num_inputs: int, num_outputs: int, rng: random.Random) -> Module:
    """Draw codes, scales and zeros, and write them."""
    size = num_inputs if recipe.group_size == -1 else recipe.group_size
    groups = [row // size for row in range(num_inputs)]
    if recipe.act_order:
        rng.shuffle(groups)
    highest = 2**recipe.bits - 1
    codes = [[rng.randint(0, highest) for _ in range(num_outputs)] for _ in range(num_inputs)]
    zeros = [
        [2 ** (recipe.bits - 1) if recipe.is_symmetric else rng.randint(0, highest) for _ in range(num_outputs)]
        for _ in range(max(groups) + 1)
    ]
    width = 0.5 / highest / num_inputs**0.5
    scales = [[rounded(width * rng.uniform(0.5, 2)) for _ in range(num_outputs)] for _ in zeros]
    dense = [
        [rounded(scales[groups[row]][column] * (codes[row][column] - zeros[groups[row]][column])) for row in range(num_inputs)]
        for column in range(num_outputs)
    ]
    tensors = {
        "scales": torch.tensor(scales, dtype=torch.float16),
        **(_awq(codes, zeros) if recipe.method == "awq" else _gptq(recipe, codes, zeros)),
    }
    if recipe.method == "gptq" and recipe.has_index:
        tensors["g_idx"] = torch.tensor(groups, dtype=torch.int32)
    return Module(tensors, torch.tensor(dense, dtype=torch.float16))


def _gptq(recipe: Recipe, codes: Grid, zeros: Grid) -> dict[str, Tensor]:
    less = int(recipe.version == "gptq")
    columns = [bit_stream([row[column] for row in codes], recipe.bits) for column in range(len(codes[0]))]
    stored = [bit_stream([(zero - less) % 2**recipe.bits for zero in row], recipe.bits) for row in zeros]
    return {"qweight": words_tensor(columns).T.contiguous(), "qzeros": words_tensor(stored)}


def _awq(codes: Grid, zeros: Grid) -> dict[str, Tensor]:
    return {name: words_tensor([awq_words(row) for row in rows]) for name, rows in (("qweight", codes), ("qzeros", zeros))}


def quantise_folder(
    folder: Path, recipe: Recipe, *, rename: Callable[[str], str] = str, file: str = "model.safetensors", state: bool = True
) -> dict[str, Tensor]:
    """Quantise a folder's decoder in place; returns its tensors as a reader should see them, under their old names."""
    rng = random.Random(0)
    weights = {name: weight.half() for name, weight in load_file(folder / "model.safetensors").items()}
    files: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _LINEAR.fullmatch(name) is None:
            files[rename(name)] = weight
            continue
        module = draw_module(recipe, weight.shape[1], weight.shape[0], rng)
        stem = rename(name).removesuffix(".weight")
        files |= {f"{stem}.{kind}": tensor for kind, tensor in module.tensors.items()}
        weights[name] = module.dense
    (folder / "model.safetensors").unlink()
    save_file(files, folder / file)
    if state:
        values = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": recipe.settings()}), "utf-8")
    return weights
