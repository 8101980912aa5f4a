"""A process that decodes pictures and does nothing else: run as `python -m llavakit.server.decoder`, told to by decoders.py.

Owns: its half of the protocol. It says READY once it has started. A request is a letter (S: width and height alone, D: pixels too), a
length and a picture's bytes; an answer a status, and width, height and RGB pixels, or what is wrong with the picture. What kills it (a
decoder's bug, too much memory, too much time) kills nothing else.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
import warnings
from typing import BinaryIO

from llavakit.errors import AnimationError, ImageError
from llavakit.processing.decode import ImageLimits, decode_image, image_size

__all__ = ["ANIMATED", "FINE", "HEAD", "READY", "REPLY", "SIZE", "WRONG", "serve"]

READY = b"R"
HEAD, REPLY = struct.Struct("<cI"), struct.Struct("<BI")
FINE, WRONG, ANIMATED = 0, 1, 2
SIZE = struct.Struct("<II")


def serve(source: BinaryIO, sink: BinaryIO, limits: ImageLimits, decode_s: float) -> None:
    """Say that requests may come, and answer them until there are no more; a picture that takes a core for longer ends the process."""
    sink.write(READY)
    sink.flush()
    while len(head := source.read(HEAD.size)) == HEAD.size:
        wanted, length = HEAD.unpack(head)
        data = source.read(length)
        if len(data) < length:
            return
        signal.setitimer(signal.ITIMER_PROF, decode_s)
        status, reply = _answer(data, limits, has_pixels=wanted == b"D")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.write(REPLY.pack(status, len(reply)))
        sink.write(reply)
        sink.flush()


def _answer(data: bytes, limits: ImageLimits, *, has_pixels: bool) -> tuple[int, bytes]:
    try:
        if not has_pixels:
            return FINE, SIZE.pack(*image_size(data, limits))
        image = decode_image(data, limits)
        return FINE, SIZE.pack(*image.size) + image.tobytes()
    except AnimationError as error:
        return ANIMATED, str(error).encode()
    except ImageError as error:
        return WRONG, str(error).encode()


def main() -> None:
    """Serve on the standard streams under the limits of the first argument."""
    settings = json.loads(sys.argv[1])
    most, decode_s = settings.pop("decoder_bytes"), settings.pop("decode_s")
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("error")  # a picture that Pillow only warns of is refused
    serve(sys.stdin.buffer, sys.stdout.buffer, ImageLimits(**settings), decode_s)


if __name__ == "__main__":
    main()
