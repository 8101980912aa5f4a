"""How fast checkpoints convert, and in how much memory.

Speed: a random LLaVA-1.5-7B (float16, 14.1 GB, original LLaVA's layout with the tower in it; safetensors, then pickles) becomes the
llava-hf layout in bfloat16, against `cp -r && sync` of the same files, in turn and, where the system lets us, from an empty page cache.
All wait some seconds after that: a virtual machine gives freed memory back meanwhile, and whoever starts first would have it cheaper.
Memory: the kernel's high-water mark (VmHWM, mapped pages included) of each conversion; then of Meta's layout with 70B's 8 files and
proportions at a fraction of its width, for two widths and two numbers of layers: it follows the largest tensor, not the model.
Peer: transformers 4.37's convert_llama_weights_to_hf.py, the last that has it, in an environment of its own.
Run: python -m benchmarks.convert [--dir FOLDER_WITH_45_GB] [--shrink 1] [--rounds 3] [--peer-python PYTHON]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import write_result
from benchmarks.load_7b import high_water_bytes, random_tensors, shape_of_7b
from llavakit.checkpoint.layouts import original_layout
from llavakit.engine.llm import MINIATURE
from llavakit.model.llava import LlavaCore
from llavakit.storage.tensors import write_tensors

SHARD_BYTES = 5_000_000_000
LIMIT_BYTES = 1_500_000_000
WANTED_SHARE = 0.7
WAIT_S = 5
KINDS = ("safetensors", "pickle")
FRACTIONS = ((8, 20), (8, 80), (4, 20), (4, 80))
"""Of 70B's width, and the number of layers."""
NUM_ROWS = 768
"""Of the vocabulary: the miniature's tokenizer is put beside the files."""
PEER_FRACTION = (8, 80)
PEER_MODULE = "transformers.models.llama.convert_llama_weights_to_hf"
PEER = """
import os, sys, time
from importlib import import_module
from pathlib import Path
sys.argv = ["convert", "--input_dir", {source!r}, "--model_size", "70B", "--output_dir", {destination!r}]
module = import_module({module!r})
start = time.perf_counter()
module.main()
os.sync()
print("SECONDS", time.perf_counter() - start)
lines = Path("/proc/self/status").read_text().splitlines()
print("PEAK", int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024)
"""


