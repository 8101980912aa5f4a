"""Two ranks over gloo train what one process trains, and take over each other's saves. Every launch has a watchdog: a hang is a failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llavakit.training.parallel import Alone
from tests.distributed.toy_ranks import STEPS, run

ROOT = Path(__file__).parents[2]
_WATCHDOG_S = 120


def launch(run_dir: Path, *arguments: str, restarts: int = 0) -> list[float]:
    """Run the toy on two ranks; returns the losses of this call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["-m", "tests.distributed.toy_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(run_dir.parent)}
    process = subprocess.Popen(
        [*command, str(run_dir), *arguments], cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        _, complaints = process.communicate(timeout=_WATCHDOG_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks too that outlived their launcher
        process.communicate()
    assert process.returncode == 0, complaints[-3000:]
    losses: list[float] = json.loads((run_dir / "losses.json").read_text())
    return losses


def test_two_ranks_have_the_losses_of_one_process_and_hand_saves_over(tmp_path: Path) -> None:
    expected = run(tmp_path / "alone", Alone())
    first = launch(tmp_path / "run", "--stop-at", "7")
    assert len(first) == 7
    second = run(tmp_path / "run", Alone(), stop_at=6)
    assert len(second) == 6
    third = launch(tmp_path / "run")
    found = [*first, *second, *third]
    assert len(found) == STEPS
    # Three batches a step do not divide by two ranks, and most hold no picture for the projector.
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["everything", "packed"])
def test_a_trained_tower_and_packed_weights_are_sharded_too(tmp_path: Path, kind: str) -> None:
    expected = run(tmp_path / "alone", Alone(), kind=kind)
    replicated = ("--shard-ranks", "1") if kind == "everything" else ()
    assert launch(tmp_path / "run", "--kind", kind, *replicated) == pytest.approx(expected, rel=1e-6)


def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    expected = run(tmp_path / "alone", Alone())
    found = launch(tmp_path / "run", "--die-at", "9", restarts=1)
    # The ninth step was never finished, so what follows is the losses from there on.
    assert found == pytest.approx(expected[8:], rel=1e-6)
