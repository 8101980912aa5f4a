"""llava ask: one picture, one question, one answer."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llavakit.cli.options import ModelOptions, SamplingOptions, printable
from llavakit.storage.picture_file import read_picture
from llavakit.types import Completion, Conversation

__all__ = ["ask"]


def ask(
    image: Path,
    question: str,
    *,
    options: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    system: str | None = None,
    json: bool = False,
) -> None:
    """Ask a question about a picture; the answer streams to stdout, everything else goes to stderr.

    Parameters
    ----------
    image
        A JPEG, PNG, WebP, GIF or BMP file.
    question
        What to ask.
    system
        System text in place of the template's own.
    json
        Print one JSON object with text, finish_reason and token counts instead.
    """
    conversation = Conversation.ask(question, read_picture(image), system=system)
    params = sampling.params()
    llm = options.load()
    completion: Completion | None = None
    for event in llm.stream(conversation, params):
        if not json:
            sys.stdout.write(printable(event.text))
            sys.stdout.flush()
        completion = event.completion
    assert completion is not None
    if json:
        usage = {"prompt_tokens": completion.usage.prompt_tokens, "completion_tokens": completion.usage.completion_tokens}
        sys.stdout.write(json_format.dumps({"text": completion.text, "finish_reason": completion.finish_reason, "usage": usage}))
    sys.stdout.write("\n")
