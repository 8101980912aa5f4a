"""Prefer better answers to worse ones with DPO over LoRA: python examples/preference_dpo.py [RUN].

A row is a picture, a question, and two answers; the model without its adapters is the reference that it is held to.
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
CHOSEN, REJECTED = "A picture of things, and a word at the top.", "I see a red circle."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/dpo"))
    parser.add_argument("--model", default=str(MINIATURE))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    show_logs()
    rows = SourceConfig(rows=str(HERE / "training" / "pairs.json"), images=str(HERE))
    config = find_recipe("miniature_dpo_lora")(ModelSource(path=options.model), (rows,))
    config = replace(config, steps=options.steps, optim=replace(config.optim, lr=2e-3))
    run_training(config, options.run)

    question = Conversation.ask("Describe the scene.", (HERE / "scene.png").read_bytes())
    for name, adapter in (("before", ""), ("after", "mine")):
        llm = LLM(options.model, adapters={"mine": options.run / EXPORT})
        good, bad = llm.score(question, [CHOSEN, REJECTED], adapter=adapter)
        print(f"{name}: the better answer has {good.share:.3f}, the worse one {bad.share:.3f}")


if __name__ == "__main__":
    main()
