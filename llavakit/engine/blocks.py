"""The blocks of the paged cache: who uses which, and which of them hold text that may come again.

Owns: BlockPool, and the keys by which full blocks are found again. Refuses: torch, requests.
Invariant: a block is free, in use (by as many holders as it counts), or idle: full, keyed, held by nobody and kept until its place is
needed, the one that was used longest ago first. Only full blocks have keys.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["BlockPool", "Span", "block_key", "root_key"]


@dataclass(frozen=True, slots=True)
class Span:
    """The positions start to stop - 1 of a prompt, which hold a picture's features from one of them on."""

    start: int
    stop: int
    digest: str
    """Of the picture: size, mode and pixels."""
    offset: int = 0
    """Which feature of the picture is the first here."""


def root_key(adapter: str, tenant: str) -> bytes:
    """Return the key before a sequence's first block: what differs in adapter or tenant shares nothing."""
    return hashlib.sha256(json.dumps([adapter, tenant]).encode()).digest()


def block_key(before: bytes, ids: Sequence[int], first: int, spans: Sequence[Span]) -> bytes:
    """Return the key of a block: of everything before it, its ids, and the pictures that fill some of its positions from first on.

    The whole SHA-256 is the key, so that equal keys mean equal text and pictures, and no second comparison is needed.
    """
    stop = first + len(ids)
    key = hashlib.sha256(before)
    key.update(array("q", ids))
    for span in spans:
        if span.start < stop and span.stop > first:
            key.update(f"{span.digest} {span.start - first} {span.stop - first} {span.offset};".encode())
    return key.digest()


class BlockPool:
    """A number of equal blocks, by index."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._uses = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that allocate() can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def allocate(self) -> int | None:
        """Give a block to one holder; an idle one loses its text. None when all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._unkey(block)
        else:
            return None
        self._uses[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """Give one more holder the block of this key; None when there is none."""
        block = self._known.get(key)
        if block is not None:
            self.hold(block)
        return block

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def hold(self, block: int) -> None:
        """Count one more holder of a block."""
        if self._uses[block] == 0:
            del self._idle[block]
        self._uses[block] += 1

    def release(self, block: int) -> None:
        """Count one holder less; a keyed block without holders stays findable."""
        assert self._uses[block] > 0, "a block that nobody holds was released"
        self._uses[block] -= 1
        if self._uses[block] == 0:
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def commit(self, block: int, key: bytes) -> None:
        """Key a full block, unless another one holds the same text already."""
        if key not in self._known and self._keys[block] is None:
            self._known[key], self._keys[block] = block, key

    def forget(self, block: int) -> None:
        """Take a block's key away, so that nobody finds it any more."""
        self._unkey(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check the invariant against the tables of all holders. Raises: AssertionError."""
        holders: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            holders.update(table)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(self.num_blocks):
            assert self._uses[block] == holders[block], f"block {block} counts {self._uses[block]} holders of {holders[block]}"
            states = (block in free) + (block in idle) + (self._uses[block] > 0)
            assert states == 1, f"block {block} is in {states} states"
            assert block not in idle or self._keys[block] is not None, f"block {block} is idle without a key"
            assert block not in free or self._keys[block] is None, f"block {block} is free with a key"
        assert {key: block for block, key in enumerate(self._keys) if key is not None} == self._known

    def _unkey(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key]
            self._keys[block] = None
