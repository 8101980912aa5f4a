"""Questions about a picture, written from its truth, with answers in plain English and the key by which a reply is graded.

Owns: eleven kinds of question, their wordings, their answers, conclude() and is_right().
Answers that count, compare or subtract first say what they are about, step by step, and then conclude, because a small model that
lists looks things up: asked for the conclusion alone, or for two steps in one, it stays at chance.
Invariant: every question here has exactly one right key; ambiguous ones (two red stars, a centre on a border) are not asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from llavakit.world.scenes import COLORS, DIGITS, LETTERS, SHAPES, WORDS
from llavakit.world.truth import REGIONS, LabeledBox, Truth, listing, place_of

__all__ = ["KINDS", "Question", "ask", "conclude", "is_right"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question: the answer is what a good model says, the key what a right reply must conclude."""

    kind: str
    text: str
    answer: str
    key: str


@dataclass(frozen=True, slots=True)
class _Group:
    """Things that a question is about: their name in the singular and plural, and which they are."""

    one: str
    many: str
    boxes: tuple[LabeledBox, ...]


def ask(truth: Truth, kind: str, rng: random.Random) -> Question | None:
    """Write a question of one kind, or None where the picture allows none without ambiguity."""
    return _WRITERS[kind](truth, rng)


def is_right(question: Question, reply: str) -> bool:
    """Decide whether a reply concludes what the question's answer concludes."""
    return conclude(question.kind, reply) == question.key


def conclude(kind: str, reply: str) -> str:
    """Reduce a reply to its conclusion; an empty string where it has none."""
    match kind:
        case "count" | "count_of" | "reason":
            return _last(r"\d+", reply)
        case "exist" | "side" | "compare":
            return _last(r"\b(?:yes|no)\b(?! \w)", reply.lower())
        case "color":
            return "none" if _denies(reply) else _last(rf"\b(?:{'|'.join(COLORS)})\b", reply.lower())
        case "where":
            return "none" if _denies(reply) else _last("|".join(sorted(REGIONS, key=len, reverse=True)), reply.lower())
        case "what" | "read":
            return "none" if _denies(reply) else _last(_NOUN, reply)
        case _:
            return _things_key(re.findall(rf"\b({'|'.join(COLORS)}) ({_NOUN})", reply))


_NOUN = rf"\b(?:(?:{'|'.join(SHAPES)})\b|digit [0-9]\b|letter [A-Z]\b|word [A-Z]+\b)"


def _last(pattern: str, reply: str) -> str:
    found = re.findall(pattern, reply)
    return found[-1] if found else ""


def _denies(reply: str) -> bool:
    return "there is no " in reply.lower()


def _things_key(things: list[tuple[str, str]]) -> str:
    return ", ".join(sorted(f"{color} {noun}" for color, noun in things))


def _count(truth: Truth, rng: random.Random) -> Question:
    text = rng.choice(
        (
            "How many things are there?",
            "How many objects are in the picture?",
            "How many objects are there?",
            "Count the objects.",
            "How many things do you see?",
            "What is the number of objects?",
        )
    )
    return Question("count", text, _tally(_everything(truth)), str(len(truth.boxes)))


def _count_of(truth: Truth, rng: random.Random) -> Question:
    group = _draw_group(truth, rng)
    text = rng.choice(
        (
            "How many {} are there?",
            "How many {} do you see?",
            "Count the {}.",
            "How many {} are in the picture?",
            "What is the number of {}?",
        )
    ).format(group.many)
    return Question("count_of", text, _tally(group), str(len(group.boxes)))


def _exist(truth: Truth, rng: random.Random) -> Question:
    if rng.random() < 0.35:
        group = _draw_group(truth, rng)
        one, looked_at, is_true = group.one, group.boxes, bool(group.boxes)
    else:
        shapes = truth.where(kind="shape")
        name = rng.choice(shapes).name if shapes and rng.random() < 0.75 else rng.choice(SHAPES)
        looked_at = truth.where(name=name)
        color = rng.choice(looked_at).color if looked_at and rng.random() < 0.6 else rng.choice(COLORS)
        one, is_true = f"{color} {name}", bool(truth.where(name=name, color=color))
    text = rng.choice(
        ("Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?", "Does the picture show {}?")
    ).format(_article(one))
    key = "yes" if is_true else "no"
    return Question("exist", text, f"I see {listing(looked_at) if looked_at else f'no {one}'}, so {key}.", key)


