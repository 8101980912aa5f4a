"""A whole run: from a TrainConfig to a trained model that every command takes.

Owns: run_training and the order of its parts: rows, batches, model, loop, export, sample answers. Everything that is decided on the way
(steps, dtype) is in the run's train.json; a run folder explains itself.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llavakit.checkpoint.placement import choose_device
from llavakit.config import build_run_config, run_config_to_dict
from llavakit.errors import ConfigError
from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.lora_linear import adapters_off
from llavakit.ops.precision import faster_dtype
from llavakit.storage.documents import read_json, write_json
from llavakit.training.answers import write_answers
from llavakit.training.config import LoopConfig, TrainConfig
from llavakit.training.environment import environment_facts
from llavakit.training.features import build_features
from llavakit.training.flops import CoreFlops, peak_flops
from llavakit.training.objectives import COMPUTE_DTYPES, Objective, PackedLoss
from llavakit.training.packing import BestFitSource
from llavakit.training.pairs import PairSource
from llavakit.training.parallel import Alone, Parallel
from llavakit.training.preference_loss import AdaptersOff, PreferenceLoss
from llavakit.training.records import RecordSource
from llavakit.training.reference import ReferencedSource, ReferenceStore
from llavakit.training.reporting import Reporter, RunReporter, write_loss_curve
from llavakit.training.sets import RowSet, open_sets, plan_batches, talks_of
from llavakit.training.start import export_model, find_start, load_model
from llavakit.training.trackers import Tracked, open_trackers
from llavakit.training.trainer import Trainer, TrainResult

__all__ = ["EXPORT", "run_training"]

_LOG = logger("training")
EXPORT = "export"
"""Folder of the trained model in that of its run."""
_CONFIG = "train.json"
_FREE_TO_CHANGE = ("workers", "save", "log_every_s", "device", "trackers", "sample_answers")  # change no bit of the result


def run_training(config: TrainConfig, run_dir: Path, *, parallel: Parallel = Alone()) -> TrainResult:
    """Train as a config says, resuming from run_dir, and export the model to run_dir/export.

    Raises: ConfigError, CheckpointError, DataError (rows that cannot train, above their share), TrainingError, StorageError.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    start = find_start(config)
    sets = open_sets(config, start.processor, run_dir / "index", parallel)
    batches = plan_batches(sets, config)
    device = choose_device(config.device)
    config = _resolved(config, batches, device, run_dir / _CONFIG)
    trainee = load_model(config, start, device)
    if config.data.cache_features:
        _keep_features(config, trainee.core, sets, batches, run_dir / "features", parallel)
    objective = _objective(config, trainee.core, sets, batches, run_dir, parallel)
    trainer = _trainer(config, trainee.core, objective, batches, run_dir, parallel)
    if parallel.rank == 0 and not (run_dir / _CONFIG).exists():
        write_json(run_dir / _CONFIG, run_config_to_dict(config))
        write_json(run_dir / "environment.json", environment_facts(device, parallel.size))
    result = trainer.run()
    if parallel.rank == 0:
        write_loss_curve(run_dir / "metrics.jsonl", run_dir / "loss.png")
    export_model(config, trainee, start, run_dir / EXPORT, parallel)
    if config.sample_answers and parallel.size == 1:  # the model of several processes is in pieces
        write_answers(trainee.core, start.processor, talks_of(sets, config.sample_answers), run_dir / "samples.md")
    return result


def _resolved(config: TrainConfig, batches: BestFitSource, device: torch.device, before: Path) -> TrainConfig:
    """Fill in what was left to be found out; a run that goes on keeps the dtype that it found."""
    dtype = config.compute_dtype
    if dtype == "auto" and before.is_file():
        dtype = build_run_config(TrainConfig, read_json(before)).compute_dtype
    elif dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else faster_dtype()
    per_step = _microbatches(config, batches)
    steps = max(1, math.ceil(config.epochs * batches.num_batches(0) / per_step)) if config.steps is None else config.steps
    _LOG.info(
        "%d samples in batches that are %.1f %% full; %d batches a step, %d steps",
        batches.num_usable, 100 * batches.fullness(0), per_step, steps,
    )  # fmt: skip
    return replace(config, compute_dtype=dtype, steps=steps)


