"""Instruction data in LLaVA's own JSON: a list of {"id", "image", "conversations": [{"from", "value"}, ...]}.

Owns: RecordSource, which checks all records before the first step; PictureFolder; and how a record becomes a Conversation.
Refuses: URLs and pictures outside the picture folder. As in LLaVA, `<image>` markers are removed and the pictures come first in
their turn, and a conversation that the model opens loses that first turn. Sources: llava/train/train.py (preprocess_multimodal).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import DataError, LlavaError, PromptError, shortened
from llavakit.geometry import ImageGrid, num_tiles
from llavakit.processing.image import image_size
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.training.data import Sample, sample_of_prompt
from llavakit.types import Conversation, ImagePart, Message, TextPart

__all__ = ["Fault", "Measures", "PictureFolder", "RecordSource", "conversation_of", "picture_names", "problem_of", "read_records"]

_MARKER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}
_NO_BYTES = b""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a record cannot train."""

    kind: str
    message: str
    is_fatal: bool = True


@dataclass(frozen=True, slots=True)
class Measures:
    """What a record will become."""

    num_tokens: int
    num_supervised: int
    num_tiles: int
    problems: tuple[Fault, ...] = ()


class RecordSource:
    """Samples from a JSON file of records and a folder of pictures; sample(i) is record i."""

    def __init__(self, records: Path, pictures: Path, processor: LlavaProcessor | TextProcessor) -> None:
        """Read and check all records. Raises: DataError listing what is wrong with them; pictures are opened only by sample."""
        self._pictures, self._processor = PictureFolder(pictures), processor
        values = self._records = read_records(records)
        problems = [f"record {index}: {problem}" for index, record in enumerate(values) if (problem := problem_of(record))]
        if problems:
            listed = "\n  ".join(shortened(problems))
            raise DataError(f"{records} has {len(problems)} records that cannot train:\n  {listed}")

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Sample:
        """Build the sample of a record. Raises: DataError, ImageError, PromptError."""
        record = self._records[index]
        pictures = [self._pictures.read(name) for name in picture_names(record)]
        return sample_of_prompt(self._processor.prompt(conversation_of(record, pictures), add_generation_prompt=False))

    @property
    def digest(self) -> str:
        """Digest the records."""
        return hashlib.sha256(json.dumps(self._records).encode()).hexdigest()

    def talk(self, index: int) -> Conversation:
        """Build a record's conversation, pictures included."""
        record = self._records[index]
        return conversation_of(record, [self._pictures.read(name) for name in picture_names(record)])

    def measure(self, index: int) -> Measures:
        """Measure a record without decoding a picture."""
        record = self._records[index]
        names = picture_names(record)
        try:
            conversation, grids = conversation_of(record, [_NO_BYTES] * len(names)), self._pictures.grids(names, self._processor)
            encoded = self._processor.encode_chat(conversation, grids, add_generation_prompt=False)[1]
        except LlavaError as error:
            return Measures(0, 0, 0, (Fault("unusable", str(error)),))
        return Measures(len(encoded.ids), sum(encoded.loss_mask[1:]), sum(map(num_tiles, grids)))


class PictureFolder:
    """The pictures that records name, all inside one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def read(self, name: str) -> bytes:
        """Read a picture's file. Raises: DataError for one outside the folder, or that cannot be read."""
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            raise DataError(f"picture {name!r} lies outside the picture folder")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read picture {name!r}: {error.strerror}") from error

    def grids(self, names: Sequence[str], processor: LlavaProcessor | TextProcessor) -> list[ImageGrid]:
        """Return the image tokens of pictures, of which the headers are read. Raises: DataError, ImageError."""
        if not names:
            return []
        if isinstance(processor, TextProcessor):
            raise DataError("has a picture, and the model is a language model without a vision tower")
        images, tile = processor.image_processor, processor.tile_grid
        sizes = [image_size(self.read(name), processor.limits) for name in names]
        return [tile if images.aspect != "anyres" else images.grid(size, tile) for size in sizes]


def read_records(path: Path) -> list[Any]:
    """Read a file that is a JSON list. Raises: DataError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path} must hold a JSON list of records, got {type(values).__name__}")
    return values


def problem_of(record: Any) -> str | None:
    """Say why a record cannot become a conversation; None when it can."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return 'must be a table with a list "conversations"'
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            return f'turns need "from" (human or gpt) and "value" (text), got {turn!r:.80}'
    names = picture_names(record)
    if not all(isinstance(name, str) for name in names):
        return f'"image" must be a file name or a list of them, got {record["image"]!r:.80}'
    num_markers = sum(turn["value"].count(_MARKER) for turn in record["conversations"] if turn["from"] == "human")
    if num_markers != len(names):
        return f"has {num_markers} {_MARKER} markers in human turns but {len(names)} pictures"
    try:
        conversation = conversation_of(record, [_NO_BYTES] * len(names))
    except PromptError as error:
        return str(error)
    return None if any(message.role == "assistant" for message in conversation.messages) else "has no answer to learn"


def picture_names(record: Mapping[str, Any]) -> Sequence[Any]:
    """Return the names of a record's pictures."""
    image = record.get("image")
    if image is None:
        return ()
    return image if isinstance(image, list) else (image,)


def conversation_of(record: Mapping[str, Any], pictures: Sequence[bytes]) -> Conversation:
    """Build a record's conversation around its pictures."""
    turns = record["conversations"]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    remaining = list(pictures)
    messages = []
    for turn in turns:
        value = turn["value"]
        if turn["from"] == "gpt":
            messages.append(Message("assistant", (TextPart(value),)))
            continue
        count = value.count(_MARKER)
        images = tuple(ImagePart(data) for data in remaining[:count])
        del remaining[:count]
        text = value.replace(_MARKER, "").strip() if count else value
        messages.append(Message("user", (*images, TextPart(text))))
    return Conversation(tuple(messages))
