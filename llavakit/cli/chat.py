"""llava chat: a conversation in the terminal, with /image, /reset and /quit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llavakit.cli.options import ModelOptions, SamplingOptions, printable, read_image
from llavakit.engine.llm import LLM
from llavakit.errors import InputError
from llavakit.types import Conversation, ImagePart, Message, Part, SamplingParams, TextPart

__all__ = ["chat"]

_HELP = "/image PATH adds a picture to your next question, /reset starts over, /quit leaves"


def chat(
    image: Path | None = None,
    *,
    options: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
) -> None:
    """Talk with the model; questions come from stdin, one per line.

    Parameters
    ----------
    image
        A picture for the first question.
    """
    pending = [] if image is None else [ImagePart(read_image(image))]
    params = sampling.params()
    session = _Session(options.load(), params, pending)
    sys.stderr.write(f"llava: {_HELP}\n")
    for line in _lines():
        try:
            if session.take(line):
                return
        except InputError as error:  # what was typed was wrong; the conversation goes on
            sys.stderr.write(f"llava: {error}\n")


class _Session:
    """The conversation so far, and the pictures for the next question."""

    def __init__(self, llm: LLM, params: SamplingParams, pending: list[ImagePart]) -> None:
        self.llm, self.params, self.pending = llm, params, pending
        self.conversation: Conversation | None = None
        self.answer = ""

    def take(self, line: str) -> bool:
        """Act on one line; True means leave."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                return False
            case "/quit":
                return True
            case "/reset":
                self.conversation, self.pending = None, []
            case "/image":
                self.pending.append(ImagePart(read_image(Path(rest.strip()))))
            case _:
                self._ask(line)
        return False

    def _ask(self, question: str) -> None:
        parts: tuple[Part, ...] = (*self.pending, TextPart(question))
        asked = Conversation((Message("user", parts),)) if self.conversation is None else self.conversation.reply(self.answer, *parts)
        answer = ""
        for event in self.llm.stream(asked, self.params):
            answer += event.text
            sys.stdout.write(printable(event.text))
            sys.stdout.flush()
        sys.stdout.write("\n")
        self.conversation, self.answer, self.pending = asked, answer, []


def _lines() -> Iterator[str]:
    """Read stdin line by line, with a prompt where a person types."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
