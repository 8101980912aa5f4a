"""Pictures decoded by processes that may die.

Owns: Decoders. Invariants: a picture that takes too long, too much memory, or kills its process is that picture's fault and nobody
else's; no more pictures are decoded at once than there are processes; bytes cross pipes as bytes, nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence

from PIL import Image

from llavakit.errors import AnimationError, BusyError, ImageError
from llavakit.logs import logger
from llavakit.server.config import ServerConfig
from llavakit.server.decoder import ANIMATED, FINE, HEAD, READY, REPLY, SIZE

__all__ = ["Decoders"]

_LOG = logger("server")
_MOST_PICTURES = 1000
"""Pictures that a process decodes before a fresh one takes its place."""
_START_S = 30.0
_PATIENCE = 6.0
"""How many times what a picture may take of a core it may take by the clock."""


class _Decoder:
    """One process and how often it was asked."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.num_pictures = 0


class Decoders:
    """Some processes that decode pictures."""

    def __init__(self, config: ServerConfig) -> None:
        limits = {
            "max_bytes": config.max_image_bytes,
            "max_pixels": config.max_image_pixels,
            "max_side": config.max_image_side,
            "max_aspect": config.max_image_aspect,
            "max_total_pixels": config.max_images_pixels,
            "decoder_bytes": config.decoder_bytes,
            "decode_s": config.decode_s,
        }
        self._command = (sys.executable, "-m", "llavakit.server.decoder", json.dumps(limits))
        self._decode_s = config.decode_s
        self._free: asyncio.Queue[_Decoder] = asyncio.Queue()
        self._all = [_Decoder() for _ in range(config.num_decoders)]
        self.num_killed = 0
        for decoder in self._all:
            self._free.put_nowait(decoder)

    async def sizes(self, pictures: Sequence[bytes]) -> list[tuple[int, int]]:
        """Read the width and height of pictures. Raises: ImageError, BusyError."""
        return [SIZE.unpack(await self._ask(b"S", data)) for data in pictures]

    async def images(self, pictures: Sequence[bytes]) -> list[Image.Image]:
        """Decode pictures. Raises: ImageError, BusyError."""
        images = []
        for data in pictures:
            reply = await self._ask(b"D", data)
            images.append(Image.frombytes("RGB", SIZE.unpack_from(reply), reply[SIZE.size :]))
        return images

    def pids(self) -> list[int]:
        """List the processes that run."""
        return [decoder.process.pid for decoder in self._all if decoder.process is not None and decoder.process.returncode is None]

    async def close(self) -> None:
        """End the processes."""
        for decoder in self._all:
            await _end(decoder)

    async def _ask(self, wanted: bytes, data: bytes) -> bytes:
        decoder = await self._free.get()
        is_whole = False
        try:
            process = await self._running(decoder)
            async with asyncio.timeout(_PATIENCE * self._decode_s):
                status, reply = await _exchange(process, wanted, data)
            is_whole = True
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            self.num_killed += 1
            _LOG.warning("a picture of %d bytes ended the process that decoded it (%s)", len(data), type(error).__name__)
            raise ImageError("the picture takes too much time or memory to decode; send it in another form, or smaller") from None
        finally:
            decoder.num_pictures += 1
            if not is_whole or decoder.num_pictures >= _MOST_PICTURES:
                await _end(decoder)
            self._free.put_nowait(decoder)
        if status == FINE:
            return reply
        raise (AnimationError if status == ANIMATED else ImageError)(reply.decode())

    async def _running(self, decoder: _Decoder) -> Process:
        """Return its process, started if need be. Raises: BusyError; what keeps one from starting is no picture's fault."""
        if decoder.process is not None and decoder.process.returncode is None:
            return decoder.process
        decoder.num_pictures = 0
        try:
            async with asyncio.timeout(_START_S):
                decoder.process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
                assert decoder.process.stdout is not None
                await decoder.process.stdout.readexactly(len(READY))
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            _LOG.warning("no process that decodes pictures could be started (%s)", type(error).__name__)
            raise BusyError("no process that decodes pictures could be started") from error
        return decoder.process


async def _exchange(process: Process, wanted: bytes, data: bytes) -> tuple[int, bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(HEAD.pack(wanted, len(data)))
    process.stdin.write(data)
    await process.stdin.drain()
    status, length = REPLY.unpack(await process.stdout.readexactly(REPLY.size))
    return status, await process.stdout.readexactly(length)


async def _end(decoder: _Decoder) -> None:
    process, decoder.process = decoder.process, None
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
