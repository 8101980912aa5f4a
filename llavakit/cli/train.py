"""llava train: train a model by a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from llavakit.errors import ConfigError, LlavaError
from llavakit.logs import show_logs

if TYPE_CHECKING:
    from llavakit.training.config import ModelSource, SourceConfig, TrainConfig

__all__ = ["train"]


_SAGEMAKER = Path("/opt/ml")


def train(
    recipe: str | None = None,
    run: Path | None = None,
    *,
    model: str | None = None,
    data: tuple[str, ...] = (),
    images: tuple[str, ...] = (),
    settings: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    base: str | None = None,
    vision_tower: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a model by a recipe; the same command goes on after any interruption. Start it by torchrun to use several processes.

    The trained model is RUN/export, which every command takes. Started by SageMaker it needs no arguments: see docs/training.md.

    Parameters
    ----------
    recipe
        pretrain_v15, finetune_v15, finetune_task, ...; miniature_... are their twins for the embedded model. A wrong name lists them all.
    run
        Folder of the run: settings, metrics, saves, the trained model.
    model
        Folder or hub id of the model to begin with; the embedded miniature when left out.
    data
        Rows to train on: .json, .jsonl, .parquet, folders or hub ids; repeat it to mix several.
    images
        Folder or tar shards of their pictures: one for all rows, or one for each --data in turn.
    settings
        A setting of the recipe to change, like optim.lr=1e-4 or data.sources=[...]; --dry-run shows them all.
    base
        Folder or hub id of the model that an adapter, a delta or a projector belongs to.
    vision_tower
        Folder or hub id of an original LLaVA's tower, in place of the one that its config names.
    revision
        Branch, tag or commit of a hub id.
    allow_pickle
        Read pickle files (.bin) too.
    dry_run
        Print the settings as JSON, train nothing.
    """
    show_logs()
    if recipe is None or run is None:
        _run_job(_SAGEMAKER)
        return
    source = _model(model, base=base, vision_tower=vision_tower, revision=revision, allow_pickle=allow_pickle)
    config = _config(recipe, source, _sources(data, images), settings)
    if dry_run:
        _print(config)
    else:
        _run(config, run)


def _run_job(root: Path) -> None:
    """Do what SageMaker asks for; whatever goes wrong is told where it shows it."""
    from llavakit.training.run import EXPORT
    from llavakit.training.sagemaker import hand_over, is_sagemaker, read_job, tell_failure

    if not is_sagemaker(root):
        raise ConfigError(
            "name a recipe and a folder for the run, like: llava train finetune_task runs/mine --data rows.json --images pictures"
        )
    try:
        job = read_job(root)
        sources = _sources(job.data, () if job.images is None else (job.images,))
        _run(_config(job.recipe, _model(job.model), sources, job.settings), job.run_dir)
        if os.environ.get("RANK", "0") == "0":
            hand_over(job.run_dir / EXPORT, root)
    except LlavaError as error:
        tell_failure(root, str(error))
        raise


def _model(model: str | None, **options: Any) -> ModelSource:
    from llavakit.engine.llm import MINIATURE
    from llavakit.training.config import ModelSource

    return ModelSource(path=str(MINIATURE) if model is None else model, **options)


def _config(recipe: str, model: ModelSource, sources: tuple[SourceConfig, ...], settings: tuple[str, ...]) -> TrainConfig:
    from llavakit.config import override_run_config
    from llavakit.training.recipes import find_recipe

    return override_run_config(find_recipe(recipe)(model, sources), settings)


def _sources(data: tuple[str, ...], images: tuple[str, ...]) -> tuple[SourceConfig, ...]:
    from llavakit.training.config import SourceConfig

    if len(images) not in (0, 1, len(data)):
        raise ConfigError(f"there are {len(data)} --data and {len(images)} --images; give one for all, or one for each")
    places: tuple[str | None, ...] = images if len(images) == len(data) else (images or (None,)) * len(data)
    return tuple(SourceConfig(rows=rows, images=place) for rows, place in zip(data, places, strict=True))


def _print(config: TrainConfig) -> None:
    import json

    from llavakit.config import run_config_to_dict

    sys.stdout.write(json.dumps(run_config_to_dict(config), indent=2) + "\n")


def _run(config: TrainConfig, run: Path) -> None:
    from dataclasses import replace

    from llavakit.training.parallel import end_rank, join_ranks
    from llavakit.training.run import EXPORT, run_training

    ranks = join_ranks(os.environ) if "LOCAL_RANK" in os.environ else None  # torchrun started several of us
    if ranks is None:
        result = run_training(config, run)
    else:
        result = run_training(replace(config, device=str(ranks.device)), run, parallel=ranks)
        ranks.leave()
    if ranks is None or ranks.rank == 0:
        sys.stdout.write(f"{run / EXPORT}\n")
    if result.num_skipped:
        sys.stderr.write(f"llava: {result.num_skipped} updates were skipped, since loss or gradient was not finite\n")
    if ranks is not None:
        end_rank()
