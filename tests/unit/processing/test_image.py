"""Pictures: what is refused, what people see, and where pixels go. The letters A1-A30 are the fault catalogue's rows."""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from llavakit.errors import CheckpointError, ImageError
from llavakit.processing.decode import DEFAULT_LIMITS, ImageLimits, decode_image, image_digest, image_size
from llavakit.processing.image import ImageProcessor

RED, WHITE = (255, 0, 0), (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns * 5 % 256, rows * 7 % 256, (rows + columns) % 256], axis=-1).astype(np.uint8))


def png(width: int, height: int, body: bytes = b"", *, depth: int = 1, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + (chunk(b"IDAT", zlib.compress(body)) if body else b"") + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sizes
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def gif_screen(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff;"


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def assert_refused(data: bytes, complaint: str = ".") -> None:
    with pytest.raises(ImageError, match=complaint) as caught:
        decode_image(data)
    assert not re.search(r"0x[0-9a-f]{6,}|[/\\]|<|PIL|Error", str(caught.value).replace("1/", "")), (
        "A30: no addresses, paths or library text"
    )


# What is refused


@pytest.mark.catalogue("A1")
@pytest.mark.parametrize(
    "data", [b"", b"x", b"\0" * 100, b"\xff\xd8\xff", b"BM", b"GIF89a", b"RIFF1234WEBP", b"RIFF1234WAVEfmt ", b"\x89PNG\r\n\x1a\n"]
)
def test_rubbish_is_refused_a1(data: bytes) -> None:
    assert_refused(data)


@pytest.mark.catalogue("A2")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_cut_anywhere_is_refused_or_whole_a2(kind: str) -> None:
    data = encoded(gradient(24, 18), kind)
    whole = decode_image(data)
    for length in range(len(data)):
        try:
            assert image_digest(decode_image(data[:length])) == image_digest(whole)
        except ImageError:
            continue


@pytest.mark.catalogue("A3", "A4", "A5", "A6")
@pytest.mark.parametrize("build", [png, webp_canvas, gif_screen, bmp_header])
@pytest.mark.parametrize(
    ("width", "height", "complaint"),
    [
        (13000, 13000, "at most 8192"),
        (1, 10000, "at most 8192"),
        (8000, 8000, "at most 16777216 pixels"),
        (10, 641, "factor of 64"),
        (8192, 1, "factor of 64"),
    ],
)
def test_sizes_are_refused_from_the_header_a3_to_a6(build: Callable[[int, int], bytes], width: int, height: int, complaint: str) -> None:
    data = build(width, height)
    assert len(data) < 200
    with pytest.raises(ImageError, match=f"{complaint}|header"):  # an empty GIF or WebP is refused as such
        decode_image(data)
    if build is png:
        assert_refused(data, complaint)


@pytest.mark.catalogue("A8")
@pytest.mark.parametrize("build", [png, gif_screen, bmp_header])
@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels_are_refused_a8(build: Callable[[int, int], bytes], width: int, height: int) -> None:
    assert_refused(build(width, height))


@pytest.mark.catalogue("A6")
def test_thin_pictures_within_the_limits_are_pictures_a6() -> None:
    tile = ImageProcessor(size_px=28, crop_px=28, aspect="pad").apply(decode_image(encoded(Image.new("RGB", (32, 2048), RED))))
    assert tile.shape == (1, 3, 28, 28)


@pytest.mark.catalogue("A9")
@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused_a9(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    assert_refused(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100), "animated")


@pytest.mark.catalogue("A9")
def test_the_first_picture_of_a_multi_picture_jpeg_counts_a9() -> None:
    first = Image.new("RGB", (16, 16), RED)
    data = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), WHITE)])
    assert decode_image(data).getpixel((3, 3)) == pytest.approx(RED, abs=3)


@pytest.mark.catalogue("A17")
@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "EPS", "PDF", "PCX", "AVIF", "JPEG2000"])
def test_other_formats_are_refused_a17(kind: str) -> None:
    assert_refused(encoded(Image.new("RGB", (16, 16), RED), kind), "not a JPEG")


