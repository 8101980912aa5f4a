"""The sets of rows that a run reads, opened, measured and planned.

Owns: RowSet, open_sets, open_source, plan_batches and the conversations to look at. Refuses: formats (records) and packing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llavakit.errors import ConfigError, DataError
from llavakit.logs import logger
from llavakit.processing.processor import LlavaProcessor
from llavakit.processing.text import TextProcessor
from llavakit.training.checks import PICTURE_FAULTS
from llavakit.training.config import SourceConfig, TrainConfig
from llavakit.training.index import SampleIndex, build_index, index_key, load_index
from llavakit.training.packing import BestFitSource, Part, pack
from llavakit.training.pairs import PairSource
from llavakit.training.parallel import Parallel
from llavakit.training.pictures import open_pictures
from llavakit.training.preference import pack_pairs
from llavakit.training.preference_config import CorruptionConfig
from llavakit.training.records import RecordSource
from llavakit.training.rows import open_rows
from llavakit.types import Conversation

__all__ = ["RowSet", "open_sets", "open_source", "plan_batches", "talks_of"]

_LOG = logger("training")
Processor = LlavaProcessor | TextProcessor


@dataclass(frozen=True, slots=True)
class RowSet:
    """One set of rows and its index."""

    config: SourceConfig
    samples: RecordSource | PairSource
    index: SampleIndex

    @property
    def usable(self) -> list[int]:
        """Rows that can train."""
        return [place for place, length in enumerate(self.index.num_tokens.tolist()) if length]


def open_sets(config: TrainConfig, processor: Processor, folder: Path, parallel: Parallel) -> list[RowSet]:
    """Open the sets and measure their rows, or find what was measured in folder; the first process measures.

    Raises: DataError where there are none, or more rows of one cannot train than may be left out.
    """
    if not config.data.sources:
        raise DataError("a run needs rows to train on; name a file with --data")
    sets = []
    for place, source in enumerate(config.data.sources):
        samples = open_source(
            source,
            processor,
            is_pairs=config.preference is not None,
            max_sample_tokens=config.data.max_sample_tokens,
            masks=config.data.masks,
            corruption=None if config.preference is None else config.preference.spoils,
        )
        key = index_key({"rows": samples.digest, "processor": _digest(processor)})
        own = folder / str(place)
        if parallel.rank == 0:
            build_index(samples, own, key=key, workers=max(1, config.workers), volatile=PICTURE_FAULTS)
        parallel.wait()
        index = load_index(own)
        _check_share(source.rows, index, own, config.data.max_bad_share, is_first=parallel.rank == 0)
        sets.append(RowSet(source, samples, index))
    return sets


def open_source(
    source: SourceConfig,
    processor: Processor,
    *,
    is_pairs: bool,
    max_sample_tokens: int,
    masks: Literal["answers", "llava-exact"] = "answers",
    corruption: CorruptionConfig | None = None,
) -> RecordSource | PairSource:
    """Open one set of rows and its pictures. Raises: DataError, ConfigError."""
    rows, pictures = open_rows(source.rows, subset=source.subset, split=source.split), open_pictures(source.images)
    if not is_pairs:
        return RecordSource(rows, pictures, processor, max_sample_tokens=max_sample_tokens, is_exact=masks == "llava-exact")
    if masks != "answers":
        raise ConfigError("pairs learn their answers; masks like the original's are for instruction data")
    return PairSource(rows, pictures, processor, corruption=corruption, max_sample_tokens=max_sample_tokens)


def plan_batches(sets: Sequence[RowSet], config: TrainConfig) -> BestFitSource:
    """Plan the batches of all sets by their weights. Raises: DataError where a set has no row that can train."""
    parts = [Part(one.config.rows, one.samples, one.index.num_tokens.tolist(), one.config.weight) for one in sets]
    return BestFitSource(parts, config.data, packer=pack if config.preference is None else pack_pairs)


def talks_of(sets: Sequence[RowSet], count: int) -> list[Conversation]:
    """Return the first conversations that can train, from each set in turn."""
    usable = [one.usable for one in sets]
    chosen = [(one, places[turn]) for turn in range(count) for one, places in zip(sets, usable, strict=True) if turn < len(places)]
    return [one.samples.talk(place) for one, place in chosen[:count]]


def _digest(processor: Processor) -> str:
    """Digest everything that decides what a row becomes."""
    words = {name: hashlib.sha256(data).hexdigest() for name, data in processor.tokenizer.files().items()}
    images = None
    if isinstance(processor, LlavaProcessor):
        images = [processor.image_processor.to_dict(), processor.patch_size, processor.keep_cls, processor.has_cls, processor.image_marks]
    return index_key({"words": words, "template": repr(processor.template), "images": images})


def _check_share(name: str, index: SampleIndex, folder: Path, most: float, *, is_first: bool) -> None:
    """Say what is wrong with the rows. Raises: DataError when more of them cannot train than may be left out."""
    for kind, count in index.counts.items() if is_first else ():
        _LOG.warning("%s: %d of %d rows: %s", name, count, len(index), kind)
    if index.num_fatal > most * len(index):
        raise DataError(
            f"{name}: {index.num_fatal} of {len(index)} rows cannot train, at most a share of {most} may be left out "
            f"(data.max_bad_share); {folder / 'problems.jsonl'} lists them, llava data check shows them"
        )
