"""Many questions from a file, answered into a file: exactly one row out for each row in, whatever interrupts it.

Owns: Questions (a JSON file or a folder of pictures), answer_all, and local_answers, which a model of this process gives. Finished answers
are kept in a journal beside the output until all are there; then the output appears whole, in the order of the input, and the journal goes.
Refuses: addresses; pictures are files below the folder of pictures.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llavakit.engine.llm import LLM
from llavakit.errors import ConfigError, DataError, StorageError
from llavakit.processing.decode import SUFFIXES
from llavakit.storage.folder import atomic_file
from llavakit.storage.journal import Journal
from llavakit.storage.json_rows import JsonRows
from llavakit.storage.picture_file import read_picture
from llavakit.types import Completion, Conversation, ImagePart, Message, Part, SamplingParams, TextPart

__all__ = ["Answers", "FolderQuestions", "Questions", "RowQuestions", "answer_all", "answer_row", "local_answers", "open_questions"]

_BATCH = 32
_RUN = "run"


class Questions(Protocol):
    """Questions by number."""

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """Tell these questions from others."""
        ...

    def head(self, index: int) -> dict[str, Any]:
        """Return what names a question in its answer's row."""
        ...

    def conversation(self, index: int) -> Conversation:
        """Build a question's conversation. Raises: DataError, ImageError, PromptError."""
        ...


class RowQuestions:
    """Rows of a .json or .jsonl file: messages, or a question (question, text or prompt) with image or images."""

    def __init__(self, file: Path, images: Path) -> None:
        self._rows, self._images = JsonRows(file), images.resolve()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Digest the file and the place of the pictures."""
        return hashlib.sha256(f"{self._rows.digest} {self._images}".encode()).hexdigest()

    def head(self, index: int) -> dict[str, Any]:
        """Return the row's number and its own id."""
        try:
            row = self._rows.row(index)
        except DataError:
            return {"row": index}
        named = {key: row[key] for key in ("id", "question_id") if key in row} if isinstance(row, dict) else {}
        return {"row": index, **named}

    def conversation(self, index: int) -> Conversation:
        """Build a row's conversation. Raises: DataError, ImageError, PromptError."""
        row = self._rows.row(index)
        if not isinstance(row, dict):
            raise DataError(f"a row must be a table, got {row!r:.80}")
        if isinstance(row.get("messages"), list):
            return Conversation(tuple(map(self._message, row["messages"])))
        text = next((row[key] for key in ("question", "text", "prompt") if isinstance(row.get(key), str)), None)
        if text is None:
            raise DataError("a row needs messages, or a question: question, text or prompt")
        named = row.get("image", row.get("images"))
        names = [] if named is None else named if isinstance(named, list) else [named]
        system = row.get("system")
        if system is not None and not isinstance(system, str):
            raise DataError(f"system must be a text, got {system!r:.80}")
        return Conversation.ask(text, *map(self._picture, names), system=system)

    def _message(self, value: Any) -> Message:
        role = value.get("role") if isinstance(value, dict) else None
        if role not in ("system", "user", "assistant"):
            raise DataError(f"messages need a role (user, assistant or system), got {value!r:.80}")
        content = value.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise DataError(f"content must be a text or a list of parts, got {content!r:.80}")
        return Message(role, tuple(map(self._part, parts)))

    def _part(self, part: Any) -> Part:
        match part:
            case {"type": "text", "text": str(text)}:
                return TextPart(text)
            case {"type": "image", "path": name} | {"type": "image", "image": name} | {"type": "image_url", "image_url": {"url": name}}:
                return ImagePart(self._picture(name))
        raise DataError(f"parts are of type text with a text, or image with a path, got {part!r:.80}")

    def _picture(self, name: Any) -> bytes:
        if not isinstance(name, str):
            raise DataError(f"a picture is a file name, got {name!r:.80}")
        return _read(self._images, name)


