"""LLaVA-1.5's mixture for stage 2, from the sets that it is made of.

Owns: PARTS, the file of each, and mixed_rows. A part whose files are not there is left out, and said so; the published mixture has 665,298
rows of all of them. Sources: arXiv 2310.03744, table 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llavakit.errors import DataError
from llavakit.logs import logger
from llavakit.training.prepare import questions, regions, talks
from llavakit.training.prepare.published import LeftOut, Row

__all__ = ["PARTS", "Counting", "mixed_rows"]

_LOG = logger("training")
Counting = Callable[[list[dict[str, str]]], int]
"""Tokens of a conversation."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "instruct": ("llava_instruct_150k.json",),
    "sharegpt": ("sharegpt.json",),
    "vqav2": ("vqav2/v2_OpenEnded_mscoco_train2014_questions.json", "vqav2/v2_mscoco_train2014_annotations.json"),
    "gqa": ("gqa/train_balanced_questions.json",),
    "okvqa": ("okvqa/OpenEnded_mscoco_train2014_questions.json", "okvqa/mscoco_train2014_annotations.json"),
    "ocrvqa": ("ocr_vqa/dataset.json",),
    "aokvqa": ("aokvqa/aokvqa_v1p0_train.json",),
    "textcaps": ("textvqa/TextCaps_0.1_train.json",),
    "refcoco": ("refcoco/refs(unc).p", "refcoco/instances.json"),
    "refcoco+": ("refcoco+/refs(unc).p", "refcoco+/instances.json"),
    "refcocog": ("refcocog/refs(umd).p", "refcocog/instances.json"),
    "vg": ("vg/region_descriptions.json", "vg/image_data.json"),
}
"""Files of each part below the folder of the mixture, as their publishers name them."""
_WORDS = "textvqa/TextVQA_Rosetta_OCR_v0.2_train.json"


def mixed_rows(
    folder: Path, count_tokens: Counting, *, parts: Sequence[str] = (), most_tokens: int = 2048, seed: int = 0
) -> Iterator[Row | LeftOut]:
    """Give the rows of all parts that are there, or of those that are named. Raises: DataError for files of another form."""
    if unknown := set(parts) - PARTS.keys():
        raise DataError(f"the mixture has no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    missing = {name: [file for file in files if not (folder / file).is_file()] for name, files in PARTS.items()}
    if lacking := [file for name in parts for file in missing[name]]:
        raise DataError(f"{folder} lacks {', '.join(lacking)}")
    chosen = [name for name in PARTS if (name in parts if parts else not missing[name])]
    if not chosen:
        raise DataError(f"{folder} has no part of the mixture; it wants {', '.join(file for files in PARTS.values() for file in files)}")
    for name in PARTS:
        if name not in chosen and not parts:
            _LOG.warning("%s is left out: there is no %s", name, ", ".join(missing[name]))
    for name in chosen:
        yield from _counted(name, _rows(name, folder, count_tokens, most_tokens, seed))


def _rows(name: str, folder: Path, count_tokens: Counting, most_tokens: int, seed: int) -> Iterator[Row | LeftOut]:
    first, *others = (folder / file for file in PARTS[name])
    match name:
        case "instruct":
            return talks.instruct_rows(first)
        case "sharegpt":
            return talks.sharegpt_rows(first, count_tokens, most=most_tokens)
        case "vqav2" | "okvqa":
            return questions.vqa_rows(name, first, others[0])
        case "gqa":
            return questions.gqa_rows(first)
        case "ocrvqa":
            return questions.ocrvqa_rows(first, seed=seed)
        case "aokvqa":
            return questions.aokvqa_rows(first)
        case "textcaps":
            words = folder / _WORDS
            return questions.textcaps_rows(first, words if words.is_file() else None, seed=seed)
        case "vg":
            return regions.genome_rows(first, others[0], seed=seed)
        case _:
            return regions.refcoco_rows(name, first, others[0], seed=seed)


def _counted(name: str, rows: Iterator[Row | LeftOut]) -> Iterator[Row | LeftOut]:
    count = 0
    for row in rows:
        count += isinstance(row, dict)
        yield row
    _LOG.info("%s: %d rows", name, count)
