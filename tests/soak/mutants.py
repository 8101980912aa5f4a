"""Damaged pictures by number: mutant(i) is a pure function of i.

Run as a module it decodes many of them in a process of its own and prints what happened, memory included, as JSON.
"""

from __future__ import annotations

import functools
import io
import json
import random
import resource
import sys
import time
import warnings
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from llavakit.errors import ImageError
from llavakit.processing.decode import DEFAULT_LIMITS, decode_image

__all__ = ["Outcome", "decode_mutants", "mutant"]

_EXTREMES = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x20\x00", b"\xff\xff")


@dataclass(frozen=True)
class Outcome:
    """What became of a series of mutants."""

    num_files: int
    num_pictures: int
    num_refused: int
    slowest_s: float
    peak_growth_bytes: int
    """Rise of the process's peak resident memory."""


def decode_mutants(first: int, count: int) -> Outcome:
    """Decode mutants first..first+count-1; anything but a picture within the limits or an ImageError is raised."""
    num_pictures, slowest_s = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        data = mutant(number)
        start = time.perf_counter()
        try:
            image = decode_image(data)
        except ImageError:
            pass
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= DEFAULT_LIMITS.max_pixels
            num_pictures += 1
        slowest_s = max(slowest_s, time.perf_counter() - start)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Outcome(count, num_pictures, count - num_pictures, round(slowest_s, 3), growth * 1024)


def mutant(number: int) -> bytes:
    """Damage one of the seeds in one to three ways."""
    rng = random.Random(number)
    data = bytearray(rng.choice(_seeds()))
    for _ in range(rng.randint(1, 3)):
        _damage(data, rng)
    return bytes(data)


def _damage(data: bytearray, rng: random.Random) -> None:
    place, length = rng.randrange(len(data) + 1), rng.randint(1, 64)
    match rng.randrange(8):
        case 0:
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1:
            place = rng.randrange(min(len(data), 64))  # headers decide about memory
            data[place] ^= 1 << rng.randrange(8)
        case 2:
            place, extreme = rng.randrange(min(len(data), 128)), rng.choice(_EXTREMES)
            data[place : place + len(extreme)] = extreme
        case 3:
            del data[max(place, 1) :]
        case 4:
            data[place:place] = rng.randbytes(length)
        case 5:
            data[place:place] = data[place : place + length] * rng.randint(1, 200)
        case 6:
            del data[max(place, 1) : place + length]
        case _:
            other = rng.choice(_seeds())
            data[max(place, 1) :] = other[rng.randrange(len(other)) :]


@functools.cache
def _seeds() -> tuple[bytes, ...]:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    rgb, flat = Image.fromarray(noise), Image.new("RGB", (120, 90), (10, 200, 30))
    grey16 = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    frames = [flat.resize(rgb.size).convert("P"), rgb.convert("P")]
    return (
        *(_encoded(image, kind) for image in (rgb, flat) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")),
        *(_encoded(image, kind) for image in (rgb.convert("L"), rgb.convert("1")) for kind in ("PNG", "BMP", "GIF")),
        _encoded(rgb, "JPEG", progressive=True, exif=exif, icc_profile=b"profile" * 40),
        _encoded(rgb.convert("CMYK"), "JPEG"),
        _encoded(flat, "MPO", save_all=True, append_images=[rgb]),
        *(_encoded(alpha, kind) for kind in ("PNG", "WEBP", "BMP")),
        _encoded(rgb, "WEBP", lossless=True, exif=exif),
        _encoded(rgb.quantize(16), "PNG", transparency=3, exif=exif),
        _encoded(grey16, "PNG"),
        *(_encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")),
    )


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow remarks on damaged EXIF
    sys.stdout.write(json.dumps(asdict(decode_mutants(0, int(sys.argv[1])))) + "\n")
