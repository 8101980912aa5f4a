"""How well the embedded miniature answers: 5,000 unseen scenes, 40 % of them with a colour-shape pair that no stage saw.

The same examination as the last stage of `llava reproduce`, on the model that is in the package, in float32, with the controls: the scene
as a 640x480 JPEG, inside a wider picture, and another scene's picture in place of the right one.
Run: python -m benchmarks.miniature [--scenes 5000]
"""

from __future__ import annotations

import argparse
import tempfile
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
        write_result("miniature", f"python -m benchmarks.miniature --scenes {options.scenes}", read_json(folder / "scores.json"))


if __name__ == "__main__":
    main()
