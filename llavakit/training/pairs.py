"""Preference rows: one prompt, a better and a worse answer.

Owns: PairSource, and the three forms that rows come in: LLaVA's (conversations that end with a question, chosen, rejected), TRL's (prompt,
chosen, rejected as texts or messages), and RLHF-V's (question, chosen, rejected, also as JSON inside a field text).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llavakit.errors import DataError, ImageError, LlavaError, PromptError, shortened
from llavakit.geometry import num_tiles
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.training.checks import Fault, Measures
from llavakit.training.preference import PreferenceSample, encode_pair, preference_sample
from llavakit.training.preference_config import CorruptionConfig
from llavakit.training.records import PictureFolder, content_text, conversation_of, picture_names, read_records, turn_of_message
from llavakit.types import Conversation, Message, TextPart

__all__ = ["PairSource"]

_MARKER, _NO_BYTES = "<image>", b""
_NO_TILES = torch.empty(0, 3, 1, 1)
_Pair = tuple[dict[str, Any], str, str]


class PairSource:
    """Pairs from a JSON file of rows and a folder of pictures; sample(i) is row i."""

    def __init__(
        self, rows: Path, pictures: Path, processor: LlavaProcessor | TextProcessor, corruption: CorruptionConfig | None = None
    ) -> None:
        """Read and check all rows. Raises: DataError listing those of no known form; pictures are opened only by sample."""
        self._pictures, self._processor, self._corruption = PictureFolder(pictures), processor, corruption
        values = read_records(rows)
        self._rows: list[_Pair] = []
        problems = []
        for number, value in enumerate(values):
            try:
                self._rows.append(_pair(value))
            except DataError as error:
                problems.append(f"row {number}: {error}")
        if problems:
            listed = "\n  ".join(shortened(problems))
            raise DataError(f"{rows} has {len(problems)} rows that are no pairs:\n  {listed}")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Digest the rows, and how pictures are spoilt."""
        return hashlib.sha256((json.dumps(self._rows) + repr(self._corruption)).encode()).hexdigest()

    def sample(self, index: int) -> PreferenceSample:
        """Build a pair. Raises: DataError, ImageError, PromptError."""
        record, chosen, rejected = self._rows[index]
        asked = conversation_of(record, [self._pictures.read(name) for name in picture_names(record)])
        return preference_sample(self._processor, asked, chosen, rejected, corruption=self._corruption)

    def talk(self, index: int) -> Conversation:
        """Build the conversation with the better answer, pictures included."""
        record, chosen, _ = self._rows[index]
        asked = conversation_of(record, [self._pictures.read(name) for name in picture_names(record)])
        return Conversation((*asked.messages, Message("assistant", (TextPart(chosen),))))

    def decode(self, index: int) -> None:
        """Decode a pair's pictures as a sample would. Raises: ImageError."""
        for name in picture_names(self._rows[index][0]):
            self._processor.check_image(self._pictures.read(name))

    def measure(self, index: int) -> Measures:
        """Measure a pair without decoding a picture."""
        record, chosen, rejected = self._rows[index]
        names = picture_names(record)
        try:
            grids = self._pictures.grids(names, self._processor)
            pair = encode_pair(self._processor, conversation_of(record, [_NO_BYTES] * len(names)), chosen, rejected, grids)
            sample = PreferenceSample(*pair, _NO_TILES, tuple(grids), _NO_TILES if grids and self._corruption is not None else None)
        except LlavaError as error:
            kind = "picture" if isinstance(error, ImageError) else "order" if isinstance(error, PromptError) else "pair"
            return Measures(0, 0, 0, (Fault(kind, str(error), is_fatal=True),))
        return Measures(sample.num_tokens, sum(sum(answered.loss_mask) for answered in pair), sum(map(num_tiles, grids)))


def _pair(value: Any) -> _Pair:
    """Bring a row into LLaVA's form. Raises: DataError."""
    if isinstance(value, dict) and isinstance(value.get("text"), str) and "chosen" not in value:
        try:
            value = {**value, **json.loads(value["text"])}
        except ValueError as error:
            raise DataError(f"its field text is no JSON: {error}") from error
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise DataError("needs chosen and rejected, and conversations, prompt or question before them")
    image = value.get("image", value.get("images", value.get("image_path")))
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"its pictures must be file names, got {image!r:.80}")
    turns = _turns(value, len(names))
    if not turns or turns[-1]["from"] != "human":
        raise DataError("the prompt must end with a question of the user")
    return {"image": names or None, "conversations": turns}, _answer(value["chosen"]), _answer(value["rejected"])


def _turns(value: Mapping[str, Any], num_pictures: int) -> list[dict[str, str]]:
    turns: list[dict[str, str]]
    if isinstance(value.get("conversations"), list):
        turns = value["conversations"]
    elif isinstance(prompt := value.get("prompt", value.get("question")), str):
        turns = [{"from": "human", "value": prompt}]
    elif isinstance(prompt, list):
        turns = [turn_of_message(message) for message in prompt]
    else:
        raise DataError("needs conversations, prompt or question")
    speakers = ("human", "gpt", "system")
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in speakers for turn in turns):
        raise DataError('turns need "from" (human or gpt) and "value" (text)')
    num_marks = sum(turn["value"].count(_MARKER) for turn in turns)
    if num_marks not in (0, num_pictures):
        raise DataError(f"has {num_marks} {_MARKER} marks but {num_pictures} pictures")
    if num_marks == 0 and num_pictures and turns:
        turns = [{**turns[0], "value": f"{_MARKER}\n" * num_pictures + turns[0]["value"]}, *turns[1:]]
    return turns


def _answer(value: Any) -> str:
    """Return an answer given as text, or as the message that it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        return content_text(value[-1].get("content"))
    raise DataError(f"an answer must be a text, or messages that end with the assistant's, got {value!r:.80}")
