"""From one layout to another, tensor by tensor.

Owns: convert and its outputs: the HF layout (LLaVA or language model), original LLaVA's, a LLaVA's language model alone, GGUF; adapters
that stay adapters go to adapter_export. With a vision tower a language model becomes a fresh LLaVA on its way.
Invariants: all names and shapes are settled before a weight is read; memory holds one tensor; the destination appears whole or not
at all; without a change of dtype weights keep their bits. A vocabulary that grew for <image> is cut to its old size on the way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llavakit.checkpoint.adapter_export import export_adapter
from llavakit.checkpoint.card import CardFacts, find_origins, write_terms
from llavakit.checkpoint.fresh import Fresh, fresh_config, fresh_processor, fresh_projector
from llavakit.checkpoint.gguf_write import GgufType, gguf_kinds, write_gguf
from llavakit.checkpoint.hf import MAX_SHARD_BYTES, write_checkpoint
from llavakit.checkpoint.layouts import LANGUAGE_MODEL, TEXT_PREFIX, VOCABULARY
from llavakit.checkpoint.load import build_core, load_jinja
from llavakit.checkpoint.opening import Checkpoint, Need, Weight, open_checkpoint
from llavakit.checkpoint.original import write_original
from llavakit.checkpoint.parts import Part, Sources, is_adapter, open_tower
from llavakit.checkpoint.pieces import PieceReader
from llavakit.checkpoint.placement import common_dtype_name
from llavakit.errors import CheckpointError, ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from llavakit.model.surgery import resized_rows
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.template_choice import CHAT_TEMPLATE_NAME
from llavakit.processing.text import TextProcessor
from llavakit.processing.tokenizer.fast import LlamaTokenizerFast
from llavakit.processing.tokenizer.slow import LlamaTokenizer
from llavakit.storage.ahead import read_ahead
from llavakit.storage.folder import new_folder
from llavakit.storage.gguf_file import GgufKind
from llavakit.storage.hub import resolve_model

__all__ = ["Conversion", "Output", "convert"]

Output = Literal["hf", "original", "text", "gguf", "adapter"]
_LOG = logger("checkpoint")
_OLD_ROWS = "original_vocab_size"
"""Our key in config.json: the rows before <image> needed one."""
_MULTIPLE = 64
_NEEDS: Mapping[Output, Need] = {"text": "words", "gguf": "chat"}
_GGUF_TYPE: GgufType = "f16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """How to convert."""

    to: Output = "hf"
    """hf is the Hugging Face layout, original is LLaVA's own, text is a LLaVA's language model alone in the first, gguf is llama.cpp's;
    adapter leaves an adapter one, for peft over transformers' classes."""
    gguf_type: GgufType | None = None
    """How GGUF files store matrices; None means f16. Only for them."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where it is not the source's."""
    fresh: Fresh | None = None
    """What the LLaVA over a language model and sources.vision_tower gets beside them; None where the usual, or where there is none."""
    sources: Sources = field(default_factory=Sources)
    """What the folder needs beside itself, and whether pickle files are read."""
    dtype: torch.dtype | None = None
    """Of the new weights; None keeps the files'."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Of safetensors; GGUF files are whole, and so are adapters, of which peft reads one file."""
    hashes: bool = True
    """Write SHA-256 sums into the manifest; without them, sizes only, a conversion reads nothing twice."""
    is_dry: bool = False
    """Check everything but write nothing."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where each new tensor comes from."""

    core: LlamaCore | LlavaCore
    """The new model, on the meta device."""
    sources: Mapping[str, Weight]
    """By new parameter, in the order of writing."""
    dtypes: Mapping[str, torch.dtype]
    """That they are read in."""
    kinds: Mapping[str, GgufKind]
    """How GGUF files store them; empty for other outputs."""

    def num_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(weight.spec.num_bytes for weight in self.sources.values())


