"""A SageMaker job: what its files ask for, where its results go."""

import json
from pathlib import Path

import pytest

from llavakit.errors import ConfigError
from llavakit.training.sagemaker import hand_over, is_sagemaker, read_job, tell_failure


def job(root: Path, values: dict[str, object], *, rows: tuple[str, ...] = ("rows.jsonl",), has_model: bool = False) -> Path:
    (root / "input/config").mkdir(parents=True)
    (root / "input/config/hyperparameters.json").write_text(json.dumps(values))
    (root / "input/data/training").mkdir(parents=True)
    for name in rows:
        (root / "input/data/training" / name).write_text("")
    if has_model:
        (root / "input/data/model").mkdir()
    return root


def test_other_machines_are_told_apart(tmp_path: Path) -> None:
    assert not is_sagemaker(tmp_path)
    assert is_sagemaker(job(tmp_path / "ml", {}))


def test_hyperparameters_name_recipe_data_and_settings(tmp_path: Path) -> None:
    values: dict[str, object] = {
        "recipe": '"finetune_task"', "optim.lr": "1e-5", "data": "a.json, b.json", "images": "pictures", "sagemaker_region": "x"
    }  # fmt: skip
    found = read_job(job(tmp_path, values, has_model=True))
    channel = tmp_path / "input/data/training"
    assert (found.recipe, found.settings) == ("finetune_task", ("optim.lr=1e-5",))
    assert found.data == (str(channel / "a.json"), str(channel / "b.json"))
    assert found.images == str(channel / "pictures")
    assert found.model == str(tmp_path / "input/data/model")
    assert found.run_dir == tmp_path / "checkpoints"


def test_what_is_not_named_is_looked_for_in_the_channel(tmp_path: Path) -> None:
    found = read_job(job(tmp_path, {"recipe": "sft_text"}, rows=("b.parquet", "a.json", "notes.txt")))
    channel = tmp_path / "input/data/training"
    assert found.data == (str(channel / "a.json"), str(channel / "b.parquet"))
    assert (found.images, found.model) == (str(channel), None)


@pytest.mark.parametrize(
    ("values", "rows", "complaint"),
    [
        ({}, ("a.json",), "needs the hyperparameter recipe"),
        ({"recipe": "x"}, (), "holds no rows"),
        ({"recipe": 3}, ("a.json",), "recipe must be a string, got 3"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, values: dict[str, object], rows: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_job(job(tmp_path, values, rows=rows))


def test_the_model_and_the_reason_of_a_failure_are_left_where_they_are_looked_for(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    for name in ("config.json", "model.safetensors", "manifest.json"):
        (export / name).write_text(name)
    hand_over(export, tmp_path)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    tell_failure(tmp_path, "x" * 5000)
    assert len((tmp_path / "output/failure").read_text()) == 1024
