"""Instruction data: rows and their pictures, measured and made into samples.

Owns: RecordSource. Refuses: files (rows, pictures) and what a row means (forms).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llavakit.errors import InputError
from llavakit.geometry import ImageGrid, num_tiles
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.segments import EncodedChat
from llavakit.processing.text import TextProcessor
from llavakit.training.checks import Fault, Measures, fault_of, too_long
from llavakit.training.data import Sample, sample_of_prompt
from llavakit.training.exact import check_exact, exact_chat
from llavakit.training.forms import Row, row_of
from llavakit.training.pictures import Pictures, picture_bytes, picture_grids
from llavakit.training.rows import Rows
from llavakit.types import Conversation

__all__ = ["RecordSource", "text_warnings"]

_NO_BYTES = b""
_MARKUP = ("</s>", "<s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<<SYS>>", "###", "USER:", "ASSISTANT:", "<image>")


class RecordSource:
    """Samples of instruction data; sample(i) is row i."""

    def __init__(
        self,
        rows: Rows,
        pictures: Pictures,
        processor: LlavaProcessor | TextProcessor,
        *,
        max_sample_tokens: int | None = None,
        is_exact: bool = False,
    ) -> None:
        """With is_exact ids and masks are those of LLaVA's own code.

        Raises: CheckpointError for a template that the tokenizer lacks tokens of, ConfigError where LLaVA has no such template.
        """
        self._rows, self._pictures, self._processor = rows, pictures, processor
        self._most, self._is_exact = max_sample_tokens, is_exact
        assert processor.markers is not None  # a template that does not fit the tokenizer is told now, not as a fault of every row
        if is_exact:
            check_exact(processor)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Digest what the samples depend on, besides the processor and the pictures' contents."""
        return hashlib.sha256(f"{self._rows.digest} {self._pictures.digest} {self._most} {self._is_exact}".encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Build the sample of a row. Raises: DataError, ImageError, PromptError."""
        row, _ = row_of(self._rows.row(index))
        conversation = row.conversation(picture_bytes(self._pictures, row.pictures))
        prompt = self._processor.prompt(conversation, add_generation_prompt=False)
        if self._is_exact:
            chat = exact_chat(self._processor, row, prompt.grids)
            prompt = replace(prompt, ids=chat.ids, loss_mask=chat.loss_mask)
        return sample_of_prompt(prompt)

    def talk(self, index: int) -> Conversation:
        """Build a row's conversation, pictures included. Raises: DataError, ImageError, PromptError."""
        row, _ = row_of(self._rows.row(index))
        return row.conversation(picture_bytes(self._pictures, row.pictures))

    def measure(self, index: int) -> Measures:
        """Measure a row without decoding a picture; whatever is wrong with it is among the problems."""
        problems: list[Fault] = []
        name: str | int | None = None
        try:
            row, begins_with_answer = row_of(self._rows.row(index))
            name = row.id
            problems += _warnings(row, begins_with_answer=begins_with_answer)
            grids = picture_grids(self._pictures, row.pictures, self._processor)
            encoded = self._encode(row, grids)
        except InputError as error:
            return Measures(0, 0, 0, (*problems, fault_of(error, "form")), name)
        num_learned = sum(encoded.loss_mask[1:])
        if num_learned == 0:
            problems.append(Fault("nothing learned", "no token of it is learned", is_fatal=True))
        problems += too_long(len(encoded.ids), self._most)
        return Measures(len(encoded.ids), num_learned, sum(map(num_tiles, grids)), tuple(problems), name)

    def _encode(self, row: Row, grids: Sequence[ImageGrid]) -> EncodedChat:
        if self._is_exact:
            return exact_chat(self._processor, row, grids)
        conversation = row.conversation([_NO_BYTES] * len(row.pictures))
        return self._processor.encode_chat(conversation, grids, add_generation_prompt=False)[1]

    def decode(self, index: int) -> None:
        """Decode a row's pictures as a sample would. Raises: ImageError, DataError."""
        row, _ = row_of(self._rows.row(index))
        for data in picture_bytes(self._pictures, row.pictures):
            self._processor.check_image(data)


def _warnings(row: Row, *, begins_with_answer: bool) -> Iterator[Fault]:
    """Say what is odd about a row that trains all the same."""
    if begins_with_answer:
        yield Fault("opening answer", "it begins with an answer, which is left out", is_fatal=False)
    if row.turns[-1].role == "user":
        yield Fault("no last answer", "its last question has no answer", is_fatal=False)
    yield from text_warnings(row)


def text_warnings(row: Row) -> Iterator[Fault]:
    """Say what is odd about a row's texts."""
    for turn in row.turns:
        if turn.role == "user" and turn.parts == ("",):
            yield Fault("empty question", "a question is empty", is_fatal=False)
        if spelled := [mark for mark in _MARKUP if mark in turn.text]:
            yield Fault("markup in text", f"a text spells {spelled[0]}, which stays text", is_fatal=False)
