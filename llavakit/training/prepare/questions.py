"""Sets of questions with short answers, as LLaVA-1.5's mixture has them: all about one picture is one conversation.

Owns: vqa_rows (VQAv2, OK-VQA), gqa_rows, aokvqa_rows, ocrvqa_rows, textcaps_rows. The form that an answer should have is asked for in
the first question of a conversation. Sources: arXiv 2310.03744, section 4 and table 7.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.training.prepare.published import LETTER_PROMPT, LeftOut, Row, coco_picture, listed, read_published, talk

__all__ = ["aokvqa_rows", "gqa_rows", "ocrvqa_rows", "textcaps_rows", "vqa_rows"]

_SHORT = "Answer the question using a single word or phrase."
_CAPTION = "Provide a one-sentence caption for the provided image."
_LETTERS = "ABCDEFGH"
_NUM_BOOKS = 80_000
_TRAIN = 1


def vqa_rows(name: str, questions: Path, annotations: Path) -> Iterator[Row | LeftOut]:
    """Read questions and answers in VQA's format; the answer is the one that most people gave."""
    answers = {note["question_id"]: note for note in listed(read_published(annotations), "annotations", annotations)}
    exchanges: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for question in listed(read_published(questions), "questions", questions):
        if question["question_id"] not in answers:
            yield LeftOut(f"of {name} without an answer")
            continue
        exchanges[question["image_id"]].append((question["question"], _usual_answer(answers[question["question_id"]])))
    for number, asked in exchanges.items():
        yield _talk(f"{name}-{number}", coco_picture(number), asked, _SHORT)


def gqa_rows(questions: Path) -> Iterator[Row]:
    """Read train_balanced_questions.json."""
    exchanges: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in read_published(questions).values():
        exchanges[question["imageId"]].append((question["question"], question["answer"]))
    for number, asked in exchanges.items():
        yield _talk(f"gqa-{number}", f"gqa/images/{number}.jpg", asked, _SHORT)


def aokvqa_rows(questions: Path) -> Iterator[Row]:
    """Read aokvqa_v1p0_train.json; each comes as often as it has choices, which are turned so that every letter is right once.

    That the choices are turned is ours: the paper says how often, not how.
    """
    by_picture: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for question in read_published(questions, list):
        by_picture[question["image_id"]].append(question)
    for number, asked in by_picture.items():
        for turn in range(max(len(question["choices"]) for question in asked)):
            exchanges = [_choice(question, turn) for question in asked if turn < len(question["choices"])]
            yield _talk(f"aokvqa-{number}-{turn}", coco_picture(number), exchanges, LETTER_PROMPT)


def ocrvqa_rows(books: Path, *, seed: int) -> Iterator[Row | LeftOut]:
    """Read dataset.json: 80,000 of the books for training, drawn."""
    table = read_published(books)
    known = sorted(name for name, book in table.items() if book["split"] == _TRAIN and book["questions"])
    chosen = sorted(random.Random(f"{seed}/ocrvqa").sample(known, min(_NUM_BOOKS, len(known))))
    yield from (LeftOut("of ocrvqa above 80,000") for _ in range(len(known) - len(chosen)))
    for name in chosen:
        exchanges = list(zip(table[name]["questions"], table[name]["answers"], strict=True))
        yield _talk(f"ocrvqa-{name}", f"ocr_vqa/images/{name}.jpg", exchanges, _SHORT)


def textcaps_rows(captions: Path, words: Path | None, *, seed: int) -> Iterator[Row]:
    """Read TextCaps_0.1_train.json, and the words that a reader of text found in the pictures (TextVQA_Rosetta_OCR_v0.2_train.json)."""
    found = {} if words is None else {note["image_id"]: note["ocr_tokens"] for note in listed(read_published(words), "data", words)}
    by_picture: defaultdict[str, list[str]] = defaultdict(list)
    for note in listed(read_published(captions), "data", captions):
        by_picture[note["image_id"]].append(note["caption_str"])
    for name, known in by_picture.items():
        request = _CAPTION if words is None else f"{_CAPTION}\nReference OCR token: {', '.join(found.get(name, ()))}"
        yield talk(f"textcaps-{name}", f"textvqa/train_images/{name}.jpg", [(request, random.Random(f"{seed}/{name}").choice(known))])


def _talk(name: str, image: str, exchanges: list[tuple[str, str]], form: str) -> Row:
    (question, answer), *others = exchanges
    return talk(name, image, [(f"{question}\n{form}", answer), *others])


def _usual_answer(note: Mapping[str, Any]) -> str:
    if "multiple_choice_answer" in note:
        return str(note["multiple_choice_answer"])
    given = [answer.get("raw_answer", answer.get("answer")) for answer in note["answers"]]
    if not given:
        raise DataError(f"question {note.get('question_id')} has no answers")
    return str(Counter(given).most_common(1)[0][0])


def _choice(question: Mapping[str, Any], turn: int) -> tuple[str, str]:
    choices = question["choices"]
    turned = [*choices[turn:], *choices[:turn]]
    place = (question["correct_choice_idx"] - turn) % len(choices)
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, turned, strict=False))
    return f"{question['question']}\n{lines}", _LETTERS[place]