def _color(truth: Truth, rng: random.Random) -> Question | None:
    noun, thing = _draw_unique_noun(truth, rng)
    if noun is None:
        return None
    text = rng.choice(
        (
            "What color is the {}?",
            "What is the color of the {}?",
            "Which color does the {} have?",
            "Which color is the {}?",
            "Tell me the color of the {}.",
        )
    ).format(noun)
    if thing is None:
        return Question("color", text, f"There is no {noun}.", "none")
    return Question("color", text, f"The {noun} is {thing.color}.", thing.color)


def _what(truth: Truth, rng: random.Random) -> Question | None:
    if rng.random() < 0.3:
        return _what_there(truth, rng)
    color = rng.choice(truth.boxes).color if rng.random() < 0.9 else rng.choice(COLORS)
    things = truth.where(color=color)
    if len(things) > 1:
        return None
    text = rng.choice(
        ("What is the {} thing?", "What is {}?", "Which object is {}?", "What is the {} object?", "What shape or sign is {}?")
    ).format(color)
    if not things:
        return Question("what", text, f"There is no {color} thing.", "none")
    return Question("what", text, f"It is a {things[0].noun}.", things[0].noun)


def _what_there(truth: Truth, rng: random.Random) -> Question | None:
    region = rng.choice(truth.boxes).region if rng.random() < 0.9 else rng.choice(REGIONS)
    things = truth.where(region=region)
    if len(things) > 1 or not all(box.is_clearly_placed for box in truth.boxes):
        return None
    place = place_of(region)
    text = rng.choice(("What is {}?", "What do you see {}?", "Which object is {}?", "What is there {}?")).format(place)
    if not things:
        return Question("what", text, f"There is no thing {place}.", "none")
    return Question("what", text, f"It is {things[0].label}.", things[0].noun)


def _where(truth: Truth, rng: random.Random) -> Question | None:
    if rng.random() < 0.08:
        color, name = rng.choice(COLORS), rng.choice(SHAPES)
        if truth.where(color=color, name=name):
            return None
        return Question("where", _where_text(f"{color} {name}", rng), f"There is no {color} {name}.", "none")
    thing = rng.choice(truth.boxes)
    if not thing.is_clearly_placed or len(truth.where(color=thing.color, noun=thing.noun)) > 1:
        return None
    return Question("where", _where_text(_name(truth, thing, rng), rng), f"It is {thing.place}.", thing.region)


def _where_text(noun: str, rng: random.Random) -> str:
    return rng.choice(
        (
            "Where is the {}?",
            "Where in the picture is the {}?",
            "Where do you see the {}?",
            "In which part of the picture is the {}?",
            "Where can I find the {}?",
        )
    ).format(noun)


def _side(truth: Truth, rng: random.Random) -> Question | None:
    unique = [box for box in truth.boxes if len(truth.where(color=box.color, noun=box.noun)) == 1 and box.is_clearly_placed]
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    axis = rng.randint(0, 1)
    if first.cell[1 - axis] == second.cell[1 - axis] or abs(first.center[axis] - second.center[axis]) < 0.15:
        return None
    is_before, asks_before = first.center[axis] < second.center[axis], rng.random() < 0.5
    key = "yes" if is_before == asks_before else "no"
    one, other = _name(truth, first, rng), _name(truth, second, rng)
    text = rng.choice(("Is the {} {} the {}?", "Do you see the {} {} the {}?", "Is it true that the {} is {} the {}?")).format(
        one, (("right of", "left of"), ("below", "above"))[axis][asks_before], other
    )
    # The two are said in the order that was asked about, so that the conclusion is whether the first one comes first.
    names = (("at the left", "in the middle", "at the right"), ("at the top", "in the middle", "at the bottom"))[axis]
    places = f"The {one} is {names[first.cell[1 - axis]]} and the {other} is {names[second.cell[1 - axis]]}."
    way = (("right to left", "left to right"), ("bottom to top", "top to bottom"))[axis][asks_before]
    in_order = f"the {one} and the {other}" if key == "yes" else f"the {other} and the {one}"
    return Question("side", text, f"{places} From {way} I see {in_order}, so {key}.", key)


def _compare(truth: Truth, rng: random.Random) -> Question | None:
    first, second = _draw_group(truth, rng), _draw_group(truth, rng)
    if first.many == second.many or not (first.boxes or second.boxes):
        return None
    more, fewer = len(first.boxes) > len(second.boxes), len(first.boxes) < len(second.boxes)
    forms = (
        ("Are there more {} than {}?", more),
        ("Do you see more {} than {}?", more),
        ("Are there fewer {} than {}?", fewer),
        ("Are there as many {} as {}?", not more and not fewer),
    )
    wanted = rng.random() < 0.5
    form, is_true = rng.choice([form for form in forms if form[1] == wanted])
    key = "yes" if is_true else "no"
    return Question("compare", form.format(first.many, second.many), f"{_tally(first)} {_tally(second)} So {key}.", key)


