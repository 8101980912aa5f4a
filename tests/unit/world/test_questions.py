"""Questions: right by the truth, graded by their conclusions."""

import itertools
import random

import pytest

from llavakit.world.questions import KINDS, Question, ask, conclude, is_right
from llavakit.world.scenes import draw_scene
from llavakit.world.truth import LabeledBox, Truth, captions, listing, scene_truth

RED_CIRCLE = LabeledBox("red", "shape", "circle", (0.05, 0.05, 0.25, 0.25))
BLUE_STAR = LabeledBox("blue", "shape", "star", (0.75, 0.75, 0.95, 0.95))
ORANGE_A = LabeledBox("orange", "letter", "A", (0.4, 0.4, 0.6, 0.6))
TRUTH = Truth((RED_CIRCLE, ORANGE_A, BLUE_STAR))


def questions(kind: str) -> list[Question]:
    rng = random.Random(1)
    written = (ask(scene_truth(draw_scene(rng)), kind, rng) for _ in range(300))
    return [question for question in written if question is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_answer_is_right_and_another_is_not(kind: str) -> None:
    asked = questions(kind)
    assert len(asked) > 50
    assert all(is_right(question, question.answer) for question in asked)
    assert not any(is_right(question, "I do not know.") for question in asked)
    shifted = sum(is_right(one, other.answer) for one, other in itertools.pairwise(asked))
    assert shifted < 0.8 * len(asked)


@pytest.mark.parametrize("kind", ["exist", "side", "compare"])
def test_yes_and_no_are_balanced(kind: str) -> None:
    keys = [question.key for question in questions(kind)]
    assert 0.3 < keys.count("yes") / len(keys) < 0.7


def test_reading_order_goes_by_thirds() -> None:
    scene = draw_scene(random.Random(4))
    cells = [box.cell for box in scene_truth(scene).boxes]
    assert cells == sorted(cells)


def test_listing_names_places_and_articles() -> None:
    assert listing(TRUTH.boxes) == "a red circle at the top left, an orange letter A in the middle and a blue star at the bottom right"


def test_captions_begin_with_the_full_one() -> None:
    full, labels, some = captions(TRUTH, random.Random(0))
    assert full == f"{listing(TRUTH.boxes)}."
    assert all(box.label in labels for box in TRUTH.boxes)
    assert some.startswith("a picture with ")


@pytest.mark.parametrize(
    ("kind", "reply", "key"),
    [
        ("count", "I see 2 stars. That makes 3.", "3"),
        ("exist", "I see a word NO at the top, so yes.", "yes"),
        ("exist", "no", "no"),
        ("where", "It is at the bottom right.", "bottom right"),
        ("where", "It is in the middle.", "middle"),
        ("where", "There is no red star.", "none"),
        ("color", "The letter Q is purple.", "purple"),
        ("read", "It is the word NO.", "word NO"),
        ("what", "It is a digit 7.", "digit 7"),
        ("describe", "a red star at the top and a blue word CAT", "blue word CAT, red star"),
        ("count", "nothing", ""),
    ],
)
def test_conclusions(kind: str, reply: str, key: str) -> None:
    assert conclude(kind, reply) == key
