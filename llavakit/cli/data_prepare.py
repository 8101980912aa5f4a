"""llava data prepare: published sets become rows to train on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavakit.logs import show_logs

if TYPE_CHECKING:
    from llavakit.training.prepare.mix665k import Counting

__all__ = ["cc3m", "coco", "mix665k", "scienceqa"]


def scienceqa(folder: Path, output: Path, *, split: str = "train", form: str = "QCM-LEA", images: Path | None = None) -> None:
    """ScienceQA: problems.json and pid_splits.json become rows as LLaVA trained on them.

    Parameters
    ----------
    folder
        Where problems.json and pid_splits.json are.
    output
        File of rows to write: .json or .jsonl.
    split
        train, val, trainval, ...
    form
        QCM-LEA (LLaVA's released runs), QCM-LEPA (the first version), QCM-ALE, QCM-A, or CQM-A (letters alone, as LLaVA-1.5 is asked).
    images
        Folder of the pictures (PID/image.png); rows whose picture is not there are left out.
    """
    from llavakit.training.prepare.scienceqa import scienceqa_rows

    _write(scienceqa_rows(folder, split=split, form=form), output, images)


def mix665k(
    folder: Path,
    output: Path,
    *,
    parts: tuple[str, ...] = (),
    images: Path | None = None,
    model: str | None = None,
    max_len: int = 2048,
    seed: int = 0,
) -> None:
    """LLaVA-1.5's mixture: the sets that it is made of become one file of rows; docs/data.md says which files they are.

    Parameters
    ----------
    folder
        Where the sets are.
    output
        File of rows to write: .json or .jsonl.
    parts
        Take these parts alone; all that are there when left out.
    images
        Folder of the pictures; rows whose picture is not there are left out.
    model
        Whose tokens are counted where conversations are too long; the embedded miniature's when left out.
    max_len
        Most tokens of a conversation without pictures.
    seed
        Seed of whatever is drawn.
    """
    from llavakit.training.prepare.mix665k import mixed_rows

    show_logs()
    _write(mixed_rows(folder, _counting(model), parts=parts, most_tokens=max_len, seed=seed), output, images)


def coco(captions: Path, output: Path, *, images: Path | None = None, seed: int = 0) -> None:
    """COCO: captions_train2017.json, or its like, becomes one row a picture.

    Parameters
    ----------
    captions
        File of COCO's captions.
    output
        File of rows to write: .json or .jsonl.
    images
        Folder of the pictures; rows whose picture is not there are left out.
    seed
        Seed of which of a picture's captions is taken.
    """
    from llavakit.training.prepare.captions import coco_rows

    _write(coco_rows(captions, seed=seed), output, images)


def cc3m(
    captions: Path,
    output: Path,
    *,
    concepts: Literal["words", "spacy", "none"] = "words",
    images: Path | None = None,
    seed: int = 0,
) -> None:
    """CC3M, or any captioned pictures: those are chosen that balance their concepts, as LLaVA chose 595K of 3 million.

    Parameters
    ----------
    captions
        CC3M's own table (.tsv), or .json or .jsonl with image and caption.
    output
        File of rows to write: .json or .jsonl.
    concepts
        What a concept is: spacy's noun phrases, as LLaVA had them; runs of words, which need no model; none keeps every caption.
    images
        Folder of the pictures; rows whose picture is not there are left out.
    seed
        Seed of whatever is drawn.
    """
    from llavakit.training.prepare.captions import captioned_rows
    from llavakit.training.prepare.concepts import noun_phrases, word_runs

    found = None if concepts == "none" else word_runs if concepts == "words" else noun_phrases()
    _write(captioned_rows(captions, found, seed=seed), output, images)


def _write(rows: Iterator[Any], output: Path, images: Path | None) -> None:
    from llavakit.training.prepare.published import write_rows

    written = write_rows(rows, output, images)
    sys.stdout.write(f"{output}: {written.num_rows} rows, {written.num_with_pictures} with pictures\n")
    sys.stdout.writelines(f"{count:>8}  {reason}: left out\n" for reason, count in written.left_out.most_common())


def _counting(model: str | None) -> Counting:
    """Count tokens as a model's own processor does."""
    from llavakit.cli.options import load_processor_alone
    from llavakit.training.forms import row_of

    processor = load_processor_alone(model, None)

    def count(turns: list[dict[str, str]]) -> int:
        conversation = row_of({"conversations": turns})[0].conversation(())
        return len(processor.encode_chat(conversation, (), add_generation_prompt=False)[1].ids)

    return count
