"""What a checkpoint is, told from headers and settings alone: its layout, parts, dtypes, quantisation, and what is odd about it.

Owns: survey and Survey. Refuses: reading weights, and fetching those of what a model builds on; what lies elsewhere is named. The settings
of a tower that is not one of the published are read where they lie, from the hub too, and those of a base that the caller names.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llavakit.checkpoint.adapters import ADAPTER_CONFIG, open_adapter_file
from llavakit.checkpoint.detect import Kind
from llavakit.checkpoint.gguf_read import is_gguf, open_gguf
from llavakit.checkpoint.layouts import LANGUAGE_MODEL, LLAMA, LLAVA_HF, original_layout
from llavakit.checkpoint.load import build_core, load_config, load_processor, tied_names
from llavakit.checkpoint.meta import is_meta_folder
from llavakit.checkpoint.packed import Unpacked, dense_tensors
from llavakit.checkpoint.parts import (
    TRAINED_FILES,
    Part,
    Sources,
    has_weights,
    is_adapter,
    kind_of_folder,
    open_meta,
    open_trained,
    open_weights,
)
from llavakit.checkpoint.placement import dtype_name
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, ConfigError, few
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.storage.documents import read_optional_json
from llavakit.storage.pickle_tensors import PICKLE
from llavakit.storage.tensors import SAFETENSORS, TensorSpec

__all__ = ["PartFacts", "Survey", "survey"]

_TOWER, _PROJECTOR, _WORDS = "vision_tower", "multi_modal_projector", "language_model"
_ADAPTER, _TRAINED_WHOLE = "adapter", "trained whole"
_FAMILIES = (
    ("language_model.model.", "names of transformers 4.36 to 4.51, and of later saves"),
    ("model.language_model.", "names of transformers 4.52 and later, in memory"),
)
_LAYOUTS = {
    Kind.LLAVA_HF: "llava-hf layout",
    Kind.ORIGINAL: "original LLaVA's layout",
    Kind.DECODER: "Hugging Face layout",
}
_LISTED = 3


@dataclass(frozen=True, slots=True)
class PartFacts:
    """One part of a model."""

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What was found."""

    layout: str
    version: str | None = None
    """Of the layout, where it has several."""
    files: tuple[str, ...]
    """That hold the weights."""
    parts: tuple[PartFacts, ...]
    dtypes: Mapping[str, int]
    """How the tensors are stored -> how many are."""
    quantisation: str | None = None
    adapter: str | None = None
    """What an adapter is."""
    builds_on: tuple[str, ...] = ()
    """What lies elsewhere: a tower, an adapter's base."""
    config: LlamaConfig | LlavaConfig | None = None
    processor: LlavaProcessor | TextProcessor | None = None
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a checkpoint by their stored names."""

    specs: Mapping[str, TensorSpec]
    dense: Mapping[str, TensorSpec]
    """With packed ones as the weights that they stand for."""
    files: tuple[str, ...]
    layout: Layout
    """What names mean."""
    quantisation: str | None = None


@dataclass
class _Findings:
    """What a survey comes across."""

    oddities: list[str] = field(default_factory=list)
    builds_on: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def unless_told(self) -> Iterator[None]:
        """Note an error instead of stopping at it."""
        try:
            yield
        except (CheckpointError, ConfigError) as error:
            self.oddities.append(str(error))


def survey(folder: Path, sources: Sources = Sources()) -> Survey:
    """Look at a folder of any layout, or a GGUF file. Raises: CheckpointError where it holds no weights that can be told."""
    if is_gguf(folder):
        return _survey_gguf(folder, sources)
    if is_meta_folder(folder):
        return _survey_meta(folder, sources)
    if is_adapter(folder):
        return _survey_adapter(folder, sources)
    if kind_of_folder(folder) is Kind.ORIGINAL and not has_weights(folder):
        return _survey_projector(folder, sources)
    return _survey_whole(folder, sources)


def _survey_gguf(path: Path, sources: Sources) -> Survey:
    found = _Findings()
    with open_gguf(path, sources.gguf_tower()) as model:
        files = [*model.texts, *(() if model.tower is None else (model.tower,))]
        kinds = [kind.name for file in files for kind in file.kinds.values()]
        packed = sorted({kind.name for file in files for kind in file.kinds.values() if kind.is_packed})
        parts = [_part(_WORDS, model.text_specs, model.text_specs)]
        if model.tower is not None:
            projector = {name: spec for name, spec in model.tower.specs.items() if name.startswith("mm.")}
            tower = {name: spec for name, spec in model.tower.specs.items() if name not in projector}
            parts += [_part(_TOWER, tower, tower), _part(_PROJECTOR, projector, projector)]
        config = load_config(path, sources)
    processor = None
    with found.unless_told():
        processor = load_processor(path, config, sources=sources)
    return Survey(
        layout="GGUF",
        version=f"architecture {model.architecture}",
        files=tuple(file.path.name for file in files),
        parts=tuple(parts),
        dtypes=Counter(kinds),
        quantisation=", ".join(packed) or None,
        config=config,
        processor=processor,
        oddities=(*found.oddities, *_vocabulary(config, processor)),
    )


def _survey_meta(folder: Path, sources: Sources) -> Survey:
    with open_meta(folder, sources) as files:
        names = tuple(sorted(path.name for path in folder.glob("consolidated.*.pth")))
        return Survey(
            layout="Meta's own layout",
            files=names,
            parts=(_part(_WORDS, files.specs, files.specs),),
            dtypes=_dtypes(files.specs),
            config=files.config,
        )


def _survey_adapter(folder: Path, sources: Sources) -> Survey:
    found = _Findings()
    is_original = kind_of_folder(folder) is Kind.ORIGINAL
    values = read_optional_json(folder / ADAPTER_CONFIG)
    base = sources.base if sources.base is not None else values.get("base_model_name_or_path")
    found.builds_on.append(_base_name(base))
    with contextlib.closing(open_adapter_file(folder, allow_pickle=sources.allow_pickle)) as adapter:
        specs, files = adapter.specs, [adapter.path.name]
    beside = _beside(folder, sources, found)
    modules = {name.partition(".lora_")[0] for name in specs if ".lora_" in name}
    kind = "DoRA" if values.get("use_dora") else "rsLoRA" if values.get("use_rslora") else "LoRA"
    config = None
    if is_original or sources.base is not None:
        with found.unless_told():
            config = load_config(folder, sources)
    return Survey(
        layout="original LLaVA's LoRA folder" if is_original else "PEFT adapter",
        adapter=f"{kind} of rank {values.get('r')}, alpha {values.get('lora_alpha')}, on {len(modules)} modules",
        files=(*files, *_trained_files(folder)),
        parts=(_part(_ADAPTER, specs, specs), *([_part(_TRAINED_WHOLE, beside, beside)] if beside else [])),
        dtypes=_dtypes(specs) + _dtypes(beside),
        builds_on=tuple(found.builds_on),
        config=config,
        oddities=tuple(found.oddities),
    )


def _beside(folder: Path, sources: Sources, found: _Findings) -> Mapping[str, TensorSpec]:
    """Return what was trained whole beside an adapter, or note that it was not looked at."""
    names = _trained_files(folder)
    if names and not sources.allow_pickle:
        found.oddities.append(f"{' and '.join(names)}, a pickle file, was not looked at; where you trust its origin, set allow_pickle")
        return {}
    with open_trained(folder, LLAVA_HF, allow_pickle=sources.allow_pickle) as parts:
        return _specs(parts)


def _survey_projector(folder: Path, sources: Sources) -> Survey:
    found, config = _Findings(), None
    with found.unless_told():
        config = load_config(folder, sources)
    layout = _original_names(config)
    with open_trained(folder, layout, allow_pickle=sources.allow_pickle) as opened:
        specs = _specs(opened)
    files = _trained_files(folder)
    parts = _parts(_Tensors(specs, specs, files, layout), config, found)
    return Survey(
        layout="original LLaVA's projector alone",
        version=_version(Kind.ORIGINAL, config, specs, None),
        files=files,
        parts=tuple(parts),
        dtypes=_dtypes(specs),
        builds_on=(_base_name(sources.base), f"the vision tower {_tower_name(folder, sources)}"),
        config=config,
        oddities=tuple(found.oddities),
    )


def _survey_whole(folder: Path, sources: Sources) -> Survey:
    found, config = _Findings(), None
    kind = kind_of_folder(folder)
    if kind is Kind.ORIGINAL:
        with found.unless_told():
            config = load_config(folder, sources)
    else:
        config = load_config(folder, sources)
    layout = LLAMA if not isinstance(config, LlavaConfig) else LLAVA_HF
    if kind is Kind.ORIGINAL:
        layout = _original_names(config)
    tensors = _read_folder(folder, layout, sources)
    parts, tower = _parts(tensors, config, found), _tower_name(folder, sources)
    if kind is Kind.ORIGINAL and _TOWER not in {part.name for part in parts}:
        found.builds_on.append(f"the vision tower {tower}")
    if SAFETENSORS.is_in(folder) and PICKLE.is_in(folder):
        found.oddities.append(f"{PICKLE.single_name} or its shards are there too; the safetensors are what is read")
    values = read_optional_json(folder / "config.json")
    if "auto_map" in values:
        found.oddities.append("config.json names code in the checkpoint (auto_map), which is never run")
    stated = values.get("torch_dtype", values.get("dtype"))
    dtypes = _dtypes(tensors.specs)
    if tensors.quantisation is None and isinstance(stated, str) and set(dtypes) != {stated}:
        found.oddities.append(f"config.json says {stated}, the tensors are {', '.join(sorted(dtypes))}")
    processor = None
    if config is not None:
        found.oddities += _misfits(tensors, config, has_tower=not found.builds_on)
        with found.unless_told():
            processor = load_processor(folder, config, sources=sources)
    return Survey(
        layout=_LAYOUTS[kind or Kind.DECODER],
        version=_version(kind, config, tensors.specs, values.get("transformers_version")),
        files=tensors.files,
        parts=tuple(parts),
        dtypes=dtypes,
        quantisation=tensors.quantisation,
        builds_on=tuple(found.builds_on),
        config=config,
        processor=processor,
        oddities=(*found.oddities, *(() if config is None else _vocabulary(config, processor))),
    )


def _read_folder(folder: Path, layout: Layout, sources: Sources) -> _Tensors:
    with open_weights(folder, allow_pickle=sources.allow_pickle) as files:
        dense = dense_tensors(files, folder)
        quantisation = dense.description if isinstance(dense, Unpacked) else None
        return _Tensors(files.specs, dense.specs, tuple(files.files), layout, quantisation)


def _parts(tensors: _Tensors, config: LlamaConfig | LlavaConfig | None, found: _Findings) -> list[PartFacts]:
    """Sort tensors by the parts of the model, and note what is left out or unknown."""
    sorted_names: dict[str, list[str]] = {}
    reasons: Counter[str] = Counter()
    strange = []
    for name in tensors.dense:
        if (reason := tensors.layout.drop_reason(name)) is not None:
            reasons[reason] += 1
            continue
        target = tensors.layout.target(name)
        if target is None:
            strange.append(name)
        else:
            part = target.partition(".")[0] if isinstance(config, LlavaConfig) or target.startswith("language_model.") else _WORDS
            sorted_names.setdefault(part, []).append(name)
    found.oddities += [f"{count} tensors are left out: {reason}" for reason, count in reasons.items()]
    if strange:
        found.oddities.append(f"{len(strange)} tensors are of no known name: {few(strange, _LISTED)}")
    parts = [_part(part, {name: tensors.dense[name] for name in names}, tensors.specs) for part, names in sorted_names.items()]
    return sorted(parts, key=lambda part: -part.num_parameters)


def _misfits(tensors: _Tensors, config: LlamaConfig | LlavaConfig, *, has_tower: bool) -> list[str]:
    """Compare names and shapes with those of the model that config.json describes."""
    core = build_core(config)
    wanted = {name: tuple(weight.shape) for name, weight in core.named_parameters(remove_duplicate=False)}
    stored = {tensors.layout.target(name): spec.shape for name, spec in tensors.dense.items() if tensors.layout.drop_reason(name) is None}
    tied = tied_names(core)
    missing = [name for name in wanted if name not in stored and name not in tied and (has_tower or not name.startswith(_TOWER))]
    others = [name for name in stored if name is not None and name not in wanted]
    shapes = [f"{name} {list(stored[name])}, expected {list(shape)}" for name, shape in wanted.items() if stored.get(name, shape) != shape]
    found = []
    for what, names in (("are missing", missing), ("are of no place in this model", others), ("have other shapes", shapes)):
        if names:
            found.append(f"{len(names)} tensors {what}: {few(names, _LISTED)}")
    return found


def _vocabulary(config: LlamaConfig | LlavaConfig, processor: LlavaProcessor | TextProcessor | None) -> list[str]:
    if processor is None:
        return []
    rows, added = config.get_text_config().vocab_size, {processor.tokenizer.pad_token_id}
    added |= {processor.image_token_id} if isinstance(processor, LlavaProcessor) else set()
    tokens = sum(index < rows or index not in added for index in range(len(processor.tokenizer)))  # which need no row in original LLaVA
    found = [f"the vocabulary has {rows} rows for {tokens} tokens"] if rows != tokens else []
    note = processor.preprocessing_note if isinstance(processor, LlavaProcessor) else None
    return found if note is None else [*found, note]


def _version(kind: Kind | None, config: LlamaConfig | LlavaConfig | None, names: Collection[str], writer: object) -> str | None:
    if kind is Kind.ORIGINAL:
        if not isinstance(config, LlavaConfig):
            return None
        return "v1.6" if config.merge is not None else "v1" if config.mm_projector_type == "linear" else "v1.5"
    told = [text for prefix, text in _FAMILIES if kind is Kind.LLAVA_HF and any(name.startswith(prefix) for name in names)]
    told += [f"written by transformers {writer}"] if isinstance(writer, str) else []
    return "; ".join(told) or None


def _base_name(base: object) -> str:
    return f"the model {base}" if base else "a model that it does not name"


def _tower_name(folder: Path, sources: Sources) -> object:
    values = read_optional_json(folder / "config.json")
    return sources.vision_tower if sources.vision_tower is not None else values.get("mm_vision_tower", values.get("vision_tower"))


def _original_names(config: LlamaConfig | LlavaConfig | None) -> Layout:
    """Return the names of original LLaVA's files, those of the language model alone where its settings are not known."""
    return original_layout(config.projector_depth) if isinstance(config, LlavaConfig) else LANGUAGE_MODEL


def _trained_files(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in TRAINED_FILES if (folder / name).is_file())


def _part(name: str, dense: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> PartFacts:
    num_bytes = sum(specs.get(tensor, spec).num_bytes for tensor, spec in dense.items())
    return PartFacts(name, len(dense), sum(math.prod(spec.shape) for spec in dense.values()), num_bytes)


def _specs(parts: Sequence[Part]) -> dict[str, TensorSpec]:
    return {name: spec for part in parts for name, spec in part.tensors.specs.items()}


def _dtypes(specs: Mapping[str, TensorSpec]) -> Counter[str]:
    return Counter(dtype_name(spec.dtype) for spec in specs.values())
