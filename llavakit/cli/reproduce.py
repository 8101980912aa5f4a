"""llava reproduce: train the embedded miniature from nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from llavakit.logs import show_logs

__all__ = ["reproduce"]


def reproduce(folder: Path, *, scale: float = 1.0, scenes: int = 5000) -> None:
    """Make the miniature from seeds: tokenizer, tower, language model, two stages of LLaVA, export, examination.

    Run it again after any interruption: finished stages are kept and a broken one goes on where it was.

    Parameters
    ----------
    folder
        Where the stages' results go; the model is in FOLDER/export, the report in FOLDER/examine.
    scale
        Multiplies the training steps; small values give a quick, poor model.
    scenes
        Unseen scenes in the examination.
    """
    from llavakit.reproduce.miniature import miniature_stages
    from llavakit.reproduce.stages import run_stages

    show_logs()
    done = run_stages(miniature_stages(scale=scale, num_scenes=scenes), folder)
    sys.stdout.write(f"{done['examine'] / 'report.html'}\n")
