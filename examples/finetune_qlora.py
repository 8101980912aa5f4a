"""Tune LoRA over a language model of 4 bits, then merge the adapter into the whole model: python examples/finetune_qlora.py [RUN].

The frozen weights are NF4 with nested scales; the adapter is trained in float32 and belongs to the model that it came from.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from llavakit import LLM, Conversation
from llavakit.engine.llm import MINIATURE
from llavakit.logs import show_logs
from llavakit.training.config import ModelSource, SourceConfig
from llavakit.training.recipes import find_recipe
from llavakit.training.run import EXPORT, run_training

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/qlora"))
    parser.add_argument("--model", default=str(MINIATURE))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    show_logs()
    rows = SourceConfig(rows=str(HERE / "training" / "rows.json"), images=str(HERE))
    config = find_recipe("miniature_finetune_v15_qlora")(ModelSource(path=options.model), (rows,))
    run_training(replace(config, steps=options.steps, optim=replace(config.optim, lr=5e-3)), options.run)

    merged = LLM(options.run / EXPORT, base=options.model)  # an adapter's folder loads merged
    print(merged.chat(Conversation.ask("Describe the scene.", (HERE / "scene.png").read_bytes())).text)


if __name__ == "__main__":
    main()
