"""Whether two checkpoints, in any two layouts, hold the same model.

Owns: verify and its report: every tensor after mapping, and hidden states and logits on one fixed prompt with a picture, through
each checkpoint's own processor. Invariant: memory holds two tensors, or one module of one model, whatever the models' size.
Legend: T tokens  V vocabulary  D model width
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint.layouts import TEXT_PREFIX, VOCABULARY
from llavakit.checkpoint.opening import Checkpoint, Weight, open_checkpoint
from llavakit.checkpoint.parts import Sources
from llavakit.checkpoint.streamed import streamed
from llavakit.config import ModelConfig
from llavakit.errors import few, shortened
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.ops.attention import Packed
from llavakit.processing.processor import LlavaProcessor
from llavakit.types import Conversation
from llavakit.world.render import render, to_png
from llavakit.world.scenes import draw_scene

__all__ = ["Comparison", "Verification", "verify"]

_TOWER = "vision_tower.vision_model."
_QUESTION = "What is in this picture, and what is it next to?"
_SCENE_SEED = 4
_SCENE_PX = (420, 260)
_CHUNK = 1 << 24
_FEW = 2
_IMAGE = -1  # in place of an image position's id, which differs between layouts
_MAY_DIFFER = {
    "vocab_size", "image_token_index", "pad_token_id", "tokenizer_padding_side", "tokenizer_model_max_length", "ignore_index",
    "num_key_value_heads", "head_dim", "sliding_window", "use_sliding_window", "vision_feature_layer", "vision_feature_select_strategy",
}  # fmt: skip
"""Settings that layouts write in their own ways; what they mean is compared instead, where a result depends on it."""
_BEYOND_THE_PROMPT = ("window", "rope_scaling", "image_grid_pinpoints")
"""Settings that a short prompt with one picture cannot tell apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What is compared, and how closely."""

    sources: Sources = field(default_factory=Sources)
    """What the first checkpoint needs beside itself."""
    second_sources: Sources = field(default_factory=Sources)
    """What the second one does."""
    atol: float = 0.0
    """Largest difference of a weight that still counts as the same."""
    logits_atol: float = 1e-4
    """Largest difference of a logit that does, in float32."""
    runs_models: bool = True
    """Also compare hidden states and logits; off, only tensors and settings are."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found; empty problems mean that both hold the same model."""

    num_tensors: int
    """Compared pairs."""
    num_identical: int
    """Pairs with equal bits in equal dtypes."""
    max_weight_difference: float
    first_different: str | None
    """The first tensor, in the model's order, that differs by more than atol."""
    max_logit_difference: float | None
    """None where models were not run."""
    first_layer: str | None
    """Where hidden states first differ by more than logits_atol."""
    problems: tuple[str, ...]
    """Why they are not the same model."""
    notes: tuple[str, ...]
    """What differs and does no harm."""

    @property
    def is_same(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"same": self.is_same, **dataclasses.asdict(self)}


def verify(first: Path, second: Path, how: Comparison = Comparison(), progress: Callable[[int, int], None] | None = None) -> Verification:
    """Compare two checkpoints; of a LLaVA and a language model, the language model.

    progress is told the bytes that are done and those in all. Raises: CheckpointError, ConfigError where one cannot be read at all.
    """
    with contextlib.ExitStack() as files:
        pair = _Pair(
            files.enter_context(open_checkpoint(first, how.sources)), files.enter_context(open_checkpoint(second, how.second_sources)), how
        )
        pair.compare_configs()
        pair.compare_tensors(progress)
        if how.runs_models and pair.is_alike:
            pair.compare_results()
        return pair.verification()


@dataclass(frozen=True, slots=True)
class _Result:
    """What a model makes of the prompt."""

    ids: tuple[int, ...]
    tiles_N3SS: Tensor
    features_FD: Tensor | None
    hidden: Sequence[Tensor]
    logits_TV: Tensor


