"""Decoding: every format as a viewer shows it, every broken file with its reason."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gpuclust.capture import decode
from gpuclust.capture.decode import BadImage, decode_file, encode_thumbnail, to_rgb

LIMIT = 100_000_000


def noise(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([4 * x, 6 * y, 255 - 2 * (x + y)], axis=2).astype(np.uint8)


def save(path: Path, image: Image.Image | np.ndarray, **options) -> Path:
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = decode_file(path, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header is whole and whose pixels are not."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no pixels") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.webp", {"lossless": True}),
        ("a.tif", {}),
        ("a.ppm", {}),
        ("png_in_truth.jpg", {"format": "PNG"}),
    ],
)
def test_lossless_formats_give_the_pixels_whatever_the_name(tmp_path, name, options):
    assert np.array_equal(pixels(save(tmp_path / name, noise(), **options)), noise())


@pytest.mark.parametrize(("name", "options"), [("a.jpg", {"quality": 95}), ("a.webp", {"quality": 95})])
def test_lossy_formats_come_close(tmp_path, name, options):
    difference = np.abs(pixels(save(tmp_path / name, smooth(), **options)).astype(int) - smooth())
    assert difference.mean() < 3


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame_counts(tmp_path, name):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(pixels(tmp_path / name), np.broadcast_to(np.uint8([255, 0, 0]), (6, 8, 3)))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 25_700, 32_768, 65_535]], dtype=np.uint16)
    shown = pixels(save(tmp_path / "a.png", values))
    assert shown[:, :, 0].tolist() == [[0, 1, 100, 128, 255]]
    assert (shown[:, :, :1] == shown).all()


def test_wide_integers_and_floats_are_stretched(tmp_path):
    wide = np.array([[-100, 0, 155]], dtype=np.int32)
    assert pixels(save(tmp_path / "a.tif", wide))[0, :, 0].tolist() == [0, 100, 255]
    unit = np.array([[0.0, 0.2, 0.4]], dtype=np.float32)
    assert pixels(save(tmp_path / "b.tif", unit))[0, :, 0].tolist() == [0, 51, 102]
    tall = np.array([[0.0, 2.0, 10.0]], dtype=np.float32)
    assert pixels(save(tmp_path / "c.tif", tall))[0, :, 0].tolist() == [0, 51, 255]
    holed = np.array([[0.0, np.nan, 1.0]], dtype=np.float32)
    with pytest.raises(BadImage, match="NaN or infinity"):
        decode_file(save(tmp_path / "d.tif", holed), LIMIT)


def test_cmyk_jpeg_shows_its_colours(tmp_path):
    for ink, color in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))):
        path = save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), ink), quality=95)
        with Image.open(path) as stored:
            assert stored.mode == "CMYK"
        assert np.abs(pixels(path)[8, 8].astype(int) - color).max() <= 6


def test_palette_grey_and_bilevel(tmp_path):
    palette = Image.fromarray(smooth()).quantize(16)
    assert np.array_equal(pixels(save(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))
    grey = noise()[:, :, 0]
    assert np.array_equal(pixels(save(tmp_path / "l.png", grey)), np.repeat(grey[:, :, None], 3, axis=2))
    assert set(np.unique(pixels(save(tmp_path / "1.png", Image.fromarray(grey > 128))))) == {0, 255}


def test_transparency_is_shown_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)
    shown = pixels(save(tmp_path / "a.png", rgba))[0]
    assert shown[0].tolist() == [255, 255, 255]
    assert np.abs(shown[1].astype(int) - [227, 127, 127]).max() <= 1
    assert shown[2].tolist() == [200, 0, 0]
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 1), 9), Image.fromarray(np.uint8([[0, 255]]))])
    assert pixels(save(tmp_path / "la.png", grey_alpha))[0, :, 0].tolist() == [255, 9]


def test_a_transparent_colour_of_palette_grey_or_sixteen_bits_is_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for name in ("p.png", "p.gif"):
        assert pixels(save(tmp_path / name, palette, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    grey = np.array([[7, 8]], dtype=np.uint8)
    assert pixels(save(tmp_path / "l.png", grey, transparency=7))[0, :, 0].tolist() == [255, 8]
    deep = np.array([[257, 514]], dtype=np.uint16)
    assert pixels(save(tmp_path / "i.png", deep, transparency=257))[0, :, 0].tolist() == [255, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", noise(), exif=exif)
    with Image.open(path) as stored:
        assert np.array_equal(pixels(path), np.asarray(ImageOps.exif_transpose(stored)))
    if orientation == 6:  # stored lying on its left side: the first column is the top row, from right to left
        assert np.array_equal(pixels(path), np.rot90(noise(), -1))


def test_an_unknown_orientation_leaves_the_picture_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(pixels(save(tmp_path / "a.png", noise(), exif=exif)), noise())


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """What can be wrong with a file: its path and what the reason says."""
    whole, jpeg = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise(200, 200)).save(whole, "PNG")
    Image.fromarray(noise(200, 200)).save(jpeg, "JPEG")
    flipped = bytearray(whole.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    contents = {
        "empty": (b"", "^the file is empty$"),
        "text": (b"I am no image at all\n" * 9, "^not an image: its first bytes are none of JPEG, PNG"),
        "truncated_png": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated|broken"),
        "truncated_jpeg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "header_alone": (whole.getvalue()[:20], "broken|[Tt]runcated|header"),
        "flipped_png": (bytes(flipped), "broken|corrupt|checksum|CRC"),
        "broken_pixels": (png_header(8, 8), "broken|truncated|corrupt|data"),
        "huge": (
            png_header(13_000, 13_000),
            "^13000 x 13000 pixels, more than the 100,000,000 that max_pixels allows$",
        ),
    }
    found = {}
    for name, (content, reason) in contents.items():
        path = folder / f"{name}.jpg"
        path.write_bytes(content)
        found[name] = path, reason
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return found | {
        "folder": (folder / "folder.jpg", "^a folder, not a file$"),
        "pipe": (folder / "pipe.jpg", "^not a regular file$"),
        "missing": (folder / "missing.jpg", "^No such file or directory$"),
        "dangling": (folder / "dangling.jpg", "^No such file or directory$"),
        "circle": (folder / "circle.jpg", "symbolic links"),
    }


def test_every_broken_file_is_bad_with_its_reason_in_one_line(tmp_path):
    cases = broken_files(tmp_path)
    assert len(cases) == 13
    for path, reason in cases.values():
        with pytest.raises(BadImage, match=reason) as caught:
            decode_file(path, LIMIT)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_bad(tmp_path):
    path = save(tmp_path / "a.png", noise())
    path.chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        decode_file(path, LIMIT)


def test_max_pixels_is_inclusive_and_the_only_limit(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # would warn, hence fail, or raise in Image.open
    assert decode_file(path, 600).size == (30, 20)
    with pytest.raises(BadImage, match="30 x 20 pixels, more than the 599"):
        decode_file(path, 599)


def test_an_image_so_thin_that_resizing_would_fill_the_memory_is_bad(tmp_path):
    assert decode_file(save(tmp_path / "a.png", noise(2, 2000)), LIMIT).size == (2000, 2)
    for size in ((2, 2001), (2001, 2)):
        path = save(tmp_path / "b.png", noise(*size))
        with pytest.raises(BadImage, match="one side is more than 1000 times the other"):
            decode_file(path, LIMIT)


def test_a_machine_out_of_file_handles_is_not_a_bad_image(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise())

    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(decode, "open", full, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        decode_file(path, LIMIT)


def test_to_rgb_leaves_its_argument_alone():
    image = Image.fromarray(noise(channels=4))
    before = image.tobytes()
    assert to_rgb(image).mode == "RGB"
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (64, 48)), ((3, 5), (3, 5)), ((64, 64), (64, 64)), ((1, 999), (1, 64))]
)
def test_a_thumbnail_is_a_jpeg_of_at_most_64_pixels(size, expected):
    thumb = encode_thumbnail(Image.new("RGB", size, (200, 30, 30)))
    image = Image.open(io.BytesIO(thumb))
    assert (image.format, image.size, image.mode) == ("JPEG", expected, "RGB")
    assert np.abs(np.asarray(image)[0, 0].astype(int) - [200, 30, 30]).max() <= 4


def test_thumbnails_of_tensors():
    normalised = torch.linspace(-2, 2, 3 * 100 * 50).reshape(3, 100, 50)
    normalised[0, 0, 0] = float("nan")
    normalised[0, 0, 1] = float("inf")
    colour = Image.open(io.BytesIO(encode_thumbnail(normalised)))
    assert (colour.size, colour.mode) == ((32, 64), "RGB")
    assert np.asarray(colour)[-1, -1, 2] > 245
    assert np.asarray(colour)[5, 5, 0] < 20
    assert Image.open(io.BytesIO(encode_thumbnail(torch.zeros(1, 8, 8)))).mode == "L"
    assert Image.open(io.BytesIO(encode_thumbnail(torch.full((2, 8, 8), float("nan"))))).mode == "L"
    assert Image.open(io.BytesIO(encode_thumbnail(torch.rand(5, 8, 8)))).mode == "RGB"
