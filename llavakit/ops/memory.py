"""How much memory is free.

Owns: free_memory.
"""

from __future__ import annotations

import os

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device can give, on a CPU without swapping and within the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_memory(), _group_memory())


def _system_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_memory() -> int:
    """Return what a container's limit leaves; without one, more than there is. Page cache counts as used, so this is careful."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            return max(0, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 62
