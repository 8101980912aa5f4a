"""How well the embedded miniature answers: 5,000 unseen scenes, 40 % of them with a colour-shape pair that no stage saw.

The last stage of `llava reproduce` examines the model that it made, in float32, with the controls: the scene as a 640x480 JPEG, inside a
wider picture, and another scene's picture in place of the right one. With --run this records that examination and how long each stage
took, once it is sure that the run made the embedded model; with --rerun the same of another run of the recipe; without either, it examines
the embedded model again. Prints the README's table.
Run: python -m benchmarks.miniature [--run FOLDER | --rerun FOLDER | --scenes 5000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import write_result
from llavakit.engine.llm import MINIATURE
from llavakit.logs import show_logs
from llavakit.reproduce.accuracy import write_examination
from llavakit.storage.documents import read_json
from llavakit.storage.folder import read_manifest


def main() -> None:
    """Examine or read, and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="the folder of the llava reproduce that made the embedded model")
    parser.add_argument("--rerun", type=Path, help="the folder of another llava reproduce")
    parser.add_argument("--scenes", type=int, default=5000)
    options = parser.parse_args()
    show_logs()
    name, command = "miniature", f"python -m benchmarks.miniature --scenes {options.scenes}"
    if options.rerun is not None:
        name, command = "miniature_rerun", "llava reproduce FOLDER; python -m benchmarks.miniature --rerun FOLDER"
        result = read_run(options.rerun)
    elif options.run is not None:
        command = "llava reproduce FOLDER; python -m benchmarks.miniature --run FOLDER"
        check_embedded(options.run)
        result = read_run(options.run)
    else:
        result = examine(options.scenes)
    write_result(name, command, result)
    print(markdown_table(result["accuracy"]))


def examine(num_scenes: int) -> dict[str, Any]:
    """Examine the embedded model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examination(MINIATURE, folder, folder, num_scenes=num_scenes, curves={})
        return read_json(folder / "scores.json")


def check_embedded(folder: Path) -> None:
    """Check that a reproduction made the weights of the embedded model."""
    embedded, made = (read_manifest(model) for model in (MINIATURE, folder / "export"))
    assert embedded is not None
    assert made is not None
    assert embedded["model.safetensors"] == made["model.safetensors"], f"{folder} did not make the embedded model"


def read_run(folder: Path) -> dict[str, Any]:
    """Read scores and times of a finished reproduction."""
    stages = [json.loads(line) for line in (folder / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    minutes = round(sum(stage["seconds"] for stage in stages) / 60, 1)
    return {**read_json(folder / "examine" / "scores.json"), "stages": stages, "minutes": minutes}


def markdown_table(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the README's table: percent right by kind of question and condition."""
    conditions = list(accuracy)
    lines = [f"| question | {' | '.join(conditions)} |", "|---" * (1 + len(conditions)) + "|"]
    for kind in accuracy["plain"]:
        cells = (f"{100 * accuracy[condition][kind]['accuracy']:.1f}" if kind in accuracy[condition] else "" for condition in conditions)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