@dataclass
class _Pair:
    """Two open checkpoints and what was found so far."""

    first: Checkpoint
    second: Checkpoint
    how: Comparison
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Weights that differ and that no answer depends on."""
    is_alike: bool = True
    """Whether all tensors have partners of their own shape, so that both models can run one prompt."""
    num_tensors: int = 0
    num_identical: int = 0
    max_weight_difference: float = 0.0
    first_different: str | None = None
    max_logit_difference: float | None = None
    first_layer: str | None = None

    @functools.cached_property
    def is_mixed(self) -> bool:
        """Whether one is a LLaVA and the other a language model."""
        return isinstance(self.first.config, LlavaConfig) != isinstance(self.second.config, LlavaConfig)

    def compare_configs(self) -> None:
        """Note settings that differ; whether they matter the logits tell, where they can and are there."""
        configs: list[ModelConfig] = [self.first.config, self.second.config]
        if self.is_mixed:
            configs = [config.get_text_config() for config in (self.first.config, self.second.config)]
            self.notes.append("one is a language model alone; the other's tower and projector are not compared")
        one, two = (_settings(config) for config in configs)
        structural = {name for config in configs for name in _structural(config)}
        for name in sorted(name for name in one | two if one.get(name) != two.get(name)):
            is_problem = name.endswith(_BEYOND_THE_PROMPT) or (not self.how.runs_models and name.rpartition(".")[2] in structural)
            (self.problems if is_problem else self.notes).append(f"{name} is {one.get(name)!r} and {two.get(name)!r}")

    def compare_tensors(self, progress: Callable[[int, int], None] | None) -> None:
        """Compare the weights pair by pair."""
        one, two = self._weights(self.first), self._weights(self.second)
        missing = [f"only the {which} has {name}" for which, name in _only(one, two)]
        done, total = 0, sum(weight.spec.num_bytes + two[name].spec.num_bytes for name, weight in one.items() if name in two)
        differing = []
        for name, weight in one.items():
            if (other := two.get(name)) is None:
                continue
            if (difference := self._difference(name, weight, other)) is not None:
                differing.append(difference)
            done += weight.spec.num_bytes + other.spec.num_bytes
            if progress is not None:
                progress(done, total)
        if self.unused:
            self.notes.append(f"{len(self.unused)} weights that no answer depends on differ: {few(self.unused, _FEW)}")
        self.is_alike &= not missing
        self.problems += shortened(missing) + shortened(differing)

    def _weights(self, checkpoint: Checkpoint) -> Mapping[str, Weight]:
        """Return the weights to compare, in the model's order, a shared one once."""
        names = [name for name, _ in checkpoint.core.named_parameters()]
        if not self.is_mixed or not isinstance(checkpoint.config, LlavaConfig):
            return {name: checkpoint.weights[name] for name in names}
        return {name.removeprefix(TEXT_PREFIX): checkpoint.weights[name] for name in names if name.startswith(TEXT_PREFIX)}

    def _difference(self, name: str, weight: Weight, other: Weight) -> str | None:
        """Compare one pair; tables of the vocabulary in the rows that both have."""
        one, two = weight.read(), other.read()
        self.num_tensors += 1
        if one.shape != two.shape and not (name.endswith(VOCABULARY) and one.shape[1:] == two.shape[1:]):
            self.is_alike = False
            return f"{name} has shape {list(one.shape)} and {list(two.shape)}"
        if one.shape != two.shape:
            self.notes.append(f"{name} has {len(one)} and {len(two)} rows")
            one, two = one[: len(two)], two[: len(one)]
        if one.dtype == two.dtype and torch.equal(one, two):
            self.num_identical += 1
            return None
        if not self._is_used(name):
            self.unused.append(name)
            return None
        difference = max(_max_difference(a, b) for a, b in zip(one.reshape(-1).split(_CHUNK), two.reshape(-1).split(_CHUNK), strict=True))
        self.max_weight_difference = max(self.max_weight_difference, difference)
        if difference <= self.how.atol:
            return None
        self.first_different = name if self.first_different is None else self.first_different
        return f"{name} differs by up to {difference:.6g}"

    def _is_used(self, name: str) -> bool:
        """Whether an answer can depend on a weight: the tower's last norm and its layers behind the features never matter."""
        if not name.startswith(_TOWER) or not isinstance(config := self.first.config, LlavaConfig):
            return True
        layer = re.match(rf"{re.escape(_TOWER)}encoder\.layers\.(\d+)\.", name)
        is_behind = layer is not None and int(layer[1]) >= max(config.feature_depths)
        return not (is_behind or name.startswith(f"{_TOWER}post_layernorm."))

    def compare_results(self) -> None:
        """Run both models on the fixed prompt, one after the other, and compare what comes out, from pixels to logits."""
        one, two = (self._run(checkpoint) for checkpoint in (self.first, self.second))
        if one.ids != two.ids:
            where = next((i for i, (a, b) in enumerate(zip(one.ids, two.ids, strict=False)) if a != b), min(len(one.ids), len(two.ids)))
            self.problems.append(f"the same question becomes other tokens from number {where} on: templates or tokenizers differ")
            return
        if not torch.equal(one.tiles_N3SS, two.tiles_N3SS):
            self.problems.append("the same picture becomes other pixels: the preprocessing differs")
        steps = [("the picture's features", one.features_FD, two.features_FD)]
        names = ["the embeddings", *(f"layer {i}" for i in range(len(one.hidden) - 2)), "the last layer and the norm"]
        steps += list(zip(names, one.hidden, two.hidden, strict=True))
        for name, a, b in steps:
            if self.first_layer is None and a is not None and b is not None and _max_difference(a, b) > self.how.logits_atol:
                self.first_layer = name
        rows = min(one.logits_TV.shape[1], two.logits_TV.shape[1])
        one_TV, two_TV = one.logits_TV[:, :rows], two.logits_TV[:, :rows]
        self.max_logit_difference = _max_difference(one_TV, two_TV)
        if self.max_logit_difference > self.how.logits_atol:
            same = (one_TV.argmax(-1) == two_TV.argmax(-1)).sum()
            self.problems.append(
                f"logits differ by up to {self.max_logit_difference:.6g}, first in {self.first_layer or 'the head'}; "
                f"the likeliest next token is the same at {same} of {len(one.ids)} positions"
            )

    def _run(self, checkpoint: Checkpoint) -> _Result:
        with streamed(checkpoint, torch.float32) as core, torch.inference_mode():
            if isinstance(checkpoint.processor, LlavaProcessor) and not self.is_mixed:
                prompt = checkpoint.processor.prompt(Conversation.ask(_QUESTION, _picture()))
                ids, tiles_N3SS, image_id = prompt.ids, prompt.tiles_N3SS, checkpoint.processor.image_token_id
                assert isinstance(core, LlavaCore)
                features_FD = core.encode_images(tiles_N3SS, prompt.grids)
                x_TD = core.embed(torch.tensor(ids), features_FD)
            else:
                begin = checkpoint.tokenizer.bos_token_id
                ids = (*(() if begin is None else (begin,)), *checkpoint.tokenizer.encode_text(_QUESTION))
                tiles_N3SS, image_id, features_FD = torch.empty(0), None, None
                x_TD = core.embed(torch.tensor(ids))
            hidden: list[Tensor] = []
            context = Packed(torch.tensor([0, len(ids)]), core.text_config.window)
            logits_TV = core.logits(core.forward_packed(x_TD, torch.arange(len(ids)), context, hidden))
        return _Result(tuple(_IMAGE if token == image_id else token for token in ids), tiles_N3SS, features_FD, hidden, logits_TV)

    def verification(self) -> Verification:
        """Return what was found."""
        return Verification(
            num_tensors=self.num_tensors,
            num_identical=self.num_identical,
            max_weight_difference=self.max_weight_difference,
            first_different=self.first_different,
            max_logit_difference=self.max_logit_difference,
            first_layer=self.first_layer,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )


