"""From conversations, texts and ids to requests of one model.

Owns: RequestFactory. Decoding pictures and preparing forms is work, so servers make requests off the loop; a factory may be used by
several threads. Refuses: running them (engine).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image

from llavakit.engine.constraint import Grammars
from llavakit.engine.request import Request, Terms
from llavakit.processing.processor import LlavaProcessor, Prompt
from llavakit.processing.text import TextProcessor
from llavakit.types import Conversation, SamplingParams

__all__ = ["RequestFactory", "text_ids"]


class RequestFactory:
    """Makes requests with a model's processor, end tokens and context."""

    def __init__(self, processor: LlavaProcessor | TextProcessor, end_ids: Iterable[int], context_len: int) -> None:
        """Take the ids that end an answer besides the processor's, and the positions of prompt and answer together."""
        self.processor, self.context_len = processor, context_len
        self.end_ids = processor.end_ids | frozenset(end_ids)
        self.grammars = Grammars(processor.tokenizer, self.end_ids)

    def chat(
        self,
        conversation: Conversation,
        params: SamplingParams | None = None,
        *,
        images: Sequence[Image.Image] | None = None,
        tenant: str = "",
        adapter: str = "",
    ) -> Request:
        """Make the request that answers a conversation; images are its pictures where they are decoded already.

        Raises: PromptError, ImageError.
        """
        if images and isinstance(self.processor, LlavaProcessor):
            prompt = self.processor.prompt_of_images(conversation, images, max_len=self.context_len - 1)
        else:
            prompt = self.processor.prompt(conversation, max_len=self.context_len - 1)
        return self._request(prompt, params, tenant=tenant, adapter=adapter)

    def text(
        self, prompt: str | Prompt | Sequence[int], params: SamplingParams | None = None, *, tenant: str = "", adapter: str = ""
    ) -> Request:
        """Make the request that continues a text (after bos where the model's prompts have it), ids, or a prompt. Raises: PromptError."""
        return self._request(self.prompt(prompt), params, tenant=tenant, adapter=adapter)

    def scored(self, answered: Conversation, asked: Prompt, *, tenant: str = "", adapter: str = "") -> Request:
        """Make the request that scores a conversation's last answer; asked is the prompt before it. Raises: PromptError."""
        prompt = self.processor.answered(answered, asked)
        # The last stretch that a model learns is the answer; earlier ones are earlier answers.
        stop = len(prompt.ids) - prompt.loss_mask[::-1].index(True)
        unlearned = (index for index in range(stop, 0, -1) if not prompt.loss_mask[index - 1])
        return self._request(prompt, None, tenant=tenant, adapter=adapter, scored_from=next(unlearned, 1))

    def prompt(self, prompt: str | Prompt | Sequence[int]) -> Prompt:
        """Make the prompt that text() continues."""
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            prompt = text_ids(self.processor, prompt)
        return Prompt(tuple(prompt), (False,) * len(prompt), torch.empty(0, 3, 1, 1))

    def _request(
        self, prompt: Prompt, params: SamplingParams | None, *, tenant: str, adapter: str, scored_from: int | None = None
    ) -> Request:
        terms = Terms(
            context_len=self.context_len,
            end_ids=self.end_ids,
            tokenizer=self.processor.tokenizer,
            stops=self.processor.template.stops,
            constrain=self.grammars.constrain,
            scored_from=scored_from,
            tenant=tenant,
            adapter=adapter,
        )
        return Request(prompt, SamplingParams() if params is None else params, terms)


def text_ids(processor: LlavaProcessor | TextProcessor, text: str) -> list[int]:
    """Return the ids of a text that is to be continued: after bos where the model's prompts have it, nothing in it markup."""
    markers = processor.markers
    opening = [markers.bos] if markers.has_opening and markers.bos is not None else []
    return [*opening, *processor.tokenizer.encode_text(text)]
