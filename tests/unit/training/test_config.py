"""Training settings: strict, and which of them a resumed run may change."""

from typing import Any

import pytest

from llavakit.config import build_run_config, run_config_to_dict
from llavakit.errors import ConfigError
from llavakit.training.config import DataConfig, LoopConfig, OptimConfig, SaveConfig


def test_a_config_survives_the_round_trip_through_json_values() -> None:
    config = LoopConfig(steps=3, optim=OptimConfig(lr=0.1, clip_norm=1.0), trainable=("a.*",), save=SaveConfig(keep_last=3))
    assert build_run_config(LoopConfig, run_config_to_dict(config)) == config


def test_identity_leaves_out_what_changes_no_bit() -> None:
    config = LoopConfig(steps=3, optim=OptimConfig(lr=0.1))
    same = LoopConfig(steps=3, optim=OptimConfig(lr=0.1), workers=5, save=SaveConfig(every_s=1), log_every_s=1)
    other = LoopConfig(steps=3, optim=OptimConfig(lr=0.2))
    assert config.identity() == same.identity()
    assert config.identity() != other.identity()


@pytest.mark.parametrize(
    ("cls", "values", "name"),
    [
        (OptimConfig, {"lr": 0.0}, "optim.lr"),
        (OptimConfig, {"lr": 0.1, "beta2": 1.0}, "optim.beta2"),
        (OptimConfig, {"lr": 0.1, "clip_norm": 0.0}, "optim.clip_norm"),
        (OptimConfig, {"lr": 0.1, "decay_share": 1.5}, "optim.decay_share"),
        (OptimConfig, {"lr": 0.1, "warmup_steps": -1}, "optim.warmup_steps"),
        (SaveConfig, {"keep_last": 1}, "save.keep_last"),
        (SaveConfig, {"every_s": -1.0}, "save.every_s"),
        (DataConfig, {"tokens_per_batch": 100}, "data.max_sample_tokens"),
        (DataConfig, {"window": 0}, "data.window"),
        (LoopConfig, {"steps": 0, "optim": {"lr": 0.1}}, "steps"),
        (LoopConfig, {"steps": 1, "optim": {"lr": 0.1}, "trainable": []}, "trainable"),
        (LoopConfig, {"steps": 1, "optim": {"lr": 0.1}, "colour": 1}, "colour"),
    ],
)
def test_bad_values_are_named(cls: type[Any], values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        build_run_config(cls, values)