def _settings(config: ModelConfig, prefix: str = "") -> dict[str, object]:
    """Return the settings that a result may depend on, by dotted name."""
    found: dict[str, object] = {f"{prefix}model_type": config.model_type}
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        if isinstance(value, ModelConfig):
            found |= _settings(value, f"{prefix}{declared.name}.")
        elif declared.name not in _MAY_DIFFER:
            found[prefix + declared.name] = value
    if isinstance(config, LlamaConfig):
        found |= {
            f"{prefix}key-value heads": config.num_kv_heads,
            f"{prefix}head width": config.head_width,
            f"{prefix}window": config.window,
        }
    if isinstance(config, LlavaConfig):
        found |= {"feature layers": config.feature_depths, "class token among the features": config.image_grid.has_cls}
    return found


def _structural(config: ModelConfig) -> set[str]:
    """Return the settings that decide what a model computes; whether a head is shared its weights tell."""
    inner = [value for field in dataclasses.fields(config) if isinstance(value := getattr(config, field.name), ModelConfig)]
    own = {field.name for field in dataclasses.fields(config) if field.metadata.get("structural")}
    meanings = {"key-value heads", "head width", "feature layers", "class token among the features"}
    return (own | meanings | {name for config in inner for name in _structural(config)}) - {"tie_word_embeddings"}


def _only(one: Mapping[str, object], two: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    yield from (("first", name) for name in one if name not in two)
    yield from (("second", name) for name in two if name not in one)


def _max_difference(one: Tensor, two: Tensor) -> float:
    """Return the largest absolute difference, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(one.dtype, two.dtype), torch.float32)
    return float((one.to(dtype) - two.to(dtype)).abs().max()) if one.numel() else 0.0


@functools.cache
def _picture() -> bytes:
    return to_png(render(draw_scene(random.Random(_SCENE_SEED)), *_SCENE_PX))
