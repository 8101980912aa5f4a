"""llava lint: what a prompt becomes for a checkpoint, and where the checkpoint's files deviate from its training."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavakit.checkpoint.gguf_read import is_gguf
from llavakit.checkpoint.load import load_config, load_processor
from llavakit.cli.options import printable
from llavakit.engine.llm import MINIATURE
from llavakit.errors import CheckpointError, PromptError
from llavakit.model.llava_config import LlavaConfig
from llavakit.processing.chat import ChatTemplate, find_template
from llavakit.processing.decode import image_size
from llavakit.processing.deviations import Deviation, PromptCheck, preprocessing_deviations
from llavakit.processing.own_template import template_of_text_checkpoint
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.segments import EncodedChat, Segment, encode_segments, segments_text
from llavakit.processing.template_choice import TemplateChoice, template_of_checkpoint, trained_template
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.storage.documents import read_optional_json
from llavakit.storage.hub import resolve_model
from llavakit.storage.picture_file import read_picture
from llavakit.types import Conversation

__all__ = ["lint"]

_SPACE = "▁"
_NO_IMAGE_ID = -1  # a language model has no pictures


def lint(
    model: str | None = None,
    *,
    image: Path | None = None,
    prompt: str = "What is in this picture?",
    template: str | None = None,
    revision: str | None = None,
    json: bool = False,
) -> None:
    """Show a prompt as segments and ids, and name the deviations of the checkpoint's files from what its weights were trained with.

    Parameters
    ----------
    model
        Folder or hub id; the embedded miniature when left out. Weights are not read.
    image
        A picture for the prompt; when left out, a small square one is assumed.
    prompt
        The question.
    template
        Template to use instead of the checkpoint's.
    revision
        Branch, tag or commit of a hub id.
    json
        Print one JSON object instead of lines.
    """
    folder = resolve_model(MINIATURE if model is None else model, revision=revision, parts="processor")
    if is_gguf(folder):
        raise CheckpointError(f"{folder} has no small files to look at, only GGUF metadata; llava convert makes a folder of it")
    subject = _load(folder, None if template is None else find_template(template))
    facts = {
        **_template_facts(subject),
        **_prompt_facts(subject, prompt, image),
        "deviations": [asdict(item) for item in _deviations(subject)],
    }
    if json:
        sys.stdout.write(json_format.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _lines(facts)))


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is looked at."""

    folder: Path
    choice: TemplateChoice
    trained: ChatTemplate
    tokenizer: Tokenizer
    processor: LlavaProcessor | None
    """None for a language model alone."""


def _load(folder: Path, named: ChatTemplate | None) -> _Subject:
    config = load_config(folder)
    if not isinstance(config, LlavaConfig):
        tokenizer = load_tokenizer(folder)
        choice = template_of_text_checkpoint(folder, tokenizer, named=named)
        return _Subject(folder, choice, choice.template, tokenizer, None)
    processor = load_processor(folder, config, named)
    assert isinstance(processor, LlavaProcessor)
    choice = template_of_checkpoint(folder, named=named)
    return _Subject(folder, choice, _trained(folder, choice), processor.tokenizer, processor)


def _trained(folder: Path, choice: TemplateChoice) -> ChatTemplate:
    """Return what the weights were trained with, which a template that the caller names does not change where the files tell."""
    try:
        return trained_template(template_of_checkpoint(folder))
    except CheckpointError:
        return trained_template(choice)


def _template_facts(subject: _Subject) -> dict[str, Any]:
    template = subject.choice.template
    markers = template.markers(subject.tokenizer, _NO_IMAGE_ID)
    ends = [] if markers.eos is None else [subject.tokenizer.convert_ids_to_tokens(markers.eos)]
    return {
        "folder": str(subject.folder),
        "template": template.name,
        "decided by": subject.choice.source,
        "trained with": "unknown (a language model alone)" if subject.processor is None else subject.trained.name,
        "answers end at": list(dict.fromkeys((*ends, *template.end_tokens, *template.stops))),
    }


