"""llava convert: a checkpoint of any layout into another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavakit.logs import show_logs

if TYPE_CHECKING:
    from llavakit.checkpoint.convert import Conversion
    from llavakit.checkpoint.fresh import Fresh

__all__ = ["convert", "run_conversion", "show_progress"]


def convert(
    source: str,
    destination: Path,
    *,
    to: Literal["hf", "original", "text", "gguf", "adapter"] = "hf",
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None,
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    base: str | None = None,
    vision_tower: str | None = None,
    projector: str | None = None,
    template: str | None = None,
    seed: int | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    hashes: bool = True,
    dry_run: bool = False,
) -> None:
    """Convert a checkpoint; its layout is told by its content. Memory holds one tensor, and DESTINATION appears whole or not at all.

    Parameters
    ----------
    source
        Folder, GGUF file or hub id.
    destination
        A new or empty folder.
    to
        hf is the Hugging Face layout, original is LLaVA's own, text is the language model of a LLaVA alone, gguf is for llama.cpp
        and Ollama; adapter is an adapter that stays one, for peft over transformers' LLaVA.
    gguf_type
        How GGUF files store matrices; f16 when left out.
    dtype
        Of the new weights; auto keeps the files', bit for bit, and makes float16 of packed ones.
    base
        Folder or hub id of the model that an adapter, a delta or a projector belongs to.
    vision_tower
        Folder or hub id of an original LLaVA's tower, in place of the one that its config names, or the file of a GGUF file's. With a
        language model alone: of the CLIP or SigLIP that makes a fresh LLaVA of it.
    projector
        Of a fresh LLaVA: linear, mlp2x_gelu (the usual) or mlpNx_gelu with N layers; identity.
    template
        Chat template of a fresh LLaVA; plain, for training on captions, when left out.
    seed
        Seed of a fresh projector's weights; 0 when left out.
    max_shard_size
        Most bytes of a safetensors file, like 5GB or 200MiB; GGUF files and adapters are whole.
    revision
        Branch, tag or commit of a hub id.
    allow_pickle
        Read pickle files (.bin, .pth) too.
    hashes
        Write SHA-256 sums into the manifest, which takes reading the new files once.
    dry_run
        Check names and shapes, write nothing.
    """
    from llavakit.checkpoint.convert import Conversion
    from llavakit.checkpoint.hf import parse_size
    from llavakit.checkpoint.parts import Sources
    from llavakit.checkpoint.placement import choose_dtype
    from llavakit.storage.hub import resolve_model

    show_logs()
    how = Conversion(
        to=to,
        gguf_type=gguf_type,
        dtype=choose_dtype(dtype),
        fresh=_fresh(projector, template, seed),
        sources=Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle),
        max_shard_bytes=parse_size("max_shard_size", max_shard_size),
        hashes=hashes,
        is_dry=dry_run,
    )
    run_conversion(resolve_model(source, revision=revision, allow_pickle=allow_pickle), destination, how)


def run_conversion(source: Path, destination: Path, how: Conversion) -> None:
    """Convert under a progress bar and say where the result is."""
    from llavakit.checkpoint.convert import convert as convert_folder

    with show_progress() as progress:
        names = convert_folder(source, destination, how, progress)
    sys.stdout.write(f"{len(names)} tensors fit\n" if how.is_dry else f"{destination}\n")


def _fresh(projector: str | None, template: str | None, seed: int | None) -> Fresh | None:
    from llavakit.checkpoint.fresh import Fresh
    from llavakit.processing.chat import find_template

    given = {"projector": projector, "template": None if template is None else find_template(template), "seed": seed}
    stated: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Fresh(**stated) if stated else None


@contextmanager
def show_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes and the time left on stderr; None where no person looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
