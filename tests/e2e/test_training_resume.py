"""kill -9 at any moment: the same command continues with the same bits."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import write_result
from llavakit.storage.tensors import TensorFolder
from llavakit.training.config import OptimConfig, SaveConfig
from llavakit.training.trainer import train
from tests.toy_run import toy_config, toy_core, toy_source

STEPS = 30


def run_once(run_dir: Path, every_s: float) -> None:
    torch.set_num_threads(1)
    random.seed(0)  # these states are part of a save, and fresh ones differ from process to process
    np.random.seed(0)
    optim = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, clip_norm=1.0, schedule="wsd", warmup_steps=4)
    config = toy_config(steps=STEPS, optim=optim, workers=1, save=SaveConfig(every_s=every_s), compute_dtype="bfloat16")
    train(toy_core(), toy_source(), config, run_dir)


def start(run_dir: Path, every_s: float) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run_once, args=(run_dir, every_s))
    process.start()
    return process


def finish(run_dir: Path) -> None:
    process = start(run_dir, every_s=0.05)
    process.join(60)
    assert process.exitcode == 0


def num_lines(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def kill_at(run_dir: Path, step: int, extra_s: float, every_s: float) -> None:
    """Kill a run a moment after it has recorded so many steps; it may have finished by then."""
    process = start(run_dir, every_s)
    while num_lines(run_dir / "metrics.jsonl") < step and process.is_alive():
        time.sleep(0.0005)
    time.sleep(extra_s)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def check_kills(tmp_path: Path, kills: int, seed: int) -> None:
    finish(tmp_path / "whole")
    rng = random.Random(seed)
    points = sorted(rng.randrange(STEPS) for _ in range(kills))
    for step in points:
        kill_at(tmp_path / "cut", step, rng.random() * 0.02, rng.choice((0.0, 0.02)))
    finish(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole"), f"seed {seed}, killed at {points}"
    last = f"step-{STEPS:08d}"
    with TensorFolder(tmp_path / "whole" / last) as whole, TensorFolder(tmp_path / "cut" / last) as cut:
        names = list(whole.in_file_order())
        assert names == list(cut.in_file_order())
        different = [name for name in names if not torch.equal(whole.read(name), cut.read(name))]
        assert different == [], f"seed {seed}, killed at {points}"
    assert not list((tmp_path / "cut").glob(".*.tmp-*"))


def test_a_run_killed_three_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=3, seed=int.from_bytes(os.urandom(4)))


@pytest.mark.soak
def test_runs_killed_ten_times_end_with_the_same_bits(tmp_path: Path) -> None:
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        check_kills(tmp_path / str(seed), kills=10, seed=seed)
    write_result("training_kills", "make soak", {"num_runs": 5, "kills_per_run": 10})
