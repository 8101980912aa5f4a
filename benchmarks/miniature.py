"""How well the embedded miniature answers: 5,000 unseen scenes, 40 % of them with a colour-shape pair that no stage saw.

The same examination as the last stage of `llava reproduce`, on the model that is in the package, in float32, with the controls: the scene
as a 640x480 JPEG, inside a wider picture, and another scene's picture in place of the right one.
Prints the README's table. Run: python -m benchmarks.miniature [--scenes 5000]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import write_result
from llavakit.engine.llm import MINIATURE
from llavakit.logs import show_logs
from llavakit.reproduce.accuracy import write_examination
from llavakit.storage.documents import read_json


def main() -> None:
    """Examine and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=5000)
    options = parser.parse_args()
    show_logs()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examination(MINIATURE, folder, folder, num_scenes=options.scenes, curves={})
        result = read_json(folder / "scores.json")
        write_result("miniature", f"python -m benchmarks.miniature --scenes {options.scenes}", result)
    print(markdown_table(result["accuracy"]))


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