def main() -> int:
    """Write, convert in turns, record; return 1 where a figure misses what is wanted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--shrink", type=int, default=1, help="divide the number of layers, to try the script out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="a Python with transformers 4.37 and torch")
    parser.add_argument("--convert", nargs=3, metavar=("SOURCE", "DESTINATION", "HOW"), help="what a measured process does")
    options = parser.parse_args()
    if options.convert is not None:
        source, destination, how = options.convert
        print(json.dumps(measure(Path(source), Path(destination), json.loads(how))))
        return 0
    rows = [speed(options.dir, kind, options.shrink, options.rounds) for kind in KINDS]
    sizes = [memory(options.dir, fraction, layers, options.peer_python) for fraction, layers in FRACTIONS]
    is_met = all(row["share_of_cp"] >= WANTED_SHARE and row["peak_bytes"] <= LIMIT_BYTES for row in rows)
    values = {"is_met": is_met, "wanted_share_of_cp": WANTED_SHARE, "limit_bytes": LIMIT_BYTES, "speed": rows, "proportions_of_70b": sizes}
    if options.shrink == 1:
        write_result("convert", "python -m benchmarks.convert --peer-python PYTHON", values)
    else:
        print(json.dumps(values, indent=2))
    return 0 if is_met else 1


def speed(parent: Path, kind: str, shrink: int, rounds: int) -> dict[str, Any]:
    """Convert and copy in turn."""
    seconds: dict[str, list[float]] = {"convert": [], "cp": [], "convert with hashes": []}
    peaks: list[int] = []
    with tempfile.TemporaryDirectory(dir=parent, prefix="llavakit-convert-") as name:
        source, destination = Path(name) / "source", Path(name) / "destination"
        num_bytes = write_original_7b(source, kind, shrink)
        is_cold = False
        for number in range(rounds):
            for what in sorted(seconds, reverse=number % 2 == 1):
                is_cold = empty_page_cache()
                if what == "cp":
                    start = time.perf_counter()
                    subprocess.run(["bash", "-c", f"cp -r {source} {destination} && sync"], check=True)
                    seconds[what].append(time.perf_counter() - start)
                else:
                    row = run_child(source, destination, {"hashes": "hashes" in what, "dtype": "bfloat16"})
                    seconds[what].append(row["seconds"])
                    peaks.append(row["peak_bytes"])
                shutil.rmtree(destination)
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    ratios = {what: statistics.median(c / v for c, v in zip(seconds["cp"], values, strict=True)) for what, values in seconds.items()}
    return {
        "source": f"original LLaVA-1.5-7B, float16, {kind}",
        "bytes": num_bytes,
        "is_from_empty_page_cache": is_cold,
        "seconds": {what: round(value, 1) for what, value in medians.items()},
        "rounds": {what: [round(value, 1) for value in values] for what, values in seconds.items()},
        "share_of_cp": round(ratios["convert"], 3),
        "share_of_cp_with_hashes": round(ratios["convert with hashes"], 3),
        "peak_bytes": max(peaks),
    }


def write_original_7b(folder: Path, kind: str, shrink: int) -> int:
    """Write random weights in original LLaVA's names; return the bytes of all files."""
    folder.mkdir()
    config = shape_of_7b(shrink)
    config.restructure(text_config=config.text_config)
    layout = original_layout(config.projector_depth)
    with torch.device("meta"):
        shapes = {layout.source(name) or name: tuple(weight.shape) for name, weight in LlavaCore(config).named_parameters()}
    values = {
        **config.to_original_dict(), "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024, "image_aspect_ratio": "pad", "torch_dtype": "float16", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = ((name, tensor.half()) for name, tensor in random_tensors(shapes))
    if kind == "safetensors":
        write_tensors(folder, {name: (torch.float16, shape) for name, shape in shapes.items()}, tensors, max_shard_bytes=SHARD_BYTES)
    else:
        write_pickles(folder, tensors)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        if (MINIATURE / name).is_file():
            shutil.copyfile(MINIATURE / name, folder / name)
    return sum(path.stat().st_size for path in folder.iterdir())


def write_pickles(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write pytorch_model-*.bin and their index, as torch.save does."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = 1

    def write() -> None:
        nonlocal number
        path = folder / f"pytorch_model-{number:05d}.bin"
        torch.save(shard, path)
        weight_map.update(dict.fromkeys(shard, path.name))
        shard.clear()
        number += 1

    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor.clone()
    write()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def empty_page_cache() -> bool:
    """Write out what is pending and forget what was read, where the system lets us, and wait."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
        return True
    except OSError:
        return False
    finally:
        time.sleep(WAIT_S)


@dataclass(frozen=True, slots=True)
class Proportions:
    """Llama-2-70B with a fraction of its width."""

    fraction: int
    num_layers: int
    num_files: int = 8

    @property
    def params(self) -> dict[str, Any]:
        """What params.json says."""
        return {
            "dim": 8192 // self.fraction, "multiple_of": 4096 // self.fraction, "ffn_dim_multiplier": 1.3, "n_heads": 64,
            "n_kv_heads": 8, "n_layers": self.num_layers, "norm_eps": 1e-5, "vocab_size": -1,
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Whole shapes by Meta's names, and along which axis the files cut them."""
        dim, ffn, kv, rows = 8192 // self.fraction, 28672 // self.fraction, 1024 // self.fraction, NUM_ROWS
        shapes: dict[str, tuple[tuple[int, ...], int | None]] = {"tok_embeddings.weight": ((rows, dim), 1)}
        for layer in range(self.num_layers):
            parts = {
                "attention.wq": ((dim, dim), 0), "attention.wk": ((kv, dim), 0), "attention.wv": ((kv, dim), 0),
                "attention.wo": ((dim, dim), 1), "feed_forward.w1": ((ffn, dim), 0), "feed_forward.w2": ((dim, ffn), 1),
                "feed_forward.w3": ((ffn, dim), 0), "attention_norm": ((dim,), None), "ffn_norm": ((dim,), None),
            }  # fmt: skip
            shapes |= {f"layers.{layer}.{name}.weight": part for name, part in parts.items()}
        return {**shapes, "norm.weight": ((dim,), None), "output.weight": ((rows, dim), 0)}


def memory(parent: Path, fraction: int, num_layers: int, peer_python: str | None) -> dict[str, Any]:
    """Convert Meta's layout in 70B's proportions."""
    model = Proportions(fraction, num_layers)
    with tempfile.TemporaryDirectory(dir=parent, prefix="llavakit-convert-") as name:
        source, destination = Path(name) / "70B", Path(name) / "destination"
        num_bytes = write_meta(source, model)
        row = run_child(source, destination, {"hashes": False, "dtype": None})
        result = {
            "width": 8192 // fraction,
            "layers": num_layers,
            "files": model.num_files,
            "bytes": num_bytes,
            "largest_tensor_bytes": max(2 * torch.Size(shape).numel() for shape, _ in model.shapes().values()),
            "peak_above_imports_bytes": row["peak_bytes"] - row["peak_before_bytes"],
            "peak_bytes": row["peak_bytes"],
            "seconds": row["seconds"],
        }
        if peer_python is not None and (fraction, num_layers) == PEER_FRACTION:
            shutil.rmtree(destination)
            result["peer"] = run_peer(peer_python, source, destination)
        return result


def write_meta(folder: Path, model: Proportions) -> int:
    """Write params.json, consolidated.*.pth and a tokenizer; return the bytes of the weights."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(model.params), encoding="utf-8")
    shutil.copyfile(MINIATURE / "tokenizer.model", folder / "tokenizer.model")
    shutil.copyfile(MINIATURE / "tokenizer.model", folder.parent / "tokenizer.model")
    for rank in range(model.num_files):
        parts = {name: part_shape(shape, axis, model.num_files) for name, (shape, axis) in model.shapes().items()}
        torch.save({name: tensor.clone() for name, tensor in halves(parts)}, folder / f"consolidated.{rank:02d}.pth")
    return sum(path.stat().st_size for path in folder.glob("*.pth"))


def halves(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Draw float16 tensors, as Meta stores them."""
    return ((name, tensor.half()) for name, tensor in random_tensors(shapes))


def part_shape(shape: tuple[int, ...], axis: int | None, num_files: int) -> tuple[int, ...]:
    """Return the part that one file has."""
    return shape if axis is None else tuple(size // num_files if i == axis else size for i, size in enumerate(shape))


def run_child(source: Path, destination: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """Convert in a new process, whose high-water mark starts at nothing."""
    command = [sys.executable, "-m", "benchmarks.convert", "--convert", str(source), str(destination), json.dumps(how)]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row


def run_peer(python: str, source: Path, destination: Path) -> dict[str, Any]:
    """Run transformers' script on the same files."""
    code = PEER.format(source=str(source.parent), destination=str(destination), module=PEER_MODULE)
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1][-300:]}
    seconds, peak = re.findall(r"^(?:SECONDS|PEAK) ([\d.]+)$", done.stdout, re.MULTILINE)
    return {"seconds": round(float(seconds), 1), "peak_bytes": int(peak)}


def measure(source: Path, destination: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """Convert and report bytes and seconds; imports come before the clock, as cp's do."""
    from llavakit.checkpoint.convert import Conversion, convert
    from llavakit.checkpoint.parts import Sources

    dtype = None if how["dtype"] is None else getattr(torch, how["dtype"])
    before = high_water_bytes()
    start = time.perf_counter()
    convert(source, destination, Conversion(hashes=how["hashes"], dtype=dtype, sources=Sources(allow_pickle=True)))
    os.sync()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "peak_bytes": high_water_bytes(), "peak_before_bytes": before}


if __name__ == "__main__":
    sys.exit(main())
