"""Options that several commands share, and reading pictures from disk.

Refuses: torch; `llava ask --help` needs none.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from llavakit.errors import ConfigError
from llavakit.logs import show_logs
from llavakit.types import SamplingParams

if TYPE_CHECKING:
    from llavakit.engine.llm import LLM
    from llavakit.processing.processor import LlavaProcessor
    from llavakit.processing.text import TextProcessor

__all__ = ["EngineOptions", "ModelOptions", "SamplingOptions", "load_processor_alone", "printable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which model, and how it runs."""

    model: str | None = None
    """Folder, GGUF file or hub id; the embedded miniature when left out."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of weights and activations; auto takes the files'."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes CUDA where there is one."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Store the language model's products in 8 or 4 bits: for GPUs with less memory than the weights."""
    preprocess: Literal["auto", "crop", "pad"] = "auto"
    """How pictures become square; auto does what the checkpoint's files say."""
    template: str | None = None
    """Chat template to use instead of the checkpoint's; `llava lint` shows what it makes of a prompt."""
    base: str | None = None
    """Folder or hub id of the model that an adapter, a delta or a projector belongs to."""
    vision_tower: str | None = None
    """Folder or hub id of the tower of an original LLaVA, in place of the one that its config names; the mmproj of a GGUF file."""
    allow_pickle: bool = False
    """Read pytorch_model.bin files too."""

    def load(self, engine: EngineOptions | None = None) -> LLM:
        """Load the model, saying so on stderr where nobody named one."""
        from llavakit.engine.llm import LLM, MINIATURE

        show_logs()
        settings = {} if engine is None else engine.settings()
        if self.model is None:
            sys.stderr.write("llava: using the embedded miniature model; --model takes a folder or a hub id\n")
        return LLM(
            MINIATURE if self.model is None else self.model,
            dtype=self.dtype,
            device=self.device,
            quantize=self.quantize,
            preprocess=self.preprocess,
            template=self.template,
            base=self.base,
            vision_tower=self.vision_tower,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            **settings,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How many requests run together, and on how much memory."""

    max_batch: int = 32
    """Sequences that run together."""
    kv_memory: int | None = None
    """Bytes of the cache; a share of what is free when left out."""
    step_tokens: int | None = None
    """Tokens of a step; longer prompts come in chunks."""
    lookup_tokens: int = 0
    """Tokens that are guessed a step from the text before; no answer changes."""
    adapters: tuple[str, ...] = ()
    """PEFT adapters as NAME=FOLDER; requests name them as models."""

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            if not all(adapter.partition("=")):
                raise ConfigError(f"adapters are NAME=FOLDER, got {adapter!r}")

    def settings(self) -> dict[str, Any]:
        """Translate into LLM's arguments."""
        named = {name: folder for name, _, folder in (adapter.partition("=") for adapter in self.adapters)}
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "adapters": named}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and when an answer ends."""

    max_tokens: int | None = None
    """New tokens at most; the rest of the context when left out."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability."""
    min_p: float = 0.0
    """Keep tokens at least so many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred less likely."""
    presence_penalty: float = 0.0
    """Above 0 makes tokens that the answer holds already less likely."""
    frequency_penalty: float = 0.0
    """The same, as often as it holds them."""
    min_tokens: int = 0
    """Tokens before the answer may end."""
    seed: int | None = None
    """Seed of the draw."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    json_schema: str | None = None
    """JSON schema, as text, that the answer follows; "{}" is any JSON. Needs llavakit[constrain], as the next two."""
    regex: str | None = None
    """Regular expression that the whole answer matches."""
    choices: tuple[str, ...] = ()
    """Texts of which the answer is one."""

    def params(self) -> SamplingParams:
        """Translate into the loop's parameters."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in fields(self)})


def load_processor_alone(model: str | None, template: str | None) -> LlavaProcessor | TextProcessor:
    """Load a model's processor without its weights; the embedded miniature's by default. Raises: CheckpointError, ConfigError."""
    from llavakit.checkpoint.load import load_config, load_processor
    from llavakit.engine.llm import MINIATURE
    from llavakit.processing.chat import find_template
    from llavakit.storage.hub import resolve_model

    folder = resolve_model(MINIATURE if model is None else model)
    return load_processor(folder, load_config(folder), None if template is None else find_template(template))


def printable(text: str) -> str:
    """Remove control characters other than line breaks and tabs, so that no answer can steer a terminal."""
    return "".join(character for character in text if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160))
