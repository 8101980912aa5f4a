"""Choosing the tokenizer of a checkpoint folder by what is in it."""

from __future__ import annotations

from pathlib import Path

from llavakit.errors import CheckpointError
from llavakit.logs import logger
from llavakit.processing.tokenizer.fast import JSON_NAME, LlamaTokenizerFast
from llavakit.processing.tokenizer.sentence_model import MODEL_NAME
from llavakit.processing.tokenizer.slow import LlamaTokenizer

__all__ = ["has_tokenizer", "load_tokenizer"]

_LOG = logger("processing")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that load_tokenizer may use."""
    return any((folder / name).is_file() for name in (MODEL_NAME, JSON_NAME))


def load_tokenizer(folder: str | Path) -> LlamaTokenizer | LlamaTokenizerFast:
    """Load tokenizer.model where it is there and agrees with the folder's JSON files, else tokenizer.json.

    The legacy rule holds whatever the files say: LLaVA encodes each stretch beside a picture on its own, and so does the fast
    tokenizer that transformers' processor runs on.
    Raises: CheckpointError when there is neither, or none that can be used.
    """
    folder = Path(folder)
    has_json = (folder / JSON_NAME).is_file()
    if (folder / MODEL_NAME).is_file() or not has_json:
        try:
            return LlamaTokenizer.from_pretrained(folder, legacy=True)
        except CheckpointError as error:
            if not has_json:
                raise
            _LOG.warning("%s; using %s instead", error, JSON_NAME)
    return LlamaTokenizerFast.from_pretrained(folder)