@pytest.mark.catalogue("A17")
def test_markup_is_refused_a17() -> None:
    assert_refused(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a JPEG")


@pytest.mark.catalogue("A20")
def test_progressive_jpegs_with_endless_scans_are_refused_a20() -> None:
    data = encoded(gradient(64, 64), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    assert_refused(data[:end] + data[start:end] * 300 + data[end:], "scans")
    assert decode_image(data).size == (64, 64)


@pytest.mark.catalogue("A21")
def test_damaged_png_data_is_refused_a21() -> None:
    data = bytearray(encoded(gradient(40, 40)))
    data[len(data) // 2] ^= 0xFF
    assert_refused(bytes(data), "damaged")


@pytest.mark.parametrize("limit", [{"max_bytes": 10}, {"max_pixels": 63}, {"max_side": 7}])
def test_limits_can_be_set(limit: dict[str, int]) -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    assert decode_image(data).size == image_size(data) == (8, 8)
    with pytest.raises(ImageError):
        decode_image(data, ImageLimits(**limit))
    with pytest.raises(ImageError):
        image_size(data, ImageLimits(**limit))


def test_too_many_bytes_are_refused() -> None:
    assert_refused(encoded(Image.new("RGB", (8, 8))) + b"\0" * DEFAULT_LIMITS.max_bytes, "bytes")


# What people see


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded(kind: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (20, 10), RED), kind))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert image.getpixel((5, 5)) == pytest.approx(RED, abs=3)


@pytest.mark.catalogue("A20", "A21")
def test_interlaced_png_and_progressive_jpeg_are_decoded_a20_a21() -> None:
    image = gradient(33, 21)
    rows = np.asarray(image)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    body = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in rows[y::dy, x::dx] if row.size)
    data = png(33, 21, body, depth=8, colour=2)
    head = data[12:28] + b"\1"
    assert decode_image(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]).tobytes() == image.tobytes()
    assert decode_image(encoded(image, "JPEG", progressive=True)).tobytes() == decode_image(encoded(image, "JPEG")).tobytes()


@pytest.mark.catalogue("A10")
@pytest.mark.parametrize(
    ("cmyk", "rgb"), [((0, 255, 255, 0), RED), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), (0, 0, 0)), ((255, 0, 255, 0), (0, 255, 0))]
)
def test_cmyk_colours_are_right_a10(cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    assert decode_image(encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)).getpixel((4, 4)) == pytest.approx(rgb, abs=2)


@pytest.mark.catalogue("A11")
def test_sixteen_bits_are_scaled_a11() -> None:
    grey = Image.fromarray(np.array([[0, 40000, 65535, 256]], dtype=np.uint16))
    assert [pixel[0] for pixel in np.asarray(decode_image(encoded(grey)))[0].tolist()] == [0, 156, 255, 1]


@pytest.mark.catalogue("A13")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16"])
def test_transparency_lies_on_white_a13(mode: str) -> None:
    if mode in ("RGBA", "LA"):
        data = encoded(Image.new(mode, (4, 4), 0))
    elif mode == "I;16":
        data = encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), transparency=0)
    else:
        data = encoded(Image.new(mode, (4, 4), 0), transparency=0)
    assert decode_image(data).getpixel((1, 1)) == WHITE
    if mode != "P":
        assert decode_image(data, faithful=True).getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.catalogue("A14")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied_a14(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 16, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the transposition that a camera would have stored
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif, **options)
    seen = decode_image(data)
    assert seen.size == (32, 16)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(upright)).max() <= 6
    assert image_size(data) == (32, 16)
    assert decode_image(data, faithful=True).size == stored.size == image_size(data, faithful=True)


@pytest.mark.catalogue("A14", "A16")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own remark
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0junk" * 9, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\xff\xff\xff\xff"]
)
def test_damaged_exif_and_icc_are_ignored_a14_a16(exif: bytes) -> None:
    image = gradient(16, 16)
    seen = decode_image(encoded(image, "JPEG", exif=exif, icc_profile=b"junk" * 99))
    assert seen.tobytes() == decode_image(encoded(image, "JPEG")).tobytes()


