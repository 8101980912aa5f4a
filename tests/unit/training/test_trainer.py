"""The loop: it learns, its split into microbatches changes nothing, and it stops, skips and refuses as it says."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from llavakit.errors import ConfigError, TrainingError
from llavakit.model.llava import LossTerms
from llavakit.training.config import LoopConfig, OptimConfig, SaveConfig
from llavakit.training.objectives import PackedLoss
from llavakit.training.trainer import Trainer, train
from tests.toy_run import Kept, toy_config, toy_core, toy_source, toy_trainer


class Hooked:
    """The usual objective, with something done to each call."""

    entries: ClassVar[tuple[str, ...]] = ("loss_packed",)

    def __init__(self, hook: Callable[[int, LossTerms], LossTerms]) -> None:
        self.hook, self.num_calls = hook, 0

    def loss(self, model: Any, batch: Any) -> LossTerms:
        terms = PackedLoss("float32").loss(model, batch)
        self.num_calls += 1
        return self.hook(self.num_calls - 1, terms)


def run_hooked(run_dir: Path, config: LoopConfig, hook: Callable[[int, LossTerms], LossTerms]) -> tuple[Trainer, Kept]:
    reporter = Kept()
    return Trainer(toy_core(), Hooked(hook), toy_source(), config, reporter, run_dir), reporter


def stop_after(step: int) -> Callable[[int, LossTerms], LossTerms]:
    def hook(call: int, terms: LossTerms) -> LossTerms:
        if call == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    return hook


def spoil(*steps: int) -> Callable[[int, LossTerms], LossTerms]:
    return lambda call, terms: LossTerms(terms.sum * math.nan, terms.weight, terms.metrics) if call in steps else terms


def test_the_toy_is_learnt_and_the_run_folder_is_complete(tmp_path: Path) -> None:
    config = toy_config(steps=60, workers=1, optim=OptimConfig(lr=2e-2, schedule="wsd"))
    result = train(toy_core(), toy_source(samples_per_batch=16), config, tmp_path)
    assert result.loss is not None
    assert result.loss < 0.1  # from 3.5; measured 0.003
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock", "loss.png", "metrics.jsonl", "step-00000060"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))
    assert {"loss", "lr", "grad_norm", "right", "tokens_per_s", "samples_per_s", "wait_share"} <= set(lines[0])


def test_the_split_into_microbatches_changes_nothing(tmp_path: Path) -> None:
    """Sequences have different lengths, so a mean of means would differ."""
    whole, split = Kept(), Kept()
    objective = PackedLoss("float32")
    Trainer(toy_core(), objective, toy_source(samples_per_batch=8), toy_config(), whole, tmp_path / "whole").run()
    Trainer(toy_core(), objective, toy_source(samples_per_batch=2), toy_config(microbatches=4), split, tmp_path / "split").run()
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)
    assert split.records[0].num_tokens == whole.records[0].num_tokens


def test_frozen_weights_do_not_move(tmp_path: Path) -> None:
    core = toy_core()
    before = {name: weight.clone() for name, weight in core.named_parameters()}
    train(core, toy_source(), toy_config(steps=2, trainable=("lm_head.*",)), tmp_path)
    moved = {name for name, weight in core.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"lm_head.weight"}


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision"):
        toy_trainer(tmp_path, toy_config(trainable=("vision_tower.*",)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(tmp_path: Path, workers: int) -> None:
    trainer, whole = toy_trainer(tmp_path / "whole", toy_config())
    trainer.run()
    stopped, before = run_hooked(tmp_path / "cut", toy_config(), stop_after(3))
    with pytest.raises(TrainingError, match="stopped at step 4 of 8 and saved; run the same command again"):
        stopped.run()
    assert before.events == ["begin 0/8", "sync", "close"]
    resumed, after = toy_trainer(tmp_path / "cut", toy_config(workers=workers))
    result = resumed.run()
    assert (result.first_step, result.steps) == (4, 8)
    assert before.losses + after.losses == whole.losses
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    def hook(call: int, terms: LossTerms) -> LossTerms:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return terms

    trainer, reporter = run_hooked(tmp_path, toy_config(), hook)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert reporter.events[-1] == "close"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_skips_its_update(tmp_path: Path) -> None:
    trainer, reporter = run_hooked(tmp_path, toy_config(steps=1), spoil(0))
    result = trainer.run()
    assert result.num_skipped == 1
    assert math.isnan(reporter.losses[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trainer.model.parameters(), toy_core().parameters(), strict=True))


def test_three_in_a_row_stop_the_run_and_two_do_not(tmp_path: Path) -> None:
    two, _ = run_hooked(tmp_path / "two", toy_config(), spoil(1, 2, 4, 5))
    assert two.run().num_skipped == 4
    three, _ = run_hooked(tmp_path / "three", toy_config(), spoil(2, 3, 4))
    with pytest.raises(TrainingError, match="3 times in a row, last at step 4"):
        three.run()


def test_skips_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    config = toy_config(save=SaveConfig(every_s=0.0))
    stopped, _ = run_hooked(tmp_path, config, lambda call, terms: stop_after(1)(call, spoil(0, 1)(call, terms)))
    with pytest.raises(TrainingError, match="stopped"):
        stopped.run()
    resumed, _ = run_hooked(tmp_path, config, spoil(0))
    with pytest.raises(TrainingError, match="last at step 2"):
        resumed.run()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    trained, _ = toy_trainer(tmp_path, toy_config())
    trained.run()
    again, reporter = toy_trainer(tmp_path, toy_config())
    result = again.run()
    assert (result.steps, result.loss, reporter.records) == (8, None, [])
    for ours, theirs in zip(again.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_other_settings_are_refused_and_leave_the_run_as_it_is(tmp_path: Path) -> None:
    toy_trainer(tmp_path, toy_config())[0].run()
    before = (tmp_path / "config.json").read_text()
    other, _ = toy_trainer(tmp_path, toy_config(optim=OptimConfig(lr=5e-3)))
    with pytest.raises(TrainingError, match=r"optim\.lr was 0\.01, is 0\.005"):
        other.run()
    assert (tmp_path / "config.json").read_text() == before


def test_other_data_is_refused(tmp_path: Path) -> None:
    toy_trainer(tmp_path, toy_config())[0].run()
    other, _ = toy_trainer(tmp_path, toy_config(), seed=1)
    with pytest.raises(TrainingError, match="other data"):
        other.run()
