"""Damaged pictures end in a picture or our error, quickly and in bounded memory: 200 always, 10,000 in the soak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import write_result
from tests.soak.mutants import decode_mutants

ROOT = Path(__file__).parents[2]
MAX_GROWTH_BYTES = 400 << 20  # a picture of 16.8 megapixels, its RGBA layer and the white behind it


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged EXIF
def test_200_mutants() -> None:
    outcome = decode_mutants(first=0, count=200)
    assert min(outcome.num_pictures, outcome.num_refused) > 10
    assert outcome.slowest_s < 5
    assert outcome.peak_growth_bytes < MAX_GROWTH_BYTES


@pytest.mark.soak
def test_10_000_mutants() -> None:
    command = [sys.executable, "-m", "tests.soak.mutants", "10000"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=1800).stdout
    outcome = json.loads(output)
    write_result("image_mutants", "make soak", outcome)
    assert outcome["num_files"] == 10_000
    assert outcome["slowest_s"] < 5
    assert outcome["peak_growth_bytes"] < MAX_GROWTH_BYTES
