"""llava convert-llama-weights: from Meta's own files to the Hugging Face layout, by the options of transformers' script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from llavakit.cli.convert import show_progress
from llavakit.errors import CheckpointError
from llavakit.logs import show_logs

__all__ = ["convert_llama_weights"]

_TOKENIZER_ONLY = "tokenizer_only"


def convert_llama_weights(
    *,
    input_dir: Annotated[Path, Parameter(name=("--input-dir", "--input_dir"))],
    output_dir: Annotated[Path, Parameter(name=("--output-dir", "--output_dir"))],
    model_size: Annotated[str | None, Parameter(name=("--model-size", "--model_size"))] = None,
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    max_shard_size: str = "5GB",
) -> None:
    """Convert Llama weights as Meta gives them out; memory holds one tensor at a time.

    Parameters
    ----------
    input_dir
        Folder with params.json and consolidated.*.pth, or with folders that are named by size; tokenizer.model lies in either.
    output_dir
        A new or empty folder.
    model_size
        Name of the folder inside INPUT_DIR, such as 7B; or tokenizer_only.
    dtype
        Of the new weights; auto keeps the files'.
    max_shard_size
        Most bytes of a file, like 5GB or 200MiB.
    """
    from llavakit.checkpoint.convert import Conversion, convert
    from llavakit.checkpoint.hf import parse_size
    from llavakit.checkpoint.parts import Sources
    from llavakit.checkpoint.placement import choose_dtype
    from llavakit.processing.tokenizer.load import load_tokenizer

    show_logs()
    max_shard_bytes = parse_size("max_shard_size", max_shard_size)
    if model_size == _TOKENIZER_ONLY:
        load_tokenizer(_tokenizer_folder(input_dir)).save_pretrained(output_dir)
    else:
        source = _source(input_dir, model_size)
        how = Conversion(
            tokenizer=_tokenizer_folder(source, input_dir, source.parent),
            dtype=choose_dtype(dtype),
            max_shard_bytes=max_shard_bytes,
            sources=Sources(allow_pickle=True),  # Meta gives out nothing else, and only tensors are read
        )
        with show_progress() as progress:
            convert(source, output_dir, how, progress)
    sys.stdout.write(f"{output_dir}\n")


def _source(input_dir: Path, model_size: str | None) -> Path:
    """Find the folder with the weights."""
    places = [input_dir, *([] if model_size is None else [input_dir / model_size])]
    found = next((place for place in places if (place / "params.json").is_file()), None)
    if found is None:
        raise CheckpointError(f"there is no params.json in {' or '.join(map(str, places))}; --input-dir is where Meta's files are")
    return found


def _tokenizer_folder(*places: Path) -> Path:
    from llavakit.processing.tokenizer.load import has_tokenizer

    found = next(filter(has_tokenizer, places), None)
    if found is None:
        raise CheckpointError(f"there is no tokenizer.model in {' or '.join(dict.fromkeys(map(str, places)))}; put it there")
    return found
