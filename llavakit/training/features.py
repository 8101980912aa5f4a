"""What a frozen tower makes of the pictures, kept on disk: worth it where several epochs, or several runs, see the same pictures.

Owns: build_features and CachedSamples. A sample is kept whole, ids and mask too, so that its picture is neither read nor decoded again.
Of a 7B the tower is 2 % of a stage-1 step and its features are 1.2 MB a picture; of a small model it is up to a third (docs/training.md).
Invariant: with the cache a run has the losses that it has without, up to the rounding of how many tiles the tower sees at once.
Legend: N tiles  P patches  D width of the tower
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llavakit.errors import ConfigError, LlavaError
from llavakit.geometry import ImageGrid
from llavakit.logs import logger
from llavakit.model.llava import LlavaCore
from llavakit.storage.tensors import TensorFile, write_file
from llavakit.training.data import Sample, SampleSource, draw_sample

__all__ = ["CachedSamples", "build_features"]

_LOG = logger("training")
_CHUNK = 256
_LOG_EVERY_S = 10.0
_NONE = torch.empty(0, 3, 1, 1)


@torch.inference_mode()
def build_features(core: LlavaCore, samples: SampleSource, usable: Sequence[int], folder: Path, *, dtype: torch.dtype) -> CachedSamples:
    """Keep every usable sample of a source in folder, those that are not there yet; a sample that cannot be built is left out.

    The folder belongs to this tower and these rows: name it by a digest of both. Raises: ConfigError for pictures in tiles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = core.get_input_embeddings().weight.device
    began = shown = time.monotonic()
    for first in range(0, len(usable), _CHUNK):
        path = folder / f"{first // _CHUNK}.safetensors"
        if path.is_file():
            continue
        tensors: dict[str, Tensor] = {}
        for index in usable[first : first + _CHUNK]:
            try:
                sample = draw_sample(samples, index)
            except LlavaError as error:
                _LOG.warning("no features are kept: %s", error)
                continue
            if any(grid.anyres is not None for grid in sample.grids):
                raise ConfigError(
                    "features of pictures in tiles are not kept: they are up to five times as large; turn data.cache_features off"
                )
            tensors |= {f"{index}.ids": torch.tensor(sample.ids), f"{index}.mask": torch.tensor(sample.loss_mask, dtype=torch.uint8)}
            if sample.grids:
                tensors[f"{index}.seen"] = core.see(sample.tiles_N3SS.to(device), dtype=dtype).cpu()
        unfinished = path.with_suffix(".part")
        write_file(unfinished, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, iter(tensors.items()))
        unfinished.replace(path)
        if (now := time.monotonic()) - shown >= _LOG_EVERY_S:
            shown, done = now, min(first + _CHUNK, len(usable))
            _LOG.info("features of %d of %d samples, %.0f s left", done, len(usable), (len(usable) - done) * (now - began) / done)
    return CachedSamples(folder, {index: place // _CHUNK for place, index in enumerate(usable)}, core.config.image_grid)


class CachedSamples:
    """A SampleSource whose pictures the tower has seen already."""

    def __init__(self, folder: Path, chunks: dict[int, int], grid: ImageGrid) -> None:
        """Take the chunk of each sample, and the image tokens of a picture."""
        self._folder, self._chunks, self._grid = folder, chunks, grid

    def sample(self, index: int) -> Sample:
        """Read a sample. Raises: ConfigError for one that is not kept."""
        file = self._open(self._chunks[index]) if index in self._chunks else None
        if file is None or f"{index}.ids" not in file.specs:
            raise ConfigError(f"sample {index} could not be built when features were kept")
        seen_NPD = file.read(f"{index}.seen") if f"{index}.seen" in file.specs else None
        grids = (self._grid,) * (0 if seen_NPD is None else seen_NPD.shape[0])
        mask = tuple(map(bool, file.read(f"{index}.mask").tolist()))
        return Sample(tuple(file.read(f"{index}.ids").tolist()), mask, _NONE, grids, seen_NPD)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - there is one of these for a run
    def _open(self, chunk: int) -> TensorFile:
        return TensorFile(self._folder / f"{chunk}.safetensors")
