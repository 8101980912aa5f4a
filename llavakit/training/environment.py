"""What a run ran on, for whoever reads its folder later.

Owns: environment_facts.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llavakit import __version__

__all__ = ["environment_facts"]

_TIMEOUT_S = 10


def environment_facts(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Name versions, machine, device, and the revision of this package where it lies in a repository."""
    return {
        "llavakit": __version__,
        "revision": _revision(Path(__file__).parent),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "processes": num_processes,
        "threads": torch.get_num_threads(),
    }


def _revision(folder: Path) -> str | None:
    """Return the commit that a folder's repository is at, marked where files differ from it; None where there is none."""
    answers = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    commit, changes = answers
    return f"{commit} with changes" if changes else commit
