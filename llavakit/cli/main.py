"""The command `llava`: a table of commands, each loaded when it is called.

Owns: the table. Invariant: `llava --help` imports no command, so neither torch nor numpy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App

from llavakit import __version__
from llavakit.cli.exits import run_command

__all__ = ["build_app", "main", "run"]

_COMMANDS = (
    ("ask", "Ask a question about a picture."),
    ("chat", "Talk about a picture, turn by turn."),
    ("inspect", "Show what a checkpoint holds, without loading it."),
    ("lint", "Show what a prompt becomes, and how files deviate from training."),
    ("doctor", "Show what this machine can run."),
    ("generate", "Answer many questions from a file into a file."),
    ("serve", "Serve a model to OpenAI clients and browsers."),
    ("train", "Train a model by a recipe."),
    ("reproduce", "Train the embedded miniature from nothing."),
    ("convert", "Convert a checkpoint into another layout."),
    ("merge", "Merge an adapter, a delta or a projector into its base."),
    ("verify", "Compare two checkpoints, or a folder with its manifest."),
    ("convert-llama-weights", "Convert Llama weights from Meta's own files."),
)

_PREPARED = (
    ("scienceqa", "ScienceQA, as LLaVA trained on it."),
    ("mix665k", "LLaVA-1.5's mixture, from the sets that it is made of."),
    ("coco", "COCO's captions, one a picture."),
    ("cc3m", "CC3M or other captioned pictures, balanced by their concepts."),
)


def build_app() -> App:
    """Build the parser of all commands; none is imported before it is called."""
    app = App(
        name="llava",
        help="LLaVA: ask pictures questions, train and study the model.",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for name, summary in _COMMANDS:
        app.command("llavakit.cli.{0}:{0}".format(name.replace("-", "_")), name=name, help=summary)
    data = App(name="data", help="Prepare training data and look at it.", result_action="return_value")
    data.command("llavakit.cli.data_check:data_check", name="check", help="Say what is wrong with rows before they train.")
    prepare = App(name="prepare", help="Turn sets as they are published into rows to train on.", result_action="return_value")
    for name, summary in _PREPARED:
        prepare.command(f"llavakit.cli.data_prepare:{name}", name=name, help=summary)
    data.command(prepare)
    app.command(data)
    return app


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    app = build_app()
    return run_command(lambda: app(arguments, exit_on_error=False, print_error=False))
