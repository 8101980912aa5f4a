"""llava reproduce from nothing to the report, at a thousandth of its length: all stages, kept when done, resumed when killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import write_result
from llavakit.checkpoint.load import load_core
from llavakit.cli.main import run
from llavakit.storage.folder import read_manifest

NUM_KILLS = 20
SMALL = ("--scale", "0.001", "--scenes", "2")
STAGES = ("precision", "vocabulary", "tower", "language", "align", "instruct", "export", "examine")
COMMAND = [sys.executable, "-c", "import sys; from llavakit.cli.main import main; sys.argv[0] = 'llava'; main()", "reproduce"]


def digests(folder: Path) -> dict[str, list[str]]:
    """SHA-256 of each stage's weights or tokenizer; metrics hold seconds and differ."""
    made = {stage: read_manifest(folder / stage) or {} for stage in STAGES[1:-1]}
    return {
        stage: [str(entry.sha256) for name, entry in files.items() if name.endswith((".safetensors", ".model"))]
        for stage, files in made.items()
    }


def test_reproduce_makes_a_model_and_a_report_and_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", str(tmp_path), *SMALL]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'examine' / 'report.html'}\n"
    first = digests(tmp_path)
    assert all(first.values())
    core = load_core(tmp_path / "export")
    assert sum(weight.numel() for weight in core.parameters()) <= 7_000_000
    scores = json.loads((tmp_path / "examine" / "scores.json").read_text())
    assert set(scores["accuracy"]) == {"plain", "held_out", "jpeg", "wide", "shuffled", "prior"}
    asked = [row["all"]["total"] for name, row in scores["accuracy"].items() if name != "prior"]
    assert len((tmp_path / "examine" / "replies.jsonl").read_text().splitlines()) == sum(asked)
    report = (tmp_path / "examine" / "report.html").read_text()
    assert report.count("<img") == 4 + 6  # loss curves and pictures
    (tmp_path / "instruct" / "manifest.json").unlink()  # as if it had never been finished
    assert run(["reproduce", str(tmp_path), *SMALL]) == 0
    assert digests(tmp_path) == first
    assert {path.name for path in tmp_path.iterdir()} == {*STAGES, "stages.jsonl"}


@pytest.mark.soak
def test_a_reproduction_killed_at_random_moments_gives_the_same_bits(tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*COMMAND, str(folder), *SMALL], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait(600) == 0
    whole_s = time.monotonic() - began
    rng = random.Random(0)
    for _ in range(NUM_KILLS):
        process = start(tmp_path / "cut")
        time.sleep(rng.uniform(0.0, 0.4) * whole_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert start(tmp_path / "cut").wait(600) == 0
    has_same_bits = digests(tmp_path / "cut") == digests(tmp_path / "whole")
    write_result("reproduce_kills", "make soak", {"num_kills": NUM_KILLS, "same_bits": has_same_bits})
    assert has_same_bits
