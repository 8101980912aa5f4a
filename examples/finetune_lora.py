"""Tune LoRA on your own pictures and ask the model beside its adapter: python examples/finetune_lora.py [RUN] [--model MODEL].

Rows are LLaVA's JSON; here a few about one drawn scene, on the embedded miniature.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from llavakit import LLM, Conversation
from llavakit.engine.llm import MINIATURE
from llavakit.logs import show_logs
from llavakit.training.config import ModelSource, SourceConfig
from llavakit.training.recipes import LORA, find_recipe
from llavakit.training.run import EXPORT, run_training

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/lora"))
    parser.add_argument("--model", default=str(MINIATURE))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    show_logs()
    rows = SourceConfig(rows=str(HERE / "training" / "rows.json"), images=str(HERE))
    config = find_recipe("miniature_finetune_v15_lora")(ModelSource(path=options.model), (rows,))
    # The recipe trains the projector too; products alone can be used beside the model, each request with an adapter of its own.
    optim = replace(config.optim, lr=5e-3, groups=())
    run_training(replace(config, steps=options.steps, trainable=LORA, optim=optim), options.run)

    llm = LLM(options.model, adapters={"mine": options.run / EXPORT})
    question = Conversation.ask("Describe the scene.", (HERE / "scene.png").read_bytes())
    print("without:", llm.chat(question).text)
    print("with:   ", llm.chat(question, adapter="mine").text)


if __name__ == "__main__":
    main()
