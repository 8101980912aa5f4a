"""storage.hub: a folder wins, a hub id is fetched, anything else is an error that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavakit.errors import CheckpointError
from llavakit.storage.hub import resolve_model


def test_folders_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize("model", ["nothing", "../up", "/no/where", "a/b/c", "owner/", "~/x", "https://hub/a", "a b/c"])
def test_what_is_neither_folder_nor_id_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        resolve_model(model)


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")


PROBE = """
from llavakit.errors import CheckpointError
from llavakit.storage.hub import resolve_model
for model in ("owner/name", "double..dot/name"):
    try:
        resolve_model(model)
    except CheckpointError as error:
        print(error)
"""


def test_hub_out_of_reach(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "cannot be reached" in first
    assert "allows no such name" in second
