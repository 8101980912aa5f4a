"""The example scripts run, and show what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = {
    "finetune_lora": "with:    A picture of things",
    "finetune_qlora": "A picture of things",
    "preference_dpo": "after: the better answer has",
}


def test_every_script_is_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SHOWN.keys()
    assert all(len(path.read_text().splitlines()) <= 60 for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SHOWN)
def test_scripts_run(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(tmp_path / "run"), "--steps", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SHOWN[name] in done.stdout
