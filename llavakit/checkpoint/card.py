"""What goes to the hub beside the weights: the model card and the licences.

Owns: build_card (README.md with the front matter that the hub reads), Licence and its choice, copy_licences, write_terms.
Invariant: a card says only what config, processor, weights and the source's own files say; a licence that is unknown is said to be.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llavakit.errors import CheckpointError, ConfigError
from llavakit.logs import logger
from llavakit.model.config import LlamaConfig
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.processor import LlavaProcessor
from llavakit.storage.documents import read_text
from llavakit.storage.hub import check_inside, is_hub_id, name_of_folder
from llavakit.types import Conversation

__all__ = [
    "CardFacts",
    "Licence",
    "Origin",
    "build_card",
    "choose_licence",
    "copy_licences",
    "find_licences",
    "find_origins",
    "write_adapter_terms",
    "write_terms",
]

Layout = Literal["hf", "original", "gguf"]
_LOG = logger("checkpoint")
_LICENCE_FILE = re.compile(r"(licen[sc]e|notice|use[_-]policy|copying)\b.*", re.IGNORECASE)
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_KEY = re.compile(r"(license|license_name|license_link):\s*(\S.*?)\s*")
_LAYOUTS: Mapping[Layout, str] = {
    "hf": "in the Hugging Face layout",
    "original": "in original LLaVA's layout",
    "gguf": "as GGUF files for llama.cpp and Ollama",
}
_TAGS = ["llava", "llavakit"]
_QUESTION = "What is in this picture?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """A licence as the hub's front matter states it."""

    license: str | None = None
    """The hub's id of it, "other" for one that has none, or None where nobody knows."""
    license_name: str | None = None
    """Name of an "other" licence."""
    license_link: str | None = None
    """File or address of an "other" licence."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A model that another one was made of."""

    name: str
    """Its hub id, or the name of its folder."""
    folder: Path
    licence: Licence


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What a card is built from."""

    name: str
    """The repository, owner/name."""
    config: LlamaConfig | LlavaConfig
    """The model's."""
    class_name: str
    """The public class that loads it."""
    num_parameters: int
    """Weights, shared ones once."""
    dtype: str
    """Of the weights."""
    processor: LlavaProcessor | None = None
    """Where it goes along."""
    base_model: str | None = None
    """Hub id of the model that this one was loaded from."""
    licence: Licence = Licence()
    """The terms."""
    layout: Layout = "hf"
    """Of the files."""
    origins: tuple[Origin, ...] = ()
    """What it was converted from; empty for a model that was loaded and saved."""


def build_card(facts: CardFacts) -> str:
    """Write README.md."""
    sections = [
        f"# {facts.name.split('/')[-1]}",
        _introduction(facts),
        "## Parts\n\n" + "\n".join(f"- {line}" for line in _parts(facts.config)),
    ]
    if facts.processor is not None:
        sections += [
            f"## Prompt\n\nTemplate `{facts.processor.template.name}`; `<image>` stands for a picture's features.\n\n"
            f"```text\n{_prompt(facts.processor)}\n```",
            f"## Preprocessing\n\n```json\n{json.dumps(facts.processor.image_processor.to_dict(), indent=2)}\n```",
        ]
    if facts.origins:
        sections.append(_made_of(facts.origins))
    sections += [f"## Run it\n\n```python\n{_code(facts)}\n```", f"## Licence\n\n{_terms(facts.licence)}"]
    return _front_matter(facts) + "\n\n".join(sections) + "\n"


def find_origins(folders: Iterable[Path]) -> tuple[Origin, ...]:
    """Describe what a model was made of, each folder once."""
    return tuple(Origin(name_of_folder(folder), folder, choose_licence(None, folder)) for folder in dict.fromkeys(folders))


def write_terms(folder: Path, facts: CardFacts) -> None:
    """Write README.md with the terms of the first origin that states some, and the licence files of all origins."""
    origins = _with_licences(folder, facts.origins)
    (folder / "README.md").write_text(build_card(replace(facts, origins=origins, licence=_first_licence(origins))), encoding="utf-8")


def write_adapter_terms(folder: Path, name: str, base: str | None, origins: Sequence[Origin]) -> None:
    """Write README.md of a PEFT adapter, and the licence files of all origins."""
    origins = _with_licences(folder, origins)
    licence = _first_licence(origins)
    values = {"license": licence.license, "base_model": base if is_hub_id(base or "") else None, "library_name": "peft", "tags": _TAGS}
    sections = [
        f"# {name}",
        f"A LoRA adapter for {base or 'a model that its files do not name'}, as PEFT reads it over transformers' classes.",
        *([_made_of(origins)] if origins else []),
        f"## Licence\n\n{_terms(licence)}",
    ]
    (folder / "README.md").write_text(_yaml(values) + "\n\n".join(sections) + "\n", encoding="utf-8")


def choose_licence(stated: str | None, source: Path | None) -> Licence:
    """Take the licence that the user states, else that of the source folder's card, else its licence file.

    Raises: ConfigError when what is stated cannot be a hub's licence id.
    """
    if stated is not None:
        if _LICENCE_ID.fullmatch(stated) is None:
            raise ConfigError(f"license must be one of the hub's ids (like apache-2.0, llama2, other), got {stated!r}")
        return Licence(license=stated)
    if source is None or not source.is_dir():
        return Licence()
    if found := _read_front_matter(source / "README.md"):
        return Licence(**found)
    files = [path.name for path in find_licences(source) if not path.name.lower().startswith("notice")]
    return Licence(license="other", license_name=files[0].split(".")[0].lower(), license_link=files[0]) if files else Licence()


