"""Features of pictures, each encoded once.

Owns: FeatureCache, a cache of projected features that is bounded in bytes, the one used longest ago leaving first, and the places of
pictures in a prompt. Each picture is encoded by itself, so that its features do not depend on what else is asked at the time.
Legend: F image features  D model width  N tiles  S side in pixels
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection

from torch import Tensor

from llavakit.engine.blocks import Span
from llavakit.errors import PromptError
from llavakit.geometry import ImageGrid, num_image_tokens, num_tiles
from llavakit.processing.processor import Prompt

__all__ = ["FeatureCache", "Picture", "pictures_of", "spans_of"]


class Picture:
    """A picture of a prompt, ready for the tower."""

    __slots__ = ("digest", "grid", "tiles_N3SS")

    def __init__(self, tiles_N3SS: Tensor, grid: ImageGrid, digest: str) -> None:
        self.tiles_N3SS, self.grid, self.digest = tiles_N3SS, grid, digest


def pictures_of(prompt: Prompt) -> list[Picture]:
    """Cut a prompt's tiles into its pictures; one whose digest nobody gave is told by its tiles."""
    pictures, first = [], 0
    for index, grid in enumerate(prompt.grids):
        tiles = prompt.tiles_N3SS[first : first + num_tiles(grid)]
        first += tiles.shape[0]
        digest = prompt.digests[index] if prompt.digests else hashlib.sha256(tiles.contiguous().numpy().tobytes()).hexdigest()
        pictures.append(Picture(tiles, grid, digest))
    return pictures


def spans_of(prompt: Prompt, pictures: list[Picture], image_ids: Collection[int]) -> tuple[Span, ...]:
    """Say which positions each picture fills. Raises: PromptError when image ids and pictures do not fit each other."""
    places = iter([index for index, token in enumerate(prompt.ids) if token in image_ids])
    spans: list[Span] = []
    for picture in pictures:
        wanted = num_image_tokens(picture.grid)
        own = list(itertools.islice(places, wanted))
        if len(own) < wanted:
            raise PromptError(f"the prompt has {len(own)} positions left for a picture of {wanted} features; build it with the processor")
        starts = [index for index in range(wanted) if index == 0 or own[index] != own[index - 1] + 1]
        stops = [*starts[1:], wanted]
        spans += [Span(own[start], own[stop - 1] + 1, picture.digest, start) for start, stop in zip(starts, stops, strict=True)]
    if (num_left := sum(1 for _ in places)) > 0:
        raise PromptError(f"the prompt has {num_left} image positions more than its pictures have features; build it with the processor")
    return tuple(spans)


class FeatureCache:
    """Features by tenant, adapter and picture, at most max_bytes of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.num_encoded = self.num_found = 0
        self._features: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def features(self, key: tuple[str, ...], encode: Callable[[], Tensor]) -> Tensor:
        """Return the features_FD of a key, from the cache or else encoded."""
        known = self._features.get(key)
        if known is not None:
            self._features.move_to_end(key)
            self.num_found += 1
            return known
        features_FD = encode()
        self.num_encoded += 1
        self._keep(key, features_FD)
        return features_FD

    def _keep(self, key: tuple[str, ...], features_FD: Tensor) -> None:
        self._features[key] = features_FD
        self.num_bytes += features_FD.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.num_bytes -= oldest.nbytes