def _microbatches(config: TrainConfig, batches: BestFitSource) -> int:
    num_samples = sum(map(len, batches.packs(0)))
    return max(1, round(config.samples_per_step * batches.num_batches(0) / num_samples))


def _keep_features(
    config: TrainConfig, core: LlamaCore | LlavaCore, sets: Sequence[RowSet], batches: BestFitSource, folder: Path, parallel: Parallel
) -> None:
    """Let the tower see every picture once, in the first process, and take what it saw from there on. Raises: ConfigError."""
    sources = [one.samples for one in sets if isinstance(one.samples, RecordSource)]
    is_trained = isinstance(core, LlavaCore) and any(weight.requires_grad for weight in core.vision_tower.parameters())
    if not isinstance(core, LlavaCore) or is_trained or len(sources) < len(sets):
        raise ConfigError("data.cache_features keeps what a frozen tower sees in rows that are no pairs; turn it off for this run")
    dtype = COMPUTE_DTYPES[config.decided_dtype]
    for turn in (0, parallel.size - 1):  # the others find everything there
        if parallel.rank <= turn:
            kept = [
                build_features(core, source, one.usable, folder / str(place), dtype=dtype)
                for place, (one, source) in enumerate(zip(sets, sources, strict=True))
            ]
        parallel.wait()
    batches.parts = [replace(part, samples=samples) for part, samples in zip(batches.parts, kept, strict=True)]


def _objective(
    config: TrainConfig, core: LlamaCore | LlavaCore, sets: Sequence[RowSet], batches: BestFitSource, run_dir: Path, parallel: Parallel
) -> Objective:
    """Choose the loss; for pairs also what the model is held to: itself without adapters, or what it gave before training, kept."""
    dtype = config.decided_dtype
    touches_all = parallel.size > 1 and isinstance(core, LlavaCore)
    if config.preference is None:
        return PackedLoss(dtype, touches_all)
    if config.lora is not None and all(fnmatch.fnmatchcase(pattern, "*.lora_*") for pattern in config.trainable):
        return PreferenceLoss(config.preference, dtype, AdaptersOff(adapters_off), touches_all)
    store = ReferenceStore(run_dir / "reference", core, dtype)
    if parallel.rank == 0:
        for one in sets:
            assert isinstance(one.samples, PairSource), "preference runs read pairs"
            filled = store.fill(one.samples, one.usable)
            _LOG.info("%s: reference values of %d pairs computed, %d known", one.config.rows, filled.num_computed, filled.num_known)
    parallel.wait()
    values = store.read()
    batches.parts = [replace(part, samples=ReferencedSource(part.samples, values)) for part in batches.parts]
    return PreferenceLoss(config.preference, dtype, touches_all=touches_all)


def _trainer(
    config: TrainConfig, core: LlamaCore | LlavaCore, objective: Objective, batches: BestFitSource, run_dir: Path, parallel: Parallel
) -> Trainer:
    """Put the loop together."""
    loop = _loop(config, batches)
    peak = peak_flops(next(core.parameters()).device, COMPUTE_DTYPES[loop.compute_dtype]) * parallel.size
    reporter: Reporter = RunReporter(
        run_dir / "metrics.jsonl", log_every_s=config.log_every_s, is_terminal=sys.stderr.isatty(), peak_flops=peak
    )
    if config.trackers and parallel.rank == 0:
        reporter = Tracked(reporter, open_trackers(config.trackers, run_dir, run_config_to_dict(config)))
    identity = {name: value for name, value in run_config_to_dict(config).items() if name not in _FREE_TO_CHANGE}
    flops = CoreFlops(core).batch if config.preference is None else None
    return Trainer(core, objective, batches, loop, reporter, run_dir, identity=identity, parallel=parallel, flops=flops)


def _loop(config: TrainConfig, batches: BestFitSource) -> LoopConfig:
    assert config.steps is not None, "it was decided before"
    return LoopConfig(
        steps=config.steps,
        optim=config.optim,
        trainable=config.trainable,
        compute_dtype=config.decided_dtype,
        microbatches=_microbatches(config, batches),
        seed=config.seed,
        workers=config.workers,
        max_bad_share=config.data.max_bad_share,
        save=config.save,
        log_every_s=config.log_every_s,
    )
