"""llava data check: what training would make of a file of rows."""

from __future__ import annotations

import json as json_format
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from llavakit.errors import ConfigError, LlavaError
from llavakit.logs import show_logs

if TYPE_CHECKING:
    from llavakit.processing.processor import LlavaProcessor
    from llavakit.processing.text import TextProcessor
    from llavakit.processing.tokenizer.vocabulary import Tokenizer
    from llavakit.training.checks import Fault
    from llavakit.training.pairs import PairSource
    from llavakit.training.records import RecordSource

__all__ = ["data_check"]

_FINE, _FAULTY = 0, 1
_EXAMPLES = 3


def data_check(
    file: str,
    *,
    images: str | None = None,
    subset: str | None = None,
    split: str = "train",
    model: str | None = None,
    template: str | None = None,
    max_len: int = 2048,
    masks: Literal["answers", "llava-exact"] = "answers",
    pairs: bool = False,
    strict: bool = False,
    show: int = 0,
    decode: bool = False,
    json: bool = False,
) -> int:
    """Say what is wrong with rows before they train: by kind, with examples. With --strict any row that cannot train exits with 1.

    Parameters
    ----------
    file
        Rows: .json (a list), .jsonl, .parquet, .tar (or a pattern of them), a folder, or a hub id.
    images
        Folder of their pictures, or tar shards; the current folder when left out.
    subset
        Part of a data set of the hub.
    split
        Split of a data set.
    model
        Folder or hub id whose processor and template are used; the embedded miniature when left out.
    template
        Chat template to use instead of the model's.
    max_len
        Most tokens of a sample.
    masks
        Which tokens are learned: answers and their ends, or what LLaVA's own code makes of a row.
    pairs
        The rows are pairs of a better and a worse answer.
    strict
        Exit with 1 where a row cannot train.
    show
        Print so many rows, the learned tokens in colour (in brackets where the output is no terminal).
    decode
        Decode every picture, in place of reading its header alone.
    json
        Print a JSON document in place of a table.
    """
    from llavakit.cli.options import load_processor_alone
    from llavakit.training.checks import duplicate_ids
    from llavakit.training.config import SourceConfig
    from llavakit.training.sets import open_source

    if json and show:
        raise ConfigError("--show writes text, and --json a document; use one of them")
    show_logs()
    processor, source = load_processor_alone(model, template), SourceConfig(rows=file, images=images, subset=subset, split=split)
    rows = open_source(source, processor, is_pairs=pairs, max_sample_tokens=max_len, masks=masks)
    faults: list[tuple[int, Fault]] = []
    lengths: list[int] = []
    ids: list[str | int | None] = []
    for index in _with_bar(len(rows)):
        measured = rows.measure(index)
        found = [*measured.problems, *(_decoded(rows, index) if decode and measured.num_tokens else ())]
        faults += [(index, fault) for fault in found]
        ids.append(measured.id)
        if not any(fault.is_fatal for fault in found):
            lengths.append(measured.num_tokens)
    faults = sorted([*faults, *duplicate_ids(ids).items()], key=lambda found: found[0])
    if json:
        listed = [{"row": index, "kind": fault.kind, "message": fault.message, "is_fatal": fault.is_fatal} for index, fault in faults]
        sys.stdout.write(json_format.dumps({"rows": len(rows), "can_train": len(lengths), "tokens": sum(lengths), "faults": listed}) + "\n")
    else:
        _print(len(rows), lengths, faults)
    for index in range(min(show, len(rows))):
        _show(rows, index, processor)
    return _FAULTY if strict and len(lengths) < len(rows) else _FINE


def _with_bar(count: int) -> Iterator[int]:
    """Count, with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from range(count)
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(range(count), description="rows", console=Console(stderr=True), transient=True)


def _decoded(rows: RecordSource | PairSource, index: int) -> Iterator[Fault]:
    from llavakit.training.checks import Fault

    try:
        rows.decode(index)
    except LlavaError as error:
        yield Fault("picture", str(error), is_fatal=True)


def _print(num_rows: int, lengths: list[int], faults: list[tuple[int, Fault]]) -> None:
    from llavakit.training.checks import FAULTS

    out = sys.stdout
    out.write(f"{len(lengths)} of {num_rows} rows can train")
    out.write(f", {sum(lengths)} tokens, {min(lengths)} to {max(lengths)} a row\n" if lengths else "\n")
    counts = Counter(kind for _, kind in {(index, fault.kind) for index, fault in faults})
    for kind, count in counts.most_common():
        out.write(f"{count:>8}  {kind}: {FAULTS[kind]}\n")
        examples = [(index, fault.message) for index, fault in faults if fault.kind == kind][:_EXAMPLES]
        out.writelines(f"          row {index}: {message}\n" for index, message in examples)


def _show(rows: RecordSource | PairSource, index: int, processor: LlavaProcessor | TextProcessor) -> None:
    """Print a row's tokens, stretches that are learned marked."""
    from llavakit.cli.options import printable
    from llavakit.training.data import Sample

    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    sys.stdout.write(f"--- row {index}\n")
    try:
        sample = rows.sample(index)
    except LlavaError as error:
        sys.stdout.write(f"cannot train: {error}\n")
        return
    for shown in (sample,) if isinstance(sample, Sample) else (sample.chosen, sample.rejected):
        for is_learned, stretch in groupby(zip(shown.ids, shown.loss_mask, strict=True), key=lambda pair: pair[1]):
            text = printable(_text([token for token, _ in stretch], processor.tokenizer))
            sys.stdout.write(f"{before}{text}{after}" if is_learned else text)
        sys.stdout.write("\n")


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Write ids as text, special tokens by their names, a picture's places as one with their number."""
    parts = []
    for is_special, run in groupby(ids, key=lambda token: token in tokenizer.special_ids):
        if not is_special:
            parts.append(tokenizer.decode_text(run))
            continue
        for token, same in groupby(run):
            count, name = len(list(same)), tokenizer.convert_ids_to_tokens(token)
            parts.append(name if count == 1 else f"{name}x{count}")
    return "".join(parts)