def find_licences(folder: Path) -> list[Path]:
    """List the files that terms ask to be passed on: LICENSE, NOTICE, USE_POLICY and the like; none for a path that is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and _LICENCE_FILE.fullmatch(path.name))


def copy_licences(source: Path, folder: Path) -> dict[str, str]:
    """Copy a folder's licence files into another folder, and return their names there by their old ones.

    Where another text has the name, a number is put to it. A link that leads elsewhere is left out, and that is logged.
    """
    names = {}
    for path in find_licences(source):
        try:
            check_inside(path, source)
        except CheckpointError as error:
            _LOG.warning("left out a licence file: %s", error)
            continue
        text = path.read_bytes()
        taken = {other.read_bytes(): other.name for other in find_licences(folder)}
        if text not in taken:
            number = next(number for number in itertools.count(1) if not (folder / _numbered(path, number)).exists())
            taken[text] = _numbered(path, number)
            (folder / taken[text]).write_bytes(text)
        names[path.name] = taken[text]
    return names


def _first_licence(origins: Iterable[Origin]) -> Licence:
    return next((origin.licence for origin in origins if origin.licence.license is not None), Licence())


def _with_licences(folder: Path, origins: Iterable[Origin]) -> tuple[Origin, ...]:
    """Copy the licence files of all origins, and return these with the names that the files have got."""
    found = []
    for origin in origins:
        names = copy_licences(origin.folder, folder)
        link = origin.licence.license_link
        found.append(replace(origin, licence=replace(origin.licence, license_link=names.get(link, link) if link else link)))
    return tuple(found)


def _numbered(path: Path, number: int) -> str:
    return path.name if number == 1 else f"{path.stem}-{number}{path.suffix}"


def _read_front_matter(path: Path) -> dict[str, str]:
    """Read the licence keys of a card; the rest of its YAML is not looked at. A card that cannot be read states nothing."""
    try:
        text = read_text(path) if path.is_file() else ""
    except CheckpointError as error:
        _LOG.warning("left out a model card: %s", error)
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    lines = text[4 : text.index("\n---", 3)].splitlines()
    matches = [match for line in lines if (match := _KEY.fullmatch(line)) is not None]
    return {match[1]: match[2].strip("\"'") for match in matches}


def _front_matter(facts: CardFacts) -> str:
    is_llava = isinstance(facts.config, LlavaConfig)
    libraries = {"hf": "transformers", "gguf": "gguf"}  # the layout and the class names in config.json are their own
    values: dict[str, Any] = {
        "license": facts.licence.license,
        "license_name": facts.licence.license_name,
        "license_link": facts.licence.license_link,
        "base_model": facts.base_model,
        "library_name": libraries.get(facts.layout),
        "pipeline_tag": "image-text-to-text" if is_llava else "text-generation",
        "tags": _TAGS if is_llava else ["llavakit"],
    }
    return _yaml(values)


def _yaml(values: Mapping[str, Any]) -> str:
    # A JSON value is a YAML value too, and quotes what needs quoting.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _made_of(origins: Iterable[Origin]) -> str:
    lines = [f"- {origin.name}: {_terms(origin.licence)}" for origin in origins]
    return "## Made of\n\nMade by llavakit from these, each with its terms:\n\n" + "\n".join(lines)


def _introduction(facts: CardFacts) -> str:
    kind = "LLaVA, a model that sees pictures and answers in text," if isinstance(facts.config, LlavaConfig) else "Llama language model"
    origin = "" if facts.base_model is None else f" It was loaded from [{facts.base_model}](https://huggingface.co/{facts.base_model})."
    return f"A {kind} of {facts.num_parameters:,} parameters in {facts.dtype}, {_LAYOUTS[facts.layout]}.{origin}"


def _parts(config: LlamaConfig | LlavaConfig) -> list[str]:
    text = config.get_text_config()
    language = (
        f"Language model: Llama, {text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads over "
        f"{text.num_kv_heads}, vocabulary {text.vocab_size}, context {text.max_position_embeddings}"
    )
    if isinstance(config, LlamaConfig):
        return [language]
    vision = config.vision_config
    tower = (
        f"Vision tower: {vision.model_type}, {vision.num_hidden_layers} layers (hidden state {config.vision_feature_layer} is used), "
        f"width {vision.hidden_size}, {vision.image_size} pixels in patches of {vision.patch_size}"
    )
    return [language, tower, f"Projector: {config.mm_projector_type}"]


def _prompt(processor: LlavaProcessor) -> str:
    end = processor.tokenizer.eos_token_id
    image = "<image>" if processor.image_marks is None else "<image>".join(processor.image_marks)
    marks = {"image": image, "eos": "" if end is None else processor.tokenizer.convert_ids_to_tokens(end)}
    segments = processor.template.segments(Conversation.ask(_QUESTION, b""), add_generation_prompt=True)
    return "".join(marks.get(segment.kind, segment.text) for segment in segments)


def _code(facts: CardFacts) -> str:
    if isinstance(facts.config, LlamaConfig) or facts.processor is None:
        return f'from llavakit import {facts.class_name}\n\nmodel = {facts.class_name}.from_pretrained("{facts.name}")'
    return (
        "from pathlib import Path\n\nfrom llavakit import LLM, Conversation\n\n"
        f'llm = LLM("{facts.name}")\n'
        f'print(llm.chat(Conversation.ask("{_QUESTION}", Path("picture.jpg").read_bytes())).text)'
    )


def _terms(licence: Licence) -> str:
    if licence.license is None:
        return "Not stated: ask the owner before you use it."
    name = licence.license_name if licence.license == "other" and licence.license_name is not None else licence.license
    return name if licence.license_link is None else f"[{name}]({licence.license_link})"