@pytest.mark.catalogue("A15")
def test_text_bombs_are_bounded_a15() -> None:
    data = png(4, 4, b"\0" * 20, depth=8)
    text = b"Comment\0\0" + zlib.compress(bytes(8 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(ImageError, match="damaged"):
        decode_image(data[:33] + chunk * 40 + data[33:])


@pytest.mark.catalogue("A16")
def test_colour_profiles_are_not_applied_a16() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = gradient(16, 16)
    assert decode_image(encoded(image, icc_profile=profile)).tobytes() == image.tobytes()


@pytest.mark.catalogue("A19")
def test_what_follows_a_picture_does_not_matter_a19() -> None:
    tail = io.BytesIO()
    with zipfile.ZipFile(tail, "w") as archive:
        archive.writestr("index.html", "<script>")
    data = encoded(gradient(16, 16), "JPEG")
    assert decode_image(data + tail.getvalue()).tobytes() == decode_image(data).tobytes()


@pytest.mark.catalogue("G1")
def test_digests_tell_shapes_and_palettes_apart() -> None:
    zeros = [Image.new("RGB", size) for size in ((30, 100), (100, 30))]
    assert len({image_digest(image) for image in zeros}) == 2
    assert image_digest(zeros[0]) == image_digest(zeros[0].copy())


# Where pixels go


@pytest.mark.catalogue("A7")
@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_any_small_size_becomes_a_tile_a7(aspect: Any) -> None:
    processor = ImageProcessor(size_px=14, crop_px=14, aspect=aspect)
    for width in range(1, 41, 3):
        for height in range(1, 41, 2):
            assert processor.apply(Image.new("RGB", (width, height), RED)).shape == (1, 3, 14, 14)


def test_padding_equals_padding_first() -> None:
    processor = ImageProcessor(size_px=56, crop_px=56, aspect="pad")
    for width, height in ((300, 1500), (1500, 300), (57, 56), (1, 40)):
        image = gradient(width, height)
        side = max(width, height)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        assert torch.equal(processor.apply(image), processor.apply(square))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_only_rgb_becomes_a_tile(mode: str) -> None:
    with pytest.raises(ImageError, match=mode):
        ImageProcessor().apply(Image.new(mode, (8, 8)))


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_settings_survive_their_file(aspect: Any) -> None:
    processor = ImageProcessor(size_px=60, crop_px=56, aspect=aspect, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert ImageProcessor.from_dict(processor.to_dict()) == processor


def test_absent_settings_are_clips() -> None:
    assert ImageProcessor.from_dict({}) == ImageProcessor(size_px=224, crop_px=224)


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 2}, {"do_resize": False}, {"do_center_crop": 1}, {"do_rescale": False}, {"rescale_factor": 1.0},
        {"size": {"height": 336, "width": 336}}, {"size": "big"}, {"size": 0}, {"size": True}, {"size": 10**6},
        {"crop_size": {"height": 336, "width": 224}}, {"crop_size": {}},
        {"image_mean": [0.5]}, {"image_mean": 3}, {"image_std": [1, 2, "x"]},
    ],
)  # fmt: skip
def test_other_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change))):
        ImageProcessor.from_dict({**ImageProcessor().to_dict(), **change})


def test_nulls_count_as_absent_and_square_sizes_in_either_form() -> None:
    nulls = dict.fromkeys(("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop", "rescale_factor", "do_pad"))
    assert ImageProcessor.from_dict(nulls) == ImageProcessor.from_dict({})
    values = {"image_grid_pinpoints": [[28, 56]], "crop_size": 28}
    shortest, square = {"size": {"shortest_edge": 28}}, {"size": {"height": 28, "width": 28}}
    assert ImageProcessor.from_dict({**values, **shortest}) == ImageProcessor.from_dict({**values, **square})
    padded = {"do_pad": True, "size": {"shortest_edge": 28}}
    assert ImageProcessor.from_dict({**padded, "do_center_crop": False}) == ImageProcessor.from_dict({**padded, "crop_size": 28})


def test_pinpoints_must_be_whole_tiles() -> None:
    with pytest.raises(CheckpointError, match="multiples of the tile's side 224"):
        ImageProcessor.from_dict({"image_grid_pinpoints": [[336, 672]]})
