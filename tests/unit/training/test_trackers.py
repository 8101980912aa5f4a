"""Trackers: every step reaches them, they are closed with the run, and one that is not installed is named."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llavakit.errors import ConfigError
from llavakit.training.objectives import PackedLoss
from llavakit.training.trackers import TRACKERS, Tracked, open_trackers
from llavakit.training.trainer import Trainer
from tests.toy_run import Kept, toy_config, toy_core, toy_source


def test_every_step_reaches_the_trackers_and_the_run_closes_them(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    closed: list[str] = []
    kept = Kept()
    reporter = Tracked(kept, [(lambda step, values: told.append((step, dict(values))), lambda: closed.append("closed"))])
    Trainer(toy_core(), PackedLoss("float32"), toy_source(), toy_config(steps=3), reporter, tmp_path).run()
    assert [step for step, _ in told] == [0, 1, 2]
    assert [values["loss"] for _, values in told] == kept.losses
    assert "step" not in told[0][1]
    assert closed == ["closed"]
    assert kept.events == ["begin 0/3", "sync", "close"]


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        open_trackers([name], tmp_path, {})


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    fake = ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or Run()  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ((write, close),) = open_trackers(["wandb"], tmp_path / "run", {"steps": 3})
    write(4, {"loss": 1.0})
    close()
    assert calls == [
        {"dir": str(tmp_path / "run"), "id": "run", "resume": "allow", "config": {"steps": 3}},
        (4, {"loss": 1.0}),
        "finish",
    ]
