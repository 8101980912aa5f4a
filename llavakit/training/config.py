"""How a training run is set up: frozen, strict, saved with the run.

Owns: TrainConfig (a whole run, as recipes return it) and its parts: LoopConfig (what the trainer reads), DataConfig, OptimConfig,
SaveConfig. Refuses: torch. Built from mappings by llavakit.config.build_run_config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llavakit.config import run_config_to_dict
from llavakit.errors import ConfigError
from llavakit.model.lora_config import LoraConfig
from llavakit.training.preference_config import PreferenceConfig

__all__ = ["DataConfig", "GroupConfig", "LoopConfig", "ModelSource", "OptimConfig", "SaveConfig", "SourceConfig", "TrainConfig"]

_FREE_TO_CHANGE = ("workers", "save", "log_every_s")  # change no bit of the result


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """Parameters that train otherwise than the rest."""

    pattern: str
    """Pattern of their names; a parameter belongs to the first group that it matches."""
    lr: float
    """Their peak learning rate; the schedule is that of all."""
    weight_decay: float | None = None
    """Of their matrices; None is optim.weight_decay."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or (self.weight_decay is not None and self.weight_decay < 0):
            raise ConfigError(f"optim.groups: lr must be above 0 and weight_decay at least 0, got {self.lr} and {self.weight_decay}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser, schedule and clipping."""

    lr: float
    """Peak learning rate, reached after warmup_steps."""
    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of matrices inside layers and leaves the rest to adamw."""
    weight_decay: float = 0.0
    """Decoupled; applied to matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_share: float = 0.0
    """Share of all steps, rounded up, that are warm-up; only where warmup_steps is 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd is constant, then linear down over the last decay_share of the steps after warm-up."""
    decay_share: float = 0.3
    """Share of the steps after warm-up in which wsd decays."""
    final_lr_share: float = 0.0
    """Share of the peak at which the schedule ends."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with a learning rate of their own; not with muon."""
    states: Literal["float32", "bfloat16"] = "float32"
    """How both moments are kept between steps; bfloat16 takes half the memory and rounds by chance, so that small changes count."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be above 0, got {self.lr}")
        if self.weight_decay < 0 or self.warmup_steps < 0 or not self.eps > 0:
            raise ConfigError("optim.weight_decay and optim.warmup_steps must be at least 0, optim.eps above 0")
        if not 0 <= self.warmup_share <= 1:
            raise ConfigError(f"optim.warmup_share must be from 0 to 1, got {self.warmup_share}")
        if self.name == "muon" and (self.groups or self.states != "float32"):
            raise ConfigError("optim.groups and optim.states need the adamw optimiser, got muon")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ConfigError(f"optim.beta1 and optim.beta2 must be at least 0 and below 1, got {self.beta1} and {self.beta2}")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.final_lr_share <= 1:
            raise ConfigError("optim.decay_share and optim.final_lr_share must be from 0 to 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm must be above 0 or null, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """When the run saves itself."""

    every_s: float = 120.0
    """Seconds between saves; the last step is always saved."""
    keep_last: int = 2
    """Complete saves that are kept."""

    def __post_init__(self) -> None:
        if self.every_s < 0:
            raise ConfigError(f"save.every_s must be at least 0 (0 saves after each step), got {self.every_s}")
        if self.keep_last < 2:
            raise ConfigError(f"save.keep_last must be at least 2, so that a damaged save has a predecessor; got {self.keep_last}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One set of training rows."""

    rows: str
    """File, folder or hub id of the rows; docs/data.md has the formats."""
    images: str | None = None
    """Folder or tar shards of their pictures; None where the rows hold them, or have none."""
    subset: str | None = None
    """Which part of a data set of the hub; None where it has one."""
    split: str = "train"
    """Which split of a data set of the hub, or of a folder."""
    weight: float = 1.0
    """How often an epoch goes through the set; 0.5 takes half of it, another half in the next epoch."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"a source's weight must be above 0, got {self.weight}; leave the source out")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What a run reads, and how samples of known lengths are packed into batches."""

    sources: tuple[SourceConfig, ...] = ()
    """The sets of rows, mixed by their weights."""
    tokens_per_batch: int = 8192
    """Tokens that a batch may hold."""
    max_sample_tokens: int = 2048
    """Longer samples are left out, counted and reported."""
    window: int = 4096
    """Samples that are packed together; larger fills batches better, smaller mixes them better."""
    multiple_of: int = 256
    """A batch's length is rounded up to a multiple of it, so that few shapes come up."""
    seed: int = 0
    """Seed of the order of samples; each epoch has its own order."""
    masks: Literal["answers", "llava-exact"] = "answers"
    """Which tokens are learned: answers and their ends, or what LLaVA's own code makes of a row (training/exact)."""
    cache_features: bool = False
    """Keep what a frozen tower makes of each picture in the run's folder: for several epochs over a small model."""
    max_bad_share: float = 0.01
    """Share of rows that may be left out, because they cannot train, before the run stops."""

    def __post_init__(self) -> None:
        if not 2 <= self.max_sample_tokens <= self.tokens_per_batch:
            raise ConfigError(
                f"data.max_sample_tokens must be from 2 to data.tokens_per_batch ({self.tokens_per_batch}), got {self.max_sample_tokens}"
            )
        if self.window < 1 or self.multiple_of < 1:
            raise ConfigError(f"data.window and data.multiple_of must be at least 1, got {self.window} and {self.multiple_of}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share must be from 0 to 1, got {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What the trainer itself reads."""

    steps: int
    """Optimiser steps."""
    optim: OptimConfig
    """Optimiser and schedule."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that train; all others are frozen."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations; trainable parameters are float32."""
    microbatches: int = 1
    """Batches per step, over all processes; the loss is divided by the supervised positions of all of them."""
    seed: int = 0
    """Of whatever is drawn in a step (dropout)."""
    workers: int = 1
    """Processes that prepare batches; 0 prepares them in the training process. The batches do not depend on it."""
    max_bad_share: float = 0.0
    """Share of the samples so far that may be left out, because they cannot be read, before the run stops."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Saving."""
    log_every_s: float = 20.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.microbatches < 1 or self.workers < 0:
            raise ConfigError("steps and microbatches must be at least 1, workers at least 0")
        if not self.trainable:
            raise ConfigError("trainable needs at least one pattern of parameter names; ('*',) trains everything")

    def identity(self) -> dict[str, Any]:
        """Return the settings that the result depends on; a run resumes only where they are the same."""
        return {name: value for name, value in run_config_to_dict(self).items() if name not in _FREE_TO_CHANGE}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Which model a run begins with; docs/checkpoints.md says what loads."""

    path: str
    """Folder or hub id; a language model and a tower become one by `llava convert`."""
    base: str | None = None
    """Of an adapter, a delta or a projector: what it belongs to."""
    vision_tower: str | None = None
    """Tower of an original LLaVA that does not hold its own."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    allow_pickle: bool = False
    """Read pickle files too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run, whole: what a recipe returns, and what is saved with the run once everything in it is decided."""

    recipe: str
    """Name of the recipe that it came from."""
    model: ModelSource
    """The model that is trained."""
    data: DataConfig
    """Rows, and how they become batches."""
    optim: OptimConfig
    """Optimiser and schedule."""
    samples_per_step: int
    """Samples of an optimiser step, on average: a step takes so many batches as hold about that many, over all processes."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that train; all others are frozen."""
    lora: LoraConfig | None = None
    """Thin products that train beside frozen ones; the run then exports an adapter. What trains is trainable's to say."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the language model's products in 4 bits, scales in 8 (QLoRA); with lora only."""
    preference: PreferenceConfig | None = None
    """Train on pairs of a better and a worse answer in place of answers alone; docs/preference.md has the losses."""
    epochs: float = 1.0
    """Passes through the data."""
    steps: int | None = None
    """Optimiser steps, in place of epochs; written into the run's copy."""
    template: str | None = None
    """Chat template of the samples; None is the model's own."""
    preprocess: Literal["auto", "crop", "pad"] = "auto"
    """How pictures become square; auto is the model's own way."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the activations and of frozen weights; auto is bfloat16 where the device is fast in it."""
    recompute: Literal["none", "layers"] = "none"
    """Whether layers are computed again in the backward pass instead of keeping what they computed: less memory, a third more work."""
    compilation: Literal["auto", "layers", "none"] = "auto"
    """Whether torch.compile makes one program of each layer; auto does on CUDA (on a CPU it gains little and takes half a minute)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes CUDA where there is one."""
    seed: int = 0
    """Of whatever is drawn at the start: adapters' weights, dropout."""
    workers: int = 1
    """Processes that prepare batches."""
    save: SaveConfig = field(default_factory=SaveConfig)
    """Saving."""
    log_every_s: float = 20.0
    """Seconds between progress lines."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Who else hears of each step; they must be installed."""
    sample_answers: int = 4
    """Rows whose questions the trained model answers at the end, into samples.md; 0 asks none."""

    def __post_init__(self) -> None:
        if self.samples_per_step < 1 or not self.epochs > 0 or (self.steps is not None and self.steps < 1):
            raise ConfigError("samples_per_step and steps must be at least 1, epochs above 0")
        if self.quantize != "none" and self.lora is None:
            raise ConfigError("quantize keeps weights in 4 bits, which cannot train; it needs lora")

    @property
    def decided_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the activations, once a run has decided it."""
        assert self.compute_dtype != "auto", "a run decides it before it loads the model"
        return self.compute_dtype
