"""Stages: done once, run again when what they depend on changes."""

import json
import time
from pathlib import Path

import pytest

from llavakit.reproduce.stages import Stage, StageContext, run_stages


class Recorder:
    def __init__(self) -> None:
        self.ran: list[str] = []

    def stage(self, name: str, inputs: tuple[str, ...] = (), setting: int = 0, *, fails: bool = False) -> Stage:
        def run(context: StageContext) -> None:
            self.ran.append(name)
            if fails:
                raise RuntimeError(name)
            texts = [(path / "text").read_text() for path in context.inputs.values()]
            (context.out / "text").write_text("+".join([*texts, f"{name}{setting}"]))

        return Stage(name, {"setting": setting}, inputs, run)


def test_finished_stages_are_kept(tmp_path: Path) -> None:
    recorder = Recorder()
    stages = [recorder.stage("a"), recorder.stage("b", ("a",))]
    run_stages(stages, tmp_path)
    done = run_stages(stages, tmp_path)
    assert recorder.ran == ["a", "b"]
    assert (done["b"] / "text").read_text() == "a0+b0"


def test_a_changed_setting_runs_what_follows(tmp_path: Path) -> None:
    recorder = Recorder()
    run_stages([recorder.stage("a"), recorder.stage("b"), recorder.stage("c", ("a",))], tmp_path)
    done = run_stages([recorder.stage("a", setting=1), recorder.stage("b"), recorder.stage("c", ("a",))], tmp_path)
    assert recorder.ran == ["a", "b", "c", "a", "c"]
    assert (done["c"] / "text").read_text() == "a1+c0"


def test_a_failed_stage_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError):
        run_stages([recorder.stage("a", fails=True)], tmp_path)
    assert not (tmp_path / "a").exists()
    run_stages([recorder.stage("a")], tmp_path)
    assert recorder.ran == ["a", "a"]


def test_a_stages_time_counts_the_tries_that_were_cut_off(tmp_path: Path) -> None:
    def sleep(context: StageContext) -> None:
        time.sleep(0.2)
        (context.out / "text").write_text("done")
        if not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt

    stage = Stage("a", {}, (), sleep)
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage], tmp_path)
    run_stages([stage], tmp_path)
    (line,) = (tmp_path / "stages.jsonl").read_text("utf-8").splitlines()
    values = json.loads(line)
    assert (values["stage"], values["tries"]) == ("a", 2)
    assert 0.4 <= values["seconds"] < 60
