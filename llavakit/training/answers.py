"""What a trained model answers to some of the questions that it was trained on: a look, no measurement.

Owns: write_answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavakit.engine.llm import LLM
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.types import Conversation, Message, SamplingParams

__all__ = ["write_answers"]

_MAX_TOKENS = 128
_CACHE_BYTES = 1 << 30


def write_answers(
    core: LlamaCore | LlavaCore, processor: LlavaProcessor | TextProcessor, talks: Sequence[Conversation], destination: Path
) -> None:
    """Ask the last question of each conversation and write question, expected and given answer as Markdown."""
    asked = [_before_last_answer(talk) for talk in talks]
    llm = LLM.of(core.eval(), processor, max_batch=len(asked), kv_memory=_CACHE_BYTES)
    given = llm.chat([question for question, _ in asked], SamplingParams(max_tokens=_MAX_TOKENS))
    parts = ["# Answers of the trained model to questions that it was trained on\n"]
    for (question, expected), completion in zip(asked, given, strict=True):
        pictures = f" ({len(question.images)} pictures)" if question.images else ""
        answer = completion.text if completion.error is None else f"(no answer: {completion.error})"
        parts.append(f"**Asked**{pictures}: {question.messages[-1].text}\n\n**Trained on**: {expected}\n\n**Answers**: {answer}\n")
    destination.write_text("\n---\n\n".join(parts), encoding="utf-8")


def _before_last_answer(talk: Conversation) -> tuple[Conversation, str]:
    messages: tuple[Message, ...] = talk.messages
    last = max(place for place, message in enumerate(messages) if message.role == "assistant")
    return Conversation(messages[:last]), messages[last].text
