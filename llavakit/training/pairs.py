"""Preference data: one prompt, a better and a worse answer, measured and made into samples.

Owns: PairSource. Refuses: files (rows, pictures) and what a row means (forms).
"""

from __future__ import annotations

import hashlib

import torch

from llavakit.errors import InputError
from llavakit.geometry import num_tiles
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.training.checks import Fault, Measures, fault_of, too_long
from llavakit.training.forms import pair_of
from llavakit.training.pictures import Pictures, picture_bytes, picture_grids
from llavakit.training.preference import PreferenceSample, encode_pair, preference_sample
from llavakit.training.preference_config import CorruptionConfig
from llavakit.training.records import text_warnings
from llavakit.training.rows import Rows
from llavakit.types import Conversation, Message, TextPart

__all__ = ["PairSource"]

_NO_BYTES = b""
_NO_TILES = torch.empty(0, 3, 1, 1)


class PairSource:
    """Samples of preference data; sample(i) is row i."""

    def __init__(
        self,
        rows: Rows,
        pictures: Pictures,
        processor: LlavaProcessor | TextProcessor,
        *,
        corruption: CorruptionConfig | None = None,
        max_sample_tokens: int | None = None,
    ) -> None:
        assert processor.markers is not None  # a template that does not fit the tokenizer is told now
        self._rows, self._pictures, self._processor = rows, pictures, processor
        self._corruption, self._most = corruption, max_sample_tokens

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Digest what the samples depend on, besides the processor and the pictures' contents."""
        return hashlib.sha256(f"{self._rows.digest} {self._pictures.digest} {self._corruption!r} {self._most}".encode()).hexdigest()

    def sample(self, index: int) -> PreferenceSample:
        """Build a pair. Raises: DataError, ImageError, PromptError."""
        pair = pair_of(self._rows.row(index))
        asked = pair.asked.conversation(picture_bytes(self._pictures, pair.asked.pictures))
        return preference_sample(self._processor, asked, pair.chosen, pair.rejected, corruption=self._corruption)

    def talk(self, index: int) -> Conversation:
        """Build the conversation with the better answer, pictures included. Raises: DataError, ImageError, PromptError."""
        pair = pair_of(self._rows.row(index))
        asked = pair.asked.conversation(picture_bytes(self._pictures, pair.asked.pictures))
        return Conversation((*asked.messages, Message("assistant", (TextPart(pair.chosen),))))

    def measure(self, index: int) -> Measures:
        """Measure a pair without decoding a picture; whatever is wrong with it is among the problems."""
        problems: list[Fault] = []
        name: str | int | None = None
        try:
            pair = pair_of(self._rows.row(index))
            name, problems = pair.asked.id, list(text_warnings(pair.asked))
            grids = picture_grids(self._pictures, pair.asked.pictures, self._processor)
            asked = pair.asked.conversation([_NO_BYTES] * len(grids))
            both = encode_pair(self._processor, asked, pair.chosen, pair.rejected, grids)
            sample = PreferenceSample(*both, _NO_TILES, tuple(grids), _NO_TILES if grids and self._corruption is not None else None)
        except InputError as error:
            return Measures(0, 0, 0, (*problems, fault_of(error, "pair")), name)
        problems += too_long(sample.num_tokens, self._most)
        num_learned = sum(sum(answered.loss_mask) for answered in both)
        return Measures(sample.num_tokens, num_learned, sum(map(num_tiles, grids)), tuple(problems), name)

    def decode(self, index: int) -> None:
        """Decode a pair's pictures as a sample would. Raises: DataError, ImageError."""
        for data in picture_bytes(self._pictures, pair_of(self._rows.row(index)).asked.pictures):
            self._processor.check_image(data)
