"""Which chat template a checkpoint was made for, decided by the content of its files; a folder's name means nothing.

Owns: template_of_checkpoint and its order: our own key in processor_config.json, the text of the folder's own chat template, the
config. A language model without any template is `completion`: its text goes in as it is, since nothing says how it talks.
Sources: the configs of LLaVA 1.0 to 1.6, LLaVA-NeXT and llava-hf (text model, vocabulary, projector).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import CheckpointError
from llavakit.processing.chat import TEMPLATES, ChatTemplate
from llavakit.processing.jinja import template_of_jinja
from llavakit.storage.documents import read_optional_json, read_text

__all__ = [
    "CHAT_TEMPLATE_NAME",
    "TEMPLATE_KEY",
    "TemplateChoice",
    "find_jinja",
    "is_vision_config",
    "template_of_checkpoint",
    "template_of_config",
    "trained_template",
    "was_trained_padded",
]

CHAT_TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_KEY = "llavakit_template"
"""Our own entry in processor_config.json."""
_YI_VOCABULARY = range(64000, 64128)
_LLAMA_3_VOCABULARY = range(128256, 128512)
_LLAMA_2_CONTEXT = 4096
_V0_PAD = "[PAD]"
_TRAINED = {"v1_hf": "v1", "llava_v1": "v1", "chatml_direct_hf": "chatml_direct", "chatml": "qwen", "llama_3": "llava_llama_3"}


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A template, and what decided for it."""

    template: ChatTemplate
    source: str
    """The file that decided."""
    jinja: str | None
    """The text of the folder's own chat template."""


def template_of_checkpoint(
    folder: Path, *, named: ChatTemplate | None = None, recognise: Callable[[str], ChatTemplate] = template_of_jinja
) -> TemplateChoice:
    """Choose the template of a folder, or take the one that the caller names; recognise tells the one of a template file.

    Raises: CheckpointError for a name or a family that is not known.
    """
    processor = read_optional_json(folder / "processor_config.json")
    source, jinja = _find_jinja(folder, processor)
    if named is not None:
        return TemplateChoice(named, "the caller", jinja)
    name = processor.get(TEMPLATE_KEY)
    if name is not None:
        if not isinstance(name, str) or name not in TEMPLATES:
            raise CheckpointError(f"processor_config.json names the template {name!r}; known are {', '.join(TEMPLATES)}")
        return TemplateChoice(TEMPLATES[name], "processor_config.json", jinja)
    if jinja is not None:
        return TemplateChoice(recognise(jinja), source, jinja)
    config, added = read_optional_json(folder / "config.json"), read_optional_json(folder / "added_tokens.json")
    return TemplateChoice(template_of_config(config, added), "config.json", None)


def template_of_config(config: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> ChatTemplate:
    """Choose by config.json, and by the tokens that were added to the tokenizer where the config cannot tell.

    Raises: CheckpointError for a LLaVA whose language model is of no known family.
    """
    if config and not is_vision_config(config):
        return TEMPLATES["completion"]
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    kind = str(text.get("model_type", "llama")).removeprefix("llava_")
    vocab_size = text.get("vocab_size")
    match kind:
        case "mistral":
            return TEMPLATES["mistral_instruct"]
        case "mpt":
            return TEMPLATES["mpt"]
        case "qwen" | "qwen2":
            return TEMPLATES["qwen"]
        case "llama" | "llava" if vocab_size in _LLAMA_3_VOCABULARY:
            return TEMPLATES["llava_llama_3"]
        case "llama" | "llava" if vocab_size in _YI_VOCABULARY:
            return TEMPLATES["chatml_direct"]
        case "llama" | "llava" if text is config and config:
            return TEMPLATES[_original_llama(config, added_tokens)]
        case "llama" | "llava":
            return TEMPLATES["v1"]
    raise CheckpointError(
        f"no chat template is known for a LLaVA over {kind!r}; put {TEMPLATE_KEY!r} with one of {', '.join(TEMPLATES)} into "
        "processor_config.json"
    )


def _original_llama(config: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> str:
    """Tell LLaVA's own releases over Llama apart: only the first one added [PAD]; linear over Llama 2 is the chat version's."""
    if _V0_PAD in added_tokens:
        return "llava_v0"
    is_linear = config.get("mm_projector_type", "linear") == "linear"
    return "llava_llama_2" if is_linear and config.get("max_position_embeddings") == _LLAMA_2_CONTEXT else "v1"


def is_vision_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a LLaVA's, in either layout."""
    is_named = str(config.get("model_type")).startswith("llava")
    return is_named or "vision_config" in config or any(key.startswith("mm_") for key in config)


def trained_template(choice: TemplateChoice) -> ChatTemplate:
    """Return what a LLaVA's weights were trained with.

    llava-hf's files leave out the system line of their families' training; llava_v1 is LLaVA's demo of weights trained with v1.
    """
    name = choice.template.name
    return TEMPLATES[_TRAINED.get(name, name)]


def was_trained_padded(config: Mapping[str, Any], trained: ChatTemplate) -> bool:
    """Whether the weights saw pictures padded to a square: LLaVA-1.5 by its template, others by what their config says."""
    is_one_five = config.get("model_type") == "llava" and trained.name == "v1" and config.get("mm_projector_type", "") != "linear"
    return bool(config.get("image_aspect_ratio", "pad" if is_one_five and "text_config" in config else None) == "pad")


def find_jinja(folder: Path) -> str | None:
    """Return the text of a folder's own chat template. Raises: CheckpointError for files that cannot be read."""
    return _find_jinja(folder, read_optional_json(folder / "processor_config.json"))[1]


def _find_jinja(folder: Path, processor: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the first chat template text and the name of its file."""
    if (folder / CHAT_TEMPLATE_NAME).is_file():
        return CHAT_TEMPLATE_NAME, read_text(folder / CHAT_TEMPLATE_NAME)
    for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        table = processor if name == "processor_config.json" else read_optional_json(folder / name)
        if (text := _default_text(table.get("chat_template"))) is not None:
            return name, text
    return "config.json", None


def _default_text(entry: Any) -> str | None:
    """Return a template that is written as text, or as a list of named texts with one called default."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, Mapping)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
