"""llava merge: what builds on another model becomes a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llavakit.cli.convert import run_conversion
from llavakit.errors import ConfigError
from llavakit.logs import show_logs

__all__ = ["merge"]


def merge(
    source: str,
    destination: Path,
    *,
    base: str | None = None,
    to: Literal["hf", "original", "text"] = "hf",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    vision_tower: str | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    dry_run: bool = False,
) -> None:
    """Merge an adapter, a delta or a projector into its base, as `llava convert` does, and refuse whatever is a whole model already.

    Parameters
    ----------
    source
        Folder or hub id of the adapter, the delta or the projector.
    destination
        A new or empty folder.
    base
        Folder or hub id of the model that it belongs to; an adapter may name its own.
    to
        hf is the Hugging Face layout, original is LLaVA's own, text is the language model of a LLaVA alone.
    dtype
        Of the new weights; auto keeps the base's.
    vision_tower
        Folder or hub id of an original LLaVA's tower, in place of the one that its config names.
    max_shard_size
        Most bytes of a file, like 5GB or 200MiB.
    revision
        Branch, tag or commit of SOURCE where it is a hub id.
    allow_pickle
        Read pickle files (.bin, .pth) too.
    dry_run
        Check names and shapes, write nothing.
    """
    from llavakit.checkpoint.convert import Conversion
    from llavakit.checkpoint.detect import Kind
    from llavakit.checkpoint.hf import parse_size
    from llavakit.checkpoint.parts import Sources, is_adapter, kind_of_folder
    from llavakit.checkpoint.placement import choose_dtype
    from llavakit.storage.hub import resolve_model

    show_logs()
    folder = resolve_model(source, revision=revision, allow_pickle=allow_pickle)
    if not is_adapter(folder):
        if kind_of_folder(folder) is Kind.LLAVA_HF:
            raise ConfigError(f"{folder} is a whole model; merge takes an adapter, a delta or a projector, convert takes any model")
        if base is None:
            raise ConfigError(f"{folder} is no adapter; where it is a delta or a projector, name its base with --base, else use convert")
    how = Conversion(
        to=to,
        dtype=choose_dtype(dtype),
        sources=Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle),
        max_shard_bytes=parse_size("max_shard_size", max_shard_size),
        is_dry=dry_run,
    )
    run_conversion(folder, destination, how)
