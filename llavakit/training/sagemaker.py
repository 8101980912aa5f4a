"""A training job as SageMaker starts it: `llava train` without arguments, everything else in files under /opt/ml.

Owns: SageMakerJob, read_job, and where results and reasons of failure go. Source: SageMaker's container contract: hyperparameters as a JSON
table of strings, one folder per data channel, checkpoints in a folder that survives the container, the model in another.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from llavakit.errors import ConfigError
from llavakit.storage.documents import read_json
from llavakit.storage.folder import MANIFEST_NAME

__all__ = ["SageMakerJob", "hand_over", "is_sagemaker", "read_job", "tell_failure"]

_HYPERPARAMETERS = Path("input/config/hyperparameters.json")
_TRAINING, _MODEL = Path("input/data/training"), Path("input/data/model")
_ROWS = (".json", ".jsonl", ".parquet")
_MOST_REASON = 1024


@dataclass(frozen=True, slots=True)
class SageMakerJob:
    """What a job asks for."""

    recipe: str
    run_dir: Path
    """Where saves go, and are found again when the job is started once more."""
    model: str | None
    """Hyperparameter model, else the channel model; None is the embedded miniature."""
    data: tuple[str, ...]
    images: str | None
    settings: tuple[str, ...]
    """Settings to change, as NAME=VALUE: every other hyperparameter."""


def is_sagemaker(root: Path) -> bool:
    """Whether SageMaker started this process."""
    return (root / _HYPERPARAMETERS).is_file()


def read_job(root: Path) -> SageMakerJob:
    """Read what a job asks for: hyperparameters recipe, model, data and images (in the channel training), and settings by name.

    Raises: ConfigError.
    """
    values = {name: _plain(name, value) for name, value in read_json(root / _HYPERPARAMETERS).items() if not name.startswith("sagemaker_")}
    recipe = values.pop("recipe", None)
    if recipe is None:
        raise ConfigError("the job needs the hyperparameter recipe, like finetune_task")
    channel = root / _TRAINING
    named = values.pop("data", None)
    data = _rows(channel) if named is None else [str(channel / name.strip()) for name in named.split(",")]
    pictures, model = values.pop("images", None), values.pop("model", None)
    if model is None and (root / _MODEL).is_dir():
        model = str(root / _MODEL)
    return SageMakerJob(
        recipe=recipe,
        run_dir=root / "checkpoints",
        model=model,
        data=tuple(data),
        images=str(channel if pictures is None else channel / pictures),
        settings=tuple(f"{name}={value}" for name, value in values.items()),
    )


def hand_over(export: Path, root: Path) -> None:
    """Copy the trained model to where SageMaker takes it from."""
    destination = root / "model"
    destination.mkdir(parents=True, exist_ok=True)
    for path in export.iterdir():
        if path.is_file() and path.name != MANIFEST_NAME:
            shutil.copyfile(path, destination / path.name)


def tell_failure(root: Path, reason: str) -> None:
    """Leave the reason where SageMaker shows it."""
    folder = root / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure").write_text(reason[:_MOST_REASON], encoding="utf-8")


def _plain(name: str, value: object) -> str:
    """Return a hyperparameter, which the console and the SDK write as strings, sometimes quoted once more."""
    if not isinstance(value, str):
        raise ConfigError(f"hyperparameter {name} must be a string, got {value!r}")
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _rows(channel: Path) -> list[str]:
    found = sorted(path for path in channel.iterdir() if path.suffix in _ROWS) if channel.is_dir() else []
    if not found:
        raise ConfigError(f"{channel} holds no rows ({', '.join(_ROWS)}); give the job a channel training with them")
    return [str(path) for path in found]
