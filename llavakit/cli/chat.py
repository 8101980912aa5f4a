"""llava chat: a conversation in the terminal, with /image, /reset and /quit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llavakit.cli.options import ModelOptions, SamplingOptions, printable
from llavakit.engine.llm import LLM
from llavakit.errors import InputError
from llavakit.storage.picture_file import read_picture
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
    data = None if image is None else read_picture(image)
    params = sampling.params()
    llm = options.load()
    session = _Session(llm, params)
    if not llm.processor.template.holds_talks:
        sys.stderr.write(f"llava: {llm.processor.template.name!r} holds no conversations: each line starts afresh; see --template\n")
    if data is not None:
        session.add_picture(data)
    sys.stderr.write(f"llava: {_HELP}\n")
    for line in _lines():
        try:
            if session.take(line):
                return
        except InputError as error:  # what was typed was wrong; the conversation goes on
            sys.stderr.write(f"llava: {error}\n")


class _Session:
    """The conversation so far, and the pictures for the next question."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.llm, self.params = llm, params
        self.pending: list[ImagePart] = []
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
                self.add_picture(read_picture(Path(rest.strip())))
            case _:
                self._ask(line)
        return False

    def add_picture(self, data: bytes) -> None:
        """Keep a picture for the next question. Raises: InputError for one that the model could not be asked about."""
        self.llm.processor.check_image(data)
        self.pending.append(ImagePart(data))

    def _ask(self, question: str) -> None:
        parts: tuple[Part, ...] = (*self.pending, TextPart(question))
        past = self.conversation if self.llm.processor.template.holds_talks else None
        asked = Conversation((Message("user", parts),)) if past is None else past.reply(self.answer, *parts)
        answer = ""
        try:
            for event in self.llm.stream(asked, self.params):
                answer += event.text
                sys.stdout.write(printable(event.text))
                sys.stdout.flush()
        except InputError:
            if self.pending:
                sys.stderr.write("llava: the question's pictures are dropped; /image adds them again\n")
                self.pending = []
            raise
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