def _prompt_facts(subject: _Subject, question: str, image: Path | None) -> dict[str, Any]:
    processor, tokenizer = subject.processor, subject.tokenizer
    if processor is None:
        if image is not None:
            raise PromptError("this model is a language model without a vision tower; ask without a picture")
        template = subject.choice.template
        segments = template.segments(Conversation.ask(question), add_generation_prompt=True)
        encoded = encode_segments(segments, tokenizer.encode_text, template.markers(tokenizer, _NO_IMAGE_ID), ())
    else:
        data = b"" if image is None else read_picture(image)
        side = processor.image_processor.crop_px
        size = (side, side) if image is None else image_size(data, processor.limits)
        grid = processor.image_processor.grid(size, processor.tile_grid)
        segments, encoded = processor.encode_chat(Conversation.ask(question, data), [grid])
    shown = _segments(segments, encoded, tokenizer)
    places = [place for segment in shown for place, piece in enumerate(segment["pieces"], segment["start"]) if not piece.strip(_SPACE)]
    return {
        "prompt": segments_text(segments),
        "tokens": len(encoded.ids),
        "opening": [tokenizer.convert_ids_to_tokens(index) for index in encoded.ids[: len(encoded.ids) - sum(encoded.lengths)]],
        "image slots": [[item["start"], item["start"] + item["length"]] for item in shown if item["kind"] == "image"],
        "lone spaces": [[place, encoded.ids[place]] for place in places],
        "segments": shown,
    }


def _segments(segments: list[Segment], encoded: EncodedChat, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Describe each segment with its place, ids and pieces; a picture's slots are counted only."""
    start = len(encoded.ids) - sum(encoded.lengths)
    shown = []
    for segment, length in zip(segments, encoded.lengths, strict=True):
        ids = [] if segment.kind == "image" else list(encoded.ids[start : start + length])
        pieces = [tokenizer.convert_ids_to_tokens(index) for index in ids]
        shown.append({"kind": segment.kind, "text": segment.text, "start": start, "length": length, "ids": ids, "pieces": pieces})
        start += length
    return shown


def _deviations(subject: _Subject) -> list[Deviation]:
    folder, choice, tokenizer = subject.folder, subject.choice, subject.tokenizer
    config, processor = read_optional_json(folder / "config.json"), read_optional_json(folder / "processor_config.json")
    image = processor["image_processor"] if "image_processor" in processor else read_optional_json(folder / "preprocessor_config.json")
    found = [] if subject.processor is None else preprocessing_deviations(config, image, subject.trained)
    if choice.jinja is None or isinstance(choice.template.form, str):
        return found
    bos, eos = (
        "" if index is None else tokenizer.convert_ids_to_tokens(index) for index in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    is_vision = subject.processor is not None
    check = PromptCheck(jinja=choice.jinja, trained=subject.trained, ours=choice.template, bos=bos, eos=eos, is_vision=is_vision)
    return [*check.deviations(), *found]


def _lines(facts: dict[str, Any]) -> list[str]:
    """Lay the facts out for a terminal; text of a checkpoint cannot steer it."""
    lines = [f"{name:15}{facts[name]}" for name in ("folder", "template", "decided by", "trained with")]
    lines += [f"{'answers end at':15}{', '.join(map(repr, facts['answers end at']))}", f"{'prompt':15}{facts['prompt']!r}"]
    lines += [f"{'tokens':15}{facts['tokens']}"]
    lines += [f"{'image slots':15}{', '.join(f'{first}..{stop - 1}' for first, stop in facts['image slots']) or 'none'}"]
    lines += [f"{'lone spaces':15}{', '.join(f'{index} at {place}' for place, index in facts['lone spaces']) or 'none'}", ""]
    lines += [f"{0:5}  opening  {token}" for token in facts["opening"]]
    for segment in facts["segments"]:
        lines.append(f"{segment['start']:5}  {segment['kind']:7}  {segment['text']!r} ({segment['length']} ids)")
        pieces = [f"{index}={repr(piece)[1:-1]}" for index, piece in zip(segment["ids"], segment["pieces"], strict=True)]
        lines += [f"{'':16}{'  '.join(pieces[first : first + 8])}" for first in range(0, len(pieces), 8)]
    subject = "our prompt" if facts["trained with"].startswith("unknown") else "its training"
    lines += ["", f"{len(facts['deviations'])} deviations of the checkpoint's files from {subject}"]
    for item in facts["deviations"]:
        lines += [f"  {item['name']}", *(f"    {part:9}{item[part]}" for part in ("file", "training", "ours"))]
    return [printable(line) for line in lines]
