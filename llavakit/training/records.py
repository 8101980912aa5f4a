"""Instruction data: rows of JSON, in LLaVA's form or in that of messages, and the pictures that they name.

Owns: read_records (.json, .jsonl), how a row becomes a Conversation, PictureFolder, and RecordSource, which measures rows and makes
samples. Refuses: URLs and pictures outside the picture folder. As in LLaVA, `<image>` markers are removed and the pictures come first in
their turn, and a conversation that the model opens loses that first turn. Sources: llava/train/train.py (preprocess_multimodal).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import DataError, ImageError, LlavaError, PromptError
from llavakit.geometry import ImageGrid, num_tiles
from llavakit.processing.image import image_size
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.training.checks import Fault, Measures
from llavakit.training.data import Sample, sample_of_prompt
from llavakit.types import Conversation, ImagePart, Message, TextPart

__all__ = ["PictureFolder", "RecordSource", "content_text", "conversation_of", "picture_names", "read_records", "turn_of_message"]

_MARKER, _NO_BYTES = "<image>", b""
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
_MARKUP = ("</s>", "<s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<<SYS>>", "###", "USER:", "ASSISTANT:")


class RecordSource:
    """Samples from a file of records and a folder of pictures; sample(i) is record i."""

    def __init__(
        self, records: Path, pictures: Path, processor: LlavaProcessor | TextProcessor, *, max_sample_tokens: int | None = None
    ) -> None:
        """Read the records; measure() says what is wrong with each. Raises: DataError for a file that cannot be read."""
        self._pictures, self._processor, self._most = PictureFolder(pictures), processor, max_sample_tokens
        self._records = read_records(records)
        ids = [record["id"] for record in self._records if isinstance(record, dict) and isinstance(record.get("id"), str | int)]
        self._repeated = {name for name, count in Counter(ids).items() if count > 1}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def digest(self) -> str:
        """Digest the records."""
        return hashlib.sha256(json.dumps(self._records).encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Build the sample of a record. Raises: DataError, ImageError, PromptError."""
        return sample_of_prompt(self._processor.prompt(self.talk(index), add_generation_prompt=False))

    def talk(self, index: int) -> Conversation:
        """Build a record's conversation, pictures included. Raises: DataError, PromptError."""
        record = _checked(self._records[index])
        return conversation_of(record, [self._pictures.read(name) for name in picture_names(record)])

    def measure(self, index: int) -> Measures:
        """Measure a record without decoding a picture; whatever is wrong with it is among the problems."""
        warnings: list[Fault] = []
        try:
            record = _checked(self._records[index])
            names = picture_names(record)
            warnings += self._warnings(record)
            grids = self._pictures.grids(names, self._processor)
            conversation = conversation_of(record, [_NO_BYTES] * len(names))
            encoded = self._processor.encode_chat(conversation, grids, add_generation_prompt=False)[1]
        except LlavaError as error:
            return Measures(0, 0, 0, (*warnings, _fault(error)))
        num_learned = sum(encoded.loss_mask[1:])
        if num_learned == 0:
            warnings.append(Fault("nothing learned", "no token of it is learned", is_fatal=True))
        if self._most is not None and len(encoded.ids) > self._most:
            warnings.append(Fault("too long", f"it has {len(encoded.ids)} tokens, at most {self._most} fit", is_fatal=True))
        return Measures(len(encoded.ids), num_learned, sum(map(num_tiles, grids)), tuple(warnings))

    def decode(self, index: int) -> None:
        """Decode a record's pictures as a sample would. Raises: ImageError, DataError."""
        for name in picture_names(_checked(self._records[index])):
            self._processor.check_image(self._pictures.read(name))

    def _warnings(self, record: Mapping[str, Any]) -> Iterator[Fault]:
        if record.get("id") in self._repeated:
            yield Fault("duplicate id", f"another row has the id {record['id']!r} too", is_fatal=False)
        for turn in record["conversations"]:
            text = turn["value"].replace(_MARKER, "").strip()
            if turn["from"] == "human" and not text and not turn["value"]:
                yield Fault("empty question", "a question is empty", is_fatal=False)
            if spelled := [mark for mark in _MARKUP if mark in text]:
                yield Fault("markup in text", f"a text spells {spelled[0]}, which stays text", is_fatal=False)


