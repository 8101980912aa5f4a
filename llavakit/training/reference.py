"""Log probabilities of the model that preference training starts from, computed once and kept on disk.

Owns: ReferenceStore, ReferencedSource. Invariants: a value is found by the content of its sample in the file of its model, so that it
never belongs to other data or other weights; what was computed before a kill is not computed again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llavakit.errors import DataError, LlavaError
from llavakit.logs import logger
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.storage.journal import Journal
from llavakit.training.data import moved
from llavakit.training.objectives import COMPUTE_DTYPES
from llavakit.training.preference import PreferenceSample, PreferenceSource, pack_pairs

__all__ = ["Filled", "ReferenceStore", "ReferencedSource", "sample_digest"]

_LOG = logger("training")
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Filled:
    """What a store was asked for."""

    num_computed: int
    num_known: int
    """Pairs whose values were there before."""
    num_left_out: int
    """Pairs that could not be built."""


class ReferenceStore:
    """The values of one model as it is now, in a journal of its own: make it before training or adapters change the model."""

    def __init__(self, folder: Path, model: LlamaCore | LlavaCore, compute_dtype: Literal["float32", "bfloat16"]) -> None:
        """Find the model's journal in folder by its config, its weights, and the dtype of its activations."""
        self._model, self._dtype = model, COMPUTE_DTYPES[compute_dtype]
        self.path = folder / f"{_model_digest(model, compute_dtype)}.journal"

    def fill(self, samples: PreferenceSource, indices: Iterable[int], *, pairs_per_batch: int = 8) -> Filled:
        """Compute what is missing, some pairs at a time, each batch durable when the next begins; pairs that cannot be built are logged.

        Raises: StorageError.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        num_computed = num_known = num_left_out = 0
        logged_at = time.monotonic()
        with Journal(self.path) as journal:
            waiting: dict[str, PreferenceSample] = {}
            for index in indices:
                try:
                    sample = samples.sample(index)
                except LlavaError as error:
                    _LOG.warning("pair %d is left out: %s", index, error)
                    num_left_out += 1
                    continue
                digest = sample_digest(sample)
                if digest in waiting or digest in journal:
                    num_known += 1
                    continue
                waiting[digest] = sample
                if len(waiting) == pairs_per_batch:
                    num_computed += journal.put_many(self._compute(waiting))
                    waiting = {}
                if time.monotonic() - logged_at >= _LOG_EVERY_S:
                    logged_at = time.monotonic()
                    _LOG.info("reference: %d pairs computed, %d known", num_computed, num_known)
            if waiting:
                num_computed += journal.put_many(self._compute(waiting))
        return Filled(num_computed, num_known, num_left_out)

    def read(self) -> dict[str, tuple[float, ...]]:
        """Return all values by the digests of their samples. Raises: StorageError."""
        with Journal(self.path) as journal:
            return {digest: tuple(values) for digest, values in journal.items()}

    def _compute(self, samples: Mapping[str, PreferenceSample]) -> dict[str, list[float]]:
        with torch.no_grad():
            batch = moved(pack_pairs(list(samples.values())), next(self._model.parameters()).device)
            sums = self._model.logprobs_packed(batch, dtype=self._dtype).tolist()
        values: dict[str, list[float]] = {}
        for digest, sample in samples.items():
            values[digest], sums = sums[: sample.num_answers], sums[sample.num_answers :]
        return values


@dataclass(frozen=True, slots=True)
class ReferencedSource:
    """Pairs with the values of a store."""

    samples: PreferenceSource
    values: Mapping[str, tuple[float, ...]]
    """By sample_digest, as ReferenceStore.read returns them."""

    def sample(self, index: int) -> PreferenceSample:
        """Build a pair and look its values up. Raises: DataError when they were not computed for what it is now; as samples does."""
        sample = self.samples.sample(index)
        reference = self.values.get(sample_digest(sample))
        if reference is None:
            raise DataError("has no reference log probabilities: row, template, pictures or corruption changed; fill the store again")
        return replace(sample, reference=reference)


def sample_digest(sample: PreferenceSample) -> str:
    """Digest all that log probabilities depend on: ids, masks, grids, tiles."""
    hasher = hashlib.sha256(repr((sample.chosen, sample.rejected, sample.grids)).encode())
    for tiles in (sample.tiles_N3SS, sample.spoilt_N3SS):
        if tiles is not None:
            hasher.update(f"{tiles.dtype} {tuple(tiles.shape)}".encode())
            hasher.update(_bytes(tiles))
    return hasher.hexdigest()


def _model_digest(model: LlamaCore | LlavaCore, compute_dtype: str) -> str:
    hasher = hashlib.sha256(f"{compute_dtype} {model.config.to_json()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(_bytes(tensor))
    return hasher.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
