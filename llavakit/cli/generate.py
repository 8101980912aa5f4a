"""llava generate: many questions from a file, answered into a file."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llavakit.cli.options import EngineOptions, ModelOptions, SamplingOptions
from llavakit.server.config import ClusterConfig

__all__ = ["generate"]

_FAILED = 1


def generate(
    source: Annotated[Path, Parameter(name="--input")],
    output: Annotated[Path, Parameter(name="--output")],
    *,
    question: str | None = None,
    images: Path | None = None,
    adapter: str = "",
    options: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    cluster: Annotated[ClusterConfig, Parameter(name="*")] = ClusterConfig(),
) -> int:
    """Answer every row of a file, or ask one question about every picture of a folder; the same command goes on after any interruption.

    The output has one row of JSON for each row of the input, in its order, and appears once all are answered. A row that cannot be answered
    has an error, and the command then exits with 1.

    Parameters
    ----------
    source
        .json or .jsonl, whose rows have messages, or question (or text) and image; or a folder of pictures.
    output
        File to write (.jsonl).
    question
        What to ask about each picture of a folder.
    images
        Folder of the pictures that rows name; the file's own folder when left out.
    adapter
        The adapter (--adapters NAME=FOLDER) that answers.
    """
    from llavakit.engine.bulk import answer_all, local_answers, open_questions
    from llavakit.engine.progress import progress_bar

    questions, params = open_questions(source, images=images, question=question), sampling.params()
    if cluster.cluster:
        from llavakit.server.cluster_bulk import cluster_answers

        answers = cluster_answers(functools.partial(options.load, engine), questions, params, cluster, adapter=adapter)
    else:
        answers = local_answers(options.load(engine), questions, params, adapter=adapter)
    who = {"model": options.model, "adapter": adapter, "params": asdict(params)}
    with progress_bar(len(questions), is_shown=sys.stderr.isatty()) as advance:
        failed = answer_all(answers, questions, output, who, advance=advance)
    sys.stdout.write(f"{output}\n")
    if failed:
        sys.stderr.write(f"llava: {failed} of {len(questions)} rows could not be answered; each has its error\n")
    return _FAILED if failed else 0