class FolderQuestions:
    """One question about every picture of a folder."""

    def __init__(self, folder: Path, question: str) -> None:
        """Find the pictures, in the order of their names. Raises: DataError where there are none."""
        self._folder, self._question = folder.resolve(), question
        files = (path for path in self._folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self._names = sorted(path.relative_to(self._folder).as_posix() for path in files)
        if not self._names:
            raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def digest(self) -> str:
        """Digest the question and the names of the pictures."""
        return hashlib.sha256(json.dumps([str(self._folder), self._question, self._names]).encode()).hexdigest()

    def head(self, index: int) -> dict[str, Any]:
        """Return the picture's name."""
        return {"row": index, "image": self._names[index]}

    def conversation(self, index: int) -> Conversation:
        """Ask the question about a picture. Raises: DataError, ImageError."""
        return Conversation.ask(self._question, _read(self._folder, self._names[index]))


def open_questions(place: Path, *, images: Path | None = None, question: str | None = None) -> Questions:
    """Open a file of rows, or a folder of pictures with a question about each. Raises: ConfigError, DataError."""
    if place.is_dir():
        if question is None:
            raise ConfigError(f"{place} is a folder; say what to ask about each picture with --question")
        return FolderQuestions(place, question)
    if question is not None:
        raise ConfigError(f"the rows of {place} have questions of their own; leave --question out")
    if place.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"questions are a folder of pictures, .json or .jsonl, got {place}")
    return RowQuestions(place, place.parent if images is None else images)


Answers = Callable[[Sequence[int]], Iterator[tuple[int, Mapping[str, Any]]]]
"""answers(numbers) -> each question's number and what its row says besides its head, as they are finished."""


def answer_all(
    answers: Answers, questions: Questions, output: Path, who: Mapping[str, Any], *, advance: Callable[[int], object] = lambda count: count
) -> int:
    """Answer every question into output, one JSON row each, going on where an earlier call was interrupted; returns how many failed.

    who says in the journal who answers, and how, so that nobody else goes on. advance hears how many more are done.
    Raises: StorageError where output is there already or the journal belongs to another run; DataError.
    """
    if output.exists():
        raise StorageError(f"{output} is there already; choose another name, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    journal_path = output.with_name(f".{output.name}.journal")
    run = json.loads(json.dumps({"questions": questions.digest, **who}))
    with Journal(journal_path) as journal:
        if not journal.put(_RUN, run) and journal.get(_RUN) != run:
            raise StorageError(f"{journal_path} belongs to a run with other questions, model or parameters; remove it to start over")
        missing = [index for index in range(len(questions)) if str(index) not in journal]
        advance(len(questions) - len(missing))
        _fill(answers, missing, journal, advance)
        num_failed = _write(questions, journal, output)
    for suffix in ("", "-wal", "-shm"):
        journal_path.with_name(journal_path.name + suffix).unlink(missing_ok=True)
    return num_failed


def local_answers(llm: LLM, questions: Questions, params: SamplingParams, *, adapter: str = "") -> Answers:
    """Answer with a model of this process."""

    def answers(numbers: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        builders = (functools.partial(questions.conversation, index) for index in numbers)
        for place, completion in llm.chat_each(builders, params, adapter=adapter):
            yield numbers[place], answer_row(completion)

    return answers


def answer_row(completion: Completion) -> dict[str, Any]:
    """Return what a row says of an answer."""
    usage = {"prompt_tokens": completion.usage.prompt_tokens, "completion_tokens": completion.usage.completion_tokens}
    others = {"others": [other.text for other in completion.others]} if completion.others else {}
    failed = {} if completion.error is None else {"error": completion.error}
    return {"text": completion.text, **others, "finish_reason": completion.finish_reason, "usage": usage, **failed}


def _fill(answers: Answers, missing: Sequence[int], journal: Journal, advance: Callable[[int], object]) -> None:
    finished: dict[str, Any] = {}
    try:
        for number, row in answers(missing):
            finished[str(number)] = row
            if len(finished) >= _BATCH:
                advance(journal.put_many(finished))
                finished = {}
    finally:
        advance(journal.put_many(finished))


def _write(questions: Questions, journal: Journal, output: Path) -> int:
    num_failed = 0
    with atomic_file(output) as file:
        for row in _rows(questions, journal):
            num_failed += "error" in row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return num_failed


def _rows(questions: Questions, journal: Journal) -> Iterator[dict[str, Any]]:
    for index in range(len(questions)):
        yield {**questions.head(index), **journal.get(str(index))}


def _read(folder: Path, name: str) -> bytes:
    """Read a picture of a folder. Raises: DataError for one outside, ImageError for what is no file to read."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read picture {name!r}: {error}") from error
    if not path.is_relative_to(folder):
        raise DataError(f"picture {name!r} lies outside {folder}")
    return read_picture(path)
