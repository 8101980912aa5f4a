"""TextProcessor: what LlavaProcessor is to LLaVA, for a language model without pictures.

Owns: prompts of conversations through the checkpoint's own chat template. Refuses: pictures, cutting prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self, Unpack

import torch

from llavakit.errors import LengthError, PromptError
from llavakit.geometry import ImageGrid
from llavakit.processing.chat import ChatTemplate
from llavakit.processing.own_template import template_of_text_checkpoint
from llavakit.processing.processor import Prompt
from llavakit.processing.segments import EncodedChat, MarkerIds, Segment, encode_segments
from llavakit.processing.tokenizer.load import load_tokenizer
from llavakit.processing.tokenizer.vocabulary import Tokenizer
from llavakit.storage.hub import HubArguments, resolve_model
from llavakit.types import Conversation

__all__ = ["TextProcessor"]

_NO_IMAGE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class TextProcessor:
    """Tokenizer and chat template of a language model."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @functools.cached_property
    def markers(self) -> MarkerIds:
        """The ids of the template's markers. Raises: CheckpointError where the tokenizer lacks one."""
        return self.template.markers(self.tokenizer, _NO_IMAGE)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's eos and the template's end tokens."""
        return self.template.end_ids(self.markers)

    def check_image(self, data: bytes) -> NoReturn:
        """Refuse a picture. Raises: PromptError."""
        del data
        raise PromptError("this model is a language model without a vision tower; ask without a picture")

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[ImageGrid]:
        """Refuse pictures. Raises: PromptError."""
        for _ in sizes:
            self.check_image(b"")
        return []

    def prompt(self, conversation: Conversation, *, add_generation_prompt: bool = True, max_len: int | None = None) -> Prompt:
        """Build the prompt of a conversation. Raises: PromptError for pictures, and when it exceeds max_len tokens."""
        encoded = self.encode_chat(conversation, (), add_generation_prompt=add_generation_prompt)[1]
        if max_len is not None and len(encoded.ids) > max_len:
            raise LengthError(f"the prompt has {len(encoded.ids)} tokens, at most {max_len} fit; shorten the conversation")
        return Prompt(encoded.ids, encoded.loss_mask, torch.empty(0, 3, 1, 1))

    def tile_bytes(self, grids: Sequence[ImageGrid]) -> int:
        """Return 0: there are no pictures."""
        del grids
        return 0

    def encode_chat(
        self, conversation: Conversation, grids: Sequence[ImageGrid], *, add_generation_prompt: bool = True
    ) -> tuple[list[Segment], EncodedChat]:
        """Build a conversation's segments and their ids, as LlavaProcessor does. Raises: PromptError for pictures."""
        del grids
        for image in conversation.images:
            self.check_image(image.data)
        segments = self.template.segments(conversation, add_generation_prompt=add_generation_prompt)
        return segments, encode_segments(segments, self.tokenizer.encode_text, self.markers, ())

    def answered(self, conversation: Conversation, asked: Prompt) -> Prompt:
        """Build the prompt of a conversation after its answer."""
        del asked
        return self.prompt(conversation, add_generation_prompt=False)

    @classmethod
    def from_pretrained(cls, model: str | Path, *, template: ChatTemplate | None = None, **hub: Unpack[HubArguments]) -> Self:
        """Load the tokenizer of a folder or hub id, and its own chat template unless one is given.

        Raises: CheckpointError.
        """
        folder = resolve_model(model, parts="processor", **hub)
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer=tokenizer, template=template_of_text_checkpoint(folder, tokenizer, named=template).template)
