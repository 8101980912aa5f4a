"""A caption set in which rare concepts weigh as much as common ones: how LLaVA chose 595K of CC3M, and 558K of LAION, CC and SBU.

Owns: balanced, the two ways to find the concepts of a caption. The rule: a concept is a noun phrase; those that occur less than three times
are passed over; from the rarest up, all captions with a concept are taken, a hundred at random where there are more. Sources: arXiv
2304.08485, and LLaVA's docs/Data.md.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from llavakit.errors import DataError

__all__ = ["Concepts", "balanced", "noun_phrases", "word_runs"]

Concepts = Callable[[str], Iterable[str]]
_LEAST, _MOST = 3, 100
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\S")
_BETWEEN = frozenset(
    """
    a about above across after against all along also am among an and any are around as at away be because been before behind being
    below beneath beside besides between beyond both but by can could did do does doing down during each either every few for from had
    has have having he her here hers him his how i if in inside into is it its just like many may me might more most much must my near
    neither next no nor not of off on onto or other our out outside over own past per she should since so some such than that the
    their them then there these they this those through throughout to together too toward towards under until up upon us very via was
    we were what when where which while who whom whose why will with within without would you your looking looks seen shown sits
    sitting stands standing using wearing holding showing shows show going doing
    """.split()  # noqa: SIM905
)
"""Words that are no part of a concept."""


def balanced(captions: Sequence[str], concepts: Concepts, *, seed: int = 0) -> list[int]:
    """Choose captions by the rule; returns their numbers in order."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for number, caption in enumerate(captions):
        for concept in dict.fromkeys(concepts(caption)):
            found[concept].append(number)
    rng, chosen = random.Random(seed), set[int]()
    for _, _, numbers in sorted((len(numbers), concept, numbers) for concept, numbers in found.items() if len(numbers) >= _LEAST):
        chosen.update(numbers if len(numbers) <= _MOST else rng.sample(numbers, _MOST))
    return sorted(chosen)


def word_runs(caption: str) -> list[str]:
    """Take runs of words between function words and punctuation for concepts: needs no model, and is close to noun phrases in captions."""
    runs: list[list[str]] = [[]]
    for word in _WORD.findall(caption.lower()):
        if not word[0].isalpha() or word in _BETWEEN:
            runs.append([])
        else:
            runs[-1].append(word)
    return [" ".join(run) for run in runs if run]


def noun_phrases(model: str = "en_core_web_sm") -> Concepts:
    """Return spaCy's noun phrases, as LLaVA had them. Raises: DataError where spaCy or its model is not installed."""
    try:
        import spacy

        parse = spacy.load(model)
    except (ImportError, OSError) as error:
        raise DataError(f"noun phrases need spaCy and its model: pip install spacy, python -m spacy download {model}") from error
    return lambda caption: [chunk.text.lower() for chunk in parse(caption).noun_chunks]