def _read(truth: Truth, rng: random.Random) -> Question | None:
    kind = rng.choice(("digit", "letter", "word"))
    things = truth.where(kind=kind)
    if len(things) > 1 or (not things and rng.random() < 0.85):
        return None
    text = rng.choice(
        ("Which {} is in the picture?", "What {} do you see?", "Read the {}.", "What is the {}?", "Which {} is there?")
    ).format(kind)
    if not things:
        return Question("read", text, f"There is no {kind}.", "none")
    return Question("read", text, f"It is the {things[0].noun}.", things[0].noun)


def _describe(truth: Truth, rng: random.Random) -> Question:
    text = rng.choice(
        (
            "Describe the picture.",
            "What do you see?",
            "What is in the picture?",
            "Describe the scene.",
            "What is there?",
            "Describe the image in detail.",
            "Please describe what is in this image.",
            "List everything in the picture.",
        )
    )
    key = _things_key([(box.color, box.noun) for box in truth.boxes])
    return Question("describe", text, f"I see {listing(truth.boxes)}.", key)


def _reason(truth: Truth, rng: random.Random) -> Question | None:
    group = _draw_group(truth, rng)
    if rng.random() < 0.6:
        text = rng.choice(
            (
                "Without the {}, how many are left?",
                "If I take away the {}, how many things are left?",
                "How many things are left without the {}?",
                "How many things remain when the {} are removed?",
            )
        ).format(group.many)
        left = len(truth.boxes) - len(group.boxes)
        steps = f"{_tally(_everything(truth))} {_tally(group)} So {left} {'is' if left == 1 else 'are'} left."
        return Question("reason", text, steps, str(left))
    count, extra = len(group.boxes), rng.randint(1, 2)
    if rng.random() < 0.5:
        text = f"If I add {('one', 'two')[extra - 1]} more, how many {group.many} are there?"
        return Question("reason", text, f"{_tally(group)} With {extra} more it is {count + extra}.", str(count + extra))
    if count < extra:
        return None
    text = f"If I take away {('one', 'two')[extra - 1]}, how many {group.many} are left?"
    return Question("reason", text, f"{_tally(group)} With {extra} less it is {count - extra}.", str(count - extra))


def _tally(group: _Group) -> str:
    seen = listing(group.boxes) if group.boxes else f"no {group.one}"
    return f"I see {seen}. That makes {len(group.boxes)}."


def _everything(truth: Truth) -> _Group:
    return _Group("thing", "things", truth.boxes)


def _draw_group(truth: Truth, rng: random.Random) -> _Group:
    """Draw a group by colour, shape or sort of sign; mostly one that is there."""
    is_there = rng.random() < 0.8
    roll = rng.random()
    if roll < 0.5:
        color = rng.choice(truth.boxes).color if is_there else rng.choice(COLORS)
        noun = rng.choice(("thing", "object", "one"))
        return _Group(f"{color} {noun}", f"{color} {noun}s", truth.where(color=color))
    if roll < 0.85:
        shapes = truth.where(kind="shape")
        name = rng.choice(shapes).name if is_there and shapes else rng.choice(SHAPES)
        return _Group(name, f"{name}es" if name == "cross" else f"{name}s", truth.where(name=name))
    kind = rng.choice(("digit", "letter", "word"))
    return _Group(kind, f"{kind}s", truth.where(kind=kind))


def _draw_unique_noun(truth: Truth, rng: random.Random) -> tuple[str | None, LabeledBox | None]:
    if rng.random() < 0.08:
        noun = rng.choice((rng.choice(SHAPES), f"digit {rng.choice(DIGITS)}", f"letter {rng.choice(LETTERS)}", f"word {rng.choice(WORDS)}"))
        return (None, None) if truth.where(noun=noun) else (noun, None)
    thing = rng.choice(truth.boxes)
    return (thing.noun, thing) if len(truth.where(noun=thing.noun)) == 1 else (None, None)


def _name(truth: Truth, thing: LabeledBox, rng: random.Random) -> str:
    """Name a thing by colour and noun, sometimes by the noun alone where that is enough."""
    is_enough = len(truth.where(noun=thing.noun)) == 1
    return thing.noun if is_enough and rng.random() < 0.3 else f"{thing.color} {thing.noun}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("one") else f"a {noun}"


_WRITERS: dict[str, Callable[[Truth, random.Random], Question | None]] = {
    "describe": _describe,
    "count": _count,
    "count_of": _count_of,
    "exist": _exist,
    "color": _color,
    "what": _what,
    "where": _where,
    "side": _side,
    "compare": _compare,
    "read": _read,
    "reason": _reason,
}
KINDS = tuple(_WRITERS)
