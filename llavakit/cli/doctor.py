"""llava doctor: what this machine can run."""

from __future__ import annotations

import json as json_format
import os
import platform
import shutil
import sys
from importlib.metadata import version
from typing import Any

__all__ = ["doctor"]

_PACKAGES = ("llavakit", "torch", "safetensors", "tokenizers", "sentencepiece", "pillow", "numpy", "huggingface_hub")
_GIB = 1 << 30


def doctor(*, json: bool = False) -> None:
    """Show device, memory, compiler and versions, and which model sizes fit.

    Parameters
    ----------
    json
        Print one JSON object instead of lines.
    """
    import torch

    from llavakit.ops.cpu.library import load_kernels
    from llavakit.ops.memory import free_memory

    has_cuda = torch.cuda.is_available()
    memory = free_memory(torch.device("cuda" if has_cuda else "cpu"))
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if has_cuda else "cpu",
        "free memory": f"{memory / _GIB:.1f} GiB",
        "compiler": shutil.which("cc") or "none",
        "cpu kernels": "torch's own" if load_kernels() is None else "ours, compiled",
        **{name: version(name) for name in _PACKAGES},
        "will run": _fitting(memory),
    }
    if json:
        sys.stdout.write(json_format.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{name:16} {value}\n" for name, value in facts.items()))


def _fitting(memory: int) -> str:
    """Name the model sizes whose bfloat16 weights and a cache of 4,096 tokens fit."""
    sizes = {"the miniature": 0.05, "LLaVA-1.5 7B": 14.1 + 2.1, "LLaVA-1.5 13B": 26.7 + 3.4}
    fitting = [name for name, size in sizes.items() if size * 1e9 < memory]
    return f"{', '.join(fitting) or 'nothing'} (bfloat16)"
