"""Servers and their clients, each in a process of its own, as users run them: nothing of one shares threads or a lock with another."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["SCRIPTS", "ask", "served", "watched"]

SCRIPTS = Path(sys.executable).parent
_START_S = 180.0
_CLIENTS = [sys.executable, "-m", "benchmarks.serving_clients"]


@contextlib.contextmanager
def served(command: Callable[[int], list[str]]) -> Iterator[int]:
    """Run a server on a free port until the block is left. Raises: RuntimeError where it does not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        _await(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} did not start")


def ask(port: int, bodies: Sequence[Any]) -> Any:
    """Let so many clients ask at once."""
    done = subprocess.run(_CLIENTS, input=json.dumps({"port": port, "bodies": bodies}), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@contextlib.contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """Ask /health again and again, 50 times a second whatever became of those before; the seconds of each are there after the block."""
    seconds: list[float] = []
    process = subprocess.Popen(_CLIENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps({"port": port, "watch": True}) + "\n")
    process.stdin.flush()
    try:
        yield seconds
    finally:
        found, _ = process.communicate("\n")
        seconds += json.loads(found)["health"]
