"""How much memory loading a 7B checkpoint takes: peak resident memory against the size of the model.

Writes a random checkpoint in LLaVA-1.5-7B's shape (bfloat16, 14.1 GB, removed afterwards), loads it in new processes, once as
it is and once cast to float16, and reads the kernel's high-water mark (VmHWM). The limit is the model in its target dtype
plus 1 GB. Run: python -m benchmarks.load_7b [--dir FOLDER_WITH_15_GB] [--shrink 1]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import write_result
from llavakit.checkpoint.load import load_core
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.storage.tensors import write_tensors

ALLOWANCE_BYTES = 1_000_000_000
SHARD_BYTES = 5_000_000_000
TARGETS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    """Write, load twice, record; return 1 when a peak is above the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--shrink", type=int, default=1, help="divide the number of layers, to try the script out")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help="what the measured process does")
    options = parser.parse_args()
    if options.load is not None:
        folder, dtype = options.load
        print(json.dumps(measure_load(Path(folder), TARGETS[dtype])))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="llavakit-7b-") as name:
        num_parameters = write_checkpoint(Path(name), shape_of_7b(options.shrink))
        rows = [run_child(Path(name), dtype) for dtype in TARGETS]
    is_within = all(row["peak_bytes"] <= row["limit_bytes"] for row in rows)
    values = {"parameters": num_parameters, "stored_dtype": "bfloat16", "is_within_limit": is_within, "rows": rows}
    if options.shrink == 1:
        write_result("load_7b", "python -m benchmarks.load_7b", values)
    else:
        print(json.dumps(values, indent=2))
    return 0 if is_within else 1


def shape_of_7b(shrink: int) -> LlavaConfig:
    """Describe llava-1.5-7b-hf, with fewer decoder layers when shrunk."""
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, num_hidden_layers=32 // shrink)
    return LlavaConfig(text_config=text, pad_token_id=32001)


def write_checkpoint(folder: Path, config: LlavaConfig) -> int:
    """Stream random weights into shards; return the number of parameters."""
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlavaCore(config).named_parameters()}
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_tensors(folder, specs, random_tensors(shapes), max_shard_bytes=SHARD_BYTES)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Cut every tensor from one random pool: drawing seven thousand million numbers would only take longer."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        yield name, pool.repeat(-(-size // pool.numel()))[:size].view(shape)


def run_child(folder: Path, dtype: str) -> dict[str, Any]:
    """Load in a new process, whose high-water mark starts at nothing."""
    command = [sys.executable, "-m", "benchmarks.load_7b", "--load", str(folder), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: dict[str, Any] = {"target_dtype": dtype, **json.loads(output)}
    return row


def measure_load(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the core and report bytes and seconds."""
    before = high_water_bytes()
    start = time.perf_counter()
    core = load_core(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    model_bytes = sum(weight.nbytes for weight in core.parameters())
    return {
        "model_bytes": model_bytes,
        "limit_bytes": model_bytes + ALLOWANCE_BYTES,
        "peak_bytes": high_water_bytes(),
        "peak_before_load_bytes": before,
        "load_s": round(seconds, 1),
    }


def high_water_bytes() -> int:
    """Read the most memory that this process has had resident (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
