"""What bitsandbytes makes of some weights, written down as digests.

nf4_golden.json was written by `python tests/unit/ops/nf4_golden.py`, with bitsandbytes 0.50.2 and torch 2.13.0 in an environment of
their own. Its kernels for any device are asked, which do what those for CUDA do. Those for CPUs take the neighbour of the nearest level for
one scale in about 700, and make some weights whose rows are no whole blocks dense with other scales than those that they were stored with.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parent / "nf4_golden.json"
SHAPES = ((1, 1), (3, 7), (5, 96), (9, 63), (48, 96), (64, 256), (255, 65), (257, 64), (1, 16384), (300, 130))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases() -> Iterator[tuple[str, Tensor]]:
    """Return weights by name: whole numbers up to 128 over 4096, so that every order of summing their scales gives one mean."""
    for rows, columns in SHAPES:
        numbers = torch.arange(rows * columns).view(rows, columns)
        weight_OI = ((numbers * 7919 + 77) % 257 - 128) // (1 + numbers[:, :1] * 31 % 11)
        for dtype in DTYPES:
            yield f"{rows}x{columns} {str(dtype).removeprefix('torch.')}", (weight_OI / 4096).to(dtype)


def digest(tensor: Tensor) -> str:
    """Return a short sum of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def record(weight_OI: Tensor) -> dict[str, str]:
    """Return the digests of what bitsandbytes makes of a weight."""
    from bitsandbytes.functional import create_dynamic_map  # type: ignore[import-not-found]  # not among the packages of the tests

    def run(name: str, *arguments: object) -> tuple[Tensor, ...]:
        kernel = getattr(torch.ops.bitsandbytes, name).default._op_dk
        found = kernel(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)
        return found if isinstance(found, tuple) else (found,)

    levels, shape = create_dynamic_map(), list(weight_OI.shape)
    codes, scales = run("quantize_4bit", weight_OI, 64, "nf4", torch.uint8)
    offset = scales.mean()
    scale_codes, nested = run("quantize_blockwise", scales - offset, levels, 256)
    nested = nested.where(nested > 1e-38, 0.0)  # the scale of zeros, which is 1e-38 where they are no whole block
    (nested_scales,) = run("dequantize_blockwise", scale_codes, nested, levels, 256, torch.float32)
    (dense,) = run("dequantize_4bit", codes, scales, 64, "nf4", shape, weight_OI.dtype)
    (dense_double,) = run("dequantize_4bit", codes, nested_scales + offset, 64, "nf4", shape, weight_OI.dtype)
    tensors = {"codes": codes, "scales": scales, "scale codes": scale_codes, "nested": nested, "offset": offset[None]}
    return {name: digest(tensor) for name, tensor in {**tensors, "dense": dense, "dense double": dense_double}.items()}


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: record(weight_OI) for name, weight_OI in cases()}, indent=1) + "\n")
