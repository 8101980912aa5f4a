"""Saves: everything comes back bit by bit, damage falls back, other runs are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavakit.errors import TrainingError
from llavakit.training.config import OptimConfig
from llavakit.training.optim import build_optimizers
from llavakit.training.state import RunState, Saves, run_lock
from tests.toy_run import toy_core, toy_source

IDENTITY = {"steps": 5, "optim": {"lr": 0.1}}


def fresh_state() -> RunState:
    parameters = dict(toy_core().named_parameters())
    return RunState(parameters, build_optimizers(parameters, OptimConfig(lr=0.1, name="muon")))


def trained_state(*, step: int) -> RunState:
    core = toy_core()
    parameters = dict(core.named_parameters())
    state = RunState(parameters, build_optimizers(parameters, OptimConfig(lr=0.1, name="muon")))
    for number in range(step):
        core.loss_packed(toy_source().batch(number).batch).sum.backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state.step, state.num_skipped, state.num_skipped_in_row, state.batch_digest = step, 2, 1, "abc"
    return state


def saves(folder: Path, identity: dict[str, object] | None = None) -> Saves:
    return Saves(folder, identity=IDENTITY if identity is None else identity, keep_last=2)


def damage(save: Path) -> None:
    path = save / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_restored_state_equals_the_saved_one_bit_by_bit(tmp_path: Path) -> None:
    state = trained_state(step=2)
    saves(tmp_path).write(state)
    expected, values = {name: tensor.clone() for name, tensor in state.tensors().items()}, state.values()
    other = fresh_state()
    assert saves(tmp_path).restore_newest(other)
    restored = other.tensors()
    assert {"optimizer/exp_avg/lm_head.weight", "optimizer/momentum_buffer/model.layers.0.mlp.up_proj.weight"} <= set(restored)
    assert set(restored) == set(expected)
    assert all(torch.equal(restored[name], expected[name]) and restored[name].dtype == expected[name].dtype for name in expected)
    assert other.values() == values


def test_no_saves_is_a_fresh_start(tmp_path: Path) -> None:
    assert not saves(tmp_path).restore_newest(fresh_state())


def test_only_the_newest_saves_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saves(tmp_path).write(trained_state(step=step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_damaged_save_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        saves(tmp_path).write(trained_state(step=step))
    damage(tmp_path / "step-00000002")
    state = fresh_state()
    with caplog.at_level("WARNING"):
        assert saves(tmp_path).restore_newest(state)
    assert state.step == 1
    assert "step-00000002 is damaged" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    saves(tmp_path).write(trained_state(step=1))
    damage(tmp_path / "step-00000001")
    with pytest.raises(TrainingError, match="all 1 saves"):
        saves(tmp_path).restore_newest(fresh_state())


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    saves(tmp_path).write(trained_state(step=1))
    with pytest.raises(TrainingError, match=r"optim\.lr was 0\.1, is 0\.2"):
        saves(tmp_path, {"steps": 5, "optim": {"lr": 0.2}}).restore_newest(fresh_state())


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    attempt = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-S", "-c", attempt, str(tmp_path / "lock")]
    with run_lock(tmp_path):
        assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0
    assert subprocess.run(command, check=False).returncode == 0
    with run_lock(tmp_path):
        pass