def convert(
    source: Path, destination: Path, how: Conversion = Conversion(), progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Convert a checkpoint folder, and return the names of the new tensors.

    progress is told the bytes that are done and those in all. Raises: CheckpointError, ConfigError; StorageError where the destination
    exists (an empty folder may).
    """
    _check_kinds(how)
    if how.to == "adapter":
        return export_adapter(source, destination, how.sources, hashes=how.hashes, is_dry=how.is_dry)
    with _open(source, how) as opened:
        plan = _plan(opened, how)
        if how.is_dry:
            return list(plan.sources)
        card, template = _card(opened, plan, how, source, destination.name), _chat_template(opened, source, how)
        with new_folder(destination, hashes=how.hashes) as folder:
            try:
                _write(opened, plan, folder, read_ahead(_read(plan, progress)), how, source)
                write_terms(folder, card)
                if template is not None:
                    (folder / CHAT_TEMPLATE_NAME).write_text(template, encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"writing {destination} failed: {error}; nothing of it was left") from error
    return list(plan.sources)


def _check_kinds(how: Conversion) -> None:
    """Refuse what would not be heeded. Raises: ConfigError."""
    if how.to == "adapter" and (how.dtype is not None or how.fresh is not None):
        raise ConfigError("an adapter keeps its dtype, and no LLaVA is built for it; leave out what asks for either")
    if how.to == "gguf" and how.dtype is not None:
        raise ConfigError("GGUF files have kinds of their own: leave dtype out and choose gguf_type")
    if how.to != "gguf" and how.gguf_type is not None:
        raise ConfigError(f"gguf_type is for GGUF files, not for {how.to}; choose dtype")


def _write(opened: Checkpoint, plan: _Plan, folder: Path, tensors: Iterator[tuple[str, Tensor]], how: Conversion, source: Path) -> None:
    origin = how.sources.base_folder(source) if is_adapter(source) else source
    if how.to == "gguf":
        write_gguf(plan.core, folder, plan.kinds, tensors, processor=opened.processor, source=origin, type=how.gguf_type or _GGUF_TYPE)
    else:
        assert not isinstance(opened.processor, TextProcessor), "the other outputs take tokenizers"
        write = write_original if how.to == "original" else write_checkpoint
        write(plan.core, folder, plan.dtypes, tensors, processor=opened.processor, source=origin, max_shard_bytes=how.max_shard_bytes)


def _chat_template(opened: Checkpoint, source: Path, how: Conversion) -> str | None:
    """Return the chat template that goes along with a language model alone; a LLaVA's comes with its processor."""
    return None if how.to not in ("hf", "text") or isinstance(opened.processor, LlavaProcessor) else load_jinja(source, how.sources)


def _card(opened: Checkpoint, plan: _Plan, how: Conversion, source: Path, name: str) -> CardFacts:
    """Say what the new folder holds, and what it was made of."""
    is_llava = isinstance(plan.core, LlavaCore)
    return CardFacts(
        name=name,
        config=plan.core.config,
        class_name="LlavaLlamaForCausalLM" if is_llava else "LlamaForCausalLM",
        num_parameters=sum(weight.numel() for weight in plan.core.parameters()),
        dtype=(how.gguf_type or _GGUF_TYPE) if how.to == "gguf" else common_dtype_name(plan.dtypes.values()),
        processor=opened.processor if is_llava and isinstance(opened.processor, LlavaProcessor) else None,
        layout=how.to if how.to in ("original", "gguf") else "hf",
        origins=find_origins([source, *(part.folder for part in opened.parts if part.folder is not None)]),
    )


@contextlib.contextmanager
def _open(source: Path, how: Conversion) -> Iterator[Checkpoint]:
    needs = _NEEDS.get(how.to, "files")
    with open_checkpoint(source, how.sources, tokenizer=how.tokenizer, needs=needs) as opened:
        if not isinstance(opened.config, LlavaConfig) and how.sources.vision_tower is not None and how.to != "text":
            tower = resolve_model(how.sources.vision_tower, allow_pickle=how.sources.allow_pickle)
            with open_tower(tower, allow_pickle=how.sources.allow_pickle) as seen:
                yield _built(opened, tower, seen, Fresh() if how.fresh is None else how.fresh)
        elif how.fresh is not None:
            raise ConfigError("a projector, template or seed is for a fresh LLaVA: a language model alone, and --vision-tower")
        else:
            yield opened


def _built(language_model: Checkpoint, tower: Path, seen: Part, fresh: Fresh) -> Checkpoint:
    """Build the parts of a fresh LLaVA."""
    words, text = language_model.processor, language_model.config
    assert isinstance(words, LlamaTokenizer | LlamaTokenizerFast)
    assert isinstance(text, LlamaConfig)
    config = fresh_config(text, tower, fresh)
    processor = fresh_processor(words, config, tower, fresh.template)
    read = [replace(part, layout=LANGUAGE_MODEL) for part in language_model.parts]
    dtype = next((spec.dtype for spec in read[0].tensors.specs.values() if spec.dtype.is_floating_point), torch.float32)
    return Checkpoint(config, (*read, seen, fresh_projector(config, dtype, fresh.seed)), processor)


def _plan(opened: Checkpoint, how: Conversion) -> _Plan:
    """Decide on names and shapes alone. Raises: CheckpointError, ConfigError."""
    core = build_core(_new_config(opened, how.to))
    kinds = gguf_kinds(core, how.gguf_type or _GGUF_TYPE) if how.to == "gguf" else {}
    prefix = TEXT_PREFIX if how.to == "text" and isinstance(opened.config, LlavaConfig) else ""
    sources = {name: opened.weights[prefix + name] for name, _ in core.named_parameters() if how.to != "gguf" or name in kinds}
    stored = {name: weight.spec.dtype for name, weight in sources.items()}
    asked = {name: torch.float32 if kind.is_packed else kind.dtype for name, kind in kinds.items()}
    return _Plan(core, sources, asked or (stored if how.dtype is None else dict.fromkeys(stored, how.dtype)), kinds)


def _new_config(opened: Checkpoint, to: Output) -> LlamaConfig | LlavaConfig:
    config = opened.config
    if to == "gguf":
        return config
    if not isinstance(config, LlavaConfig):
        if to == "original":
            kind = config.model_type
            raise ConfigError(f"this is a language model ({kind}): --to hf and gguf can hold it, and --vision-tower makes a LLaVA of it")
        return config
    if to == "text":
        return type(config.text_config).from_dict(config.text_config.to_dict())
    values, rows = config.to_dict(), config.text_config.vocab_size
    if to == "original":
        return _with_rows(type(config), values, values.pop(_OLD_ROWS, rows))
    if config.mm_projector_type != "mlp2x_gelu":
        _LOG.warning("transformers knows only projectors of two layers, not %s; llavakit reads this folder", config.mm_projector_type)
    assert isinstance(opened.processor, LlavaProcessor)
    if config.pad_token_id is None:
        values["pad_token_id"] = opened.processor.tokenizer.pad_token_id
    if (needed := len(opened.processor.tokenizer)) > rows:
        values[_OLD_ROWS] = rows
        rows = needed + -needed % _MULTIPLE
    return _with_rows(type(config), values, rows)


def _with_rows(kind: type[LlavaConfig], values: dict[str, Any], rows: int) -> LlavaConfig:
    values["text_config"] = {**values["text_config"], "vocab_size": rows}
    if "vocab_size" in values:
        values["vocab_size"] = rows
    return kind.from_dict(values)


def _read(plan: _Plan, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, Tensor]]:
    """Read the weights in the order of writing, for GGUF whole, else in pieces; rows are added to or cut from the vocabulary's tables."""
    shapes = {name: tuple(weight.shape) for name, weight in plan.core.named_parameters()}
    done, total, reader = 0, plan.num_bytes(), PieceReader()
    for name, weight in plan.sources.items():
        dtype = plan.dtypes[name]
        if plan.kinds:
            yield name, weight.read(dtype)
        elif weight.spec.shape == shapes[name]:
            yield from ((name, piece) for piece in reader.pieces(weight, dtype))
        else:
            assert name.endswith(VOCABULARY), "only the vocabulary changes its size"
            yield name, resized_rows(weight.read(dtype), shapes[name][0])
        done += weight.spec.num_bytes
        if progress is not None:
            progress(done, total)