class PictureFolder:
    """The pictures that records name, all inside one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def read(self, name: str) -> bytes:
        """Read a picture's file. Raises: ImageError for one outside the folder, or that cannot be read."""
        try:
            path = (self._folder / name).resolve()
            if not path.is_relative_to(self._folder):
                raise ImageError(f"picture {name!r} lies outside the picture folder")
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read picture {name!r}: {error.strerror}") from error
        except ValueError as error:  # a name may hold a zero byte
            raise ImageError(f"cannot read picture {name!r}: {error}") from error

    def grids(self, names: Sequence[str], processor: LlavaProcessor | TextProcessor) -> list[ImageGrid]:
        """Return the image tokens of pictures, of which the headers are read. Raises: ImageError, naming the picture."""
        if not names:
            return []
        if isinstance(processor, TextProcessor):
            raise ImageError("it has a picture, and the model is a language model without a vision tower")
        images, tile = processor.image_processor, processor.tile_grid
        grids = []
        for name in names:
            data = self.read(name)
            try:
                size = image_size(data, processor.limits)
            except ImageError as error:
                raise ImageError(f"picture {name!r}: {error}") from error
            grids.append(tile if images.aspect != "anyres" else images.grid(size, tile))
        return grids


def read_records(path: Path) -> list[Any]:
    """Read a file that is a JSON list, or has a JSON value on each line (.jsonl). Raises: DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return _lines(path, text)
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path} must hold a JSON list of records, got {type(values).__name__}")
    return values


def _lines(path: Path, text: str) -> list[Any]:
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not values:
        raise DataError(f"{path} holds no records")
    return values


def picture_names(record: Mapping[str, Any]) -> Sequence[Any]:
    """Return the names of a record's pictures."""
    image = record.get("image")
    if image is None:
        return ()
    return image if isinstance(image, list) else (image,)


def conversation_of(record: Mapping[str, Any], pictures: Sequence[bytes]) -> Conversation:
    """Build a record's conversation around its pictures. Raises: PromptError for turns in an order that is none."""
    turns = record["conversations"]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    remaining = list(pictures)
    messages = []
    for turn in turns:
        value = turn["value"]
        if turn["from"] != "human":
            messages.append(Message("assistant" if turn["from"] == "gpt" else "system", (TextPart(value),)))
            continue
        count = value.count(_MARKER)
        images = tuple(ImagePart(data) for data in remaining[:count])
        del remaining[:count]
        text = value.replace(_MARKER, "").strip() if count else value
        messages.append(Message("user", (*images, TextPart(text))))
    return Conversation(tuple(messages))


def turn_of_message(message: Any) -> dict[str, str]:
    """Bring a message (role, content) into LLaVA's form. Raises: DataError."""
    if not isinstance(message, dict) or message.get("role") not in _SPEAKERS:
        raise DataError(f"messages need a role (user, assistant or system) and content, got {message!r:.80}")
    return {"from": _SPEAKERS[message["role"]], "value": content_text(message.get("content"))}


def content_text(content: Any) -> str:
    """Write a message's content as a text with marks for pictures. Raises: DataError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"content must be a text or a list of parts, got {content!r:.80}")
    if unknown := [part.get("type") for part in content if part.get("type") not in ("image", "text")]:
        raise DataError(f"parts must be of type text or image, got {unknown[0]!r}")
    return "".join(f"{_MARKER}\n" if part["type"] == "image" else str(part.get("text", "")) for part in content)


class _FaultError(DataError):
    """A record that cannot train, for a reason that has a name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _fault(error: LlavaError) -> Fault:
    kinds = {_FaultError: getattr(error, "kind", ""), ImageError: "picture", PromptError: "order"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "form")
    return Fault(kind, str(error), is_fatal=True)


def _checked(record: Any) -> Mapping[str, Any]:
    """Return a record in LLaVA's form whose parts are of their types and fit each other. Raises: DataError."""
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        turns = [turn_of_message(message) for message in record["messages"]]
        record = {**record, "conversations": turns, "image": record.get("image", record.get("images"))}
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise _FaultError("form", 'it must be a table with a list "conversations" or "messages"')
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in _SPEAKERS.values() or not isinstance(turn.get("value"), str):
            raise _FaultError("turn", f'turns need "from" (human or gpt) and "value" (text), got {turn!r:.80}')
    names = picture_names(record)
    if not all(isinstance(name, str) for name in names):
        raise _FaultError("picture name", f'"image" must be a file name or a list of them, got {record["image"]!r:.80}')
    num_markers = sum(turn["value"].count(_MARKER) for turn in record["conversations"] if turn["from"] == "human")
    if num_markers != len(names):
        raise _FaultError("marks", f"it has {num_markers} {_MARKER} marks in questions but {len(names)} pictures")
    answers = [turn["value"] for place, turn in enumerate(record["conversations"]) if turn["from"] == "gpt" and place > 0]
    if not answers:
        raise _FaultError("no answer", "it has no answer to learn")
    if not all(answer.strip() for answer in answers):
        raise _FaultError("empty answer", "an answer is empty, so that the model would learn to say nothing")
    return record
