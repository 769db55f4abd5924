"""One image file to an RGB picture that shows what a viewer would show; and the small picture of it for the page."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

# What is read, whatever the file's name says. Formats that start other programs (EPS) stay out.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
THUMBNAIL_PX = 64
# Transforms resize the shorter side to 256 pixels or so: the longer side of a thin image would fill the memory.
MOST_ASPECT = 1000

# What Pillow raises on a file that is broken. An error that says nothing about the file (no more file handles, no more
# memory) must not count as a bad image, or the choice of images would depend on the machine.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_T = TypeVar("_T")


class BadImage(Exception):
    """An image that cannot be used; the message is the reason in plain words."""


def decode_file(
    path: str | os.PathLike[str], max_pixels: int, jpeg: Callable[[bytes, int], _T] | None = None
) -> Image.Image | _T:
    """The picture in a file: first frame, upright by its EXIF orientation, on white where transparent, mode RGB.

    The format is found from the content. Colour profiles are not applied (as torchvision doesn't).

    Parameters
    ----------
    path : path
    max_pixels : int
    jpeg : callable, optional
        Takes the bytes and the EXIF orientation of a JPEG file in grey or RGB, and its result is returned; Pillow
        decodes all others.

    Raises
    ------
    BadImage
        If the file is missing, not a file, unreadable, empty, not an image of `FORMATS`, corrupt or truncated, or has
        more than `max_pixels` pixels, or one side more than 1000 times as long as the other: that is known from its
        header, before anything is decoded.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BadImage("a folder, not a file")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise BadImage("not a regular file")
        with open(path, "rb") as file:
            image = identify(file)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels, more than the {max_pixels:,} that max_pixels allows")
            if max(image.size) > MOST_ASPECT * min(image.size):
                raise BadImage(f"{width} x {height} pixels: one side is more than {MOST_ASPECT} times the other")
            if jpeg and image.format == "JPEG" and image.mode in ("L", "RGB"):
                turn = orientation(image)
                file.seek(0)
                return jpeg(_whole_jpeg(file.read()), turn)
            image.load()
            return to_rgb(upright(image, orientation(image)))
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        raise BadImage(words(error)) from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (as it is stored) where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except BROKEN:  # the pixels are whole: viewers show such a picture as it is stored
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is meant to be seen."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB: transparency on white, 16 and 32-bit grey scaled to 8 bits and not clipped.

    White is 65535 in 16-bit grey, and in 32-bit integers that keep within 0..65535; 1.0 in floats that keep within
    0..1. All other integers and floats are stretched from their least to their greatest value.

    Raises
    ------
    BadImage
        If a float picture holds NaN or infinity.
    ValueError
        For a mode that Pillow can't convert (LAB).
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def encode_thumbnail(picture: Image.Image | Tensor) -> bytes:
    """A JPEG file of the picture, its longest side at most `THUMBNAIL_PX`.

    (WebP takes ten times as long to write and saves a tenth.) A tensor ``(c, h, w)`` is stretched from its least to its
    greatest finite value; of 3 channels or more, the first 3 are red, green and blue, else the first is grey.
    """
    image = _picture(picture) if isinstance(picture, Tensor) else picture
    shrink = THUMBNAIL_PX / max(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def identify(file: IO[bytes]) -> ImageFile.ImageFile:
    """Read the header of an image file.

    This is what `PIL.Image.open` does, but for its check against the global ``Image.MAX_IMAGE_PIXELS``: that could only
    be passed by changing it for every thread of the user's program. Here `max_pixels` is the limit instead.
    """
    prefix = file.read(16)
    if not prefix:
        raise BadImage("the file is empty")
    Image.preinit()
    if not all(name in Image.OPEN for name in FORMATS):
        Image.init()
    reasons = []
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept(prefix) if accept else True
        if isinstance(accepted, str):  # Pillow was built without this format, and says so
            reasons.append(accepted)
        elif accepted:
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, LookupError, TypeError, struct.error) as error:
                reasons.append(f"broken {name} header: {words(error)}")
    raise BadImage("; ".join(reasons) or f"not an image: its first bytes are none of {', '.join(FORMATS)}")


def _whole_jpeg(data: bytes) -> bytes:
    """The file's bytes, if its last scan has an end. Scans hold no such marks but as marks."""
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise BadImage(f"image file is truncated: its {len(data):,} bytes end within a scan")
    return data


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    clear = image.info.get("transparency")
    alpha = np.where(values == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise BadImage("holds NaN or infinity")
    if low >= 0 and high <= white:
        low, high = 0.0, white
    eight = Image.fromarray(_stretch(values, low, high))
    if alpha is not None:
        eight.putalpha(Image.fromarray(alpha))
    return eight


def _picture(tensor: Tensor) -> Image.Image:
    channels = tensor[:3] if len(tensor) >= 3 else tensor[:1]
    values = channels.detach().cpu().float().numpy()
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if np.size(finite) else (0.0, 1.0)
    pixels = _stretch(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high).transpose(1, 2, 0)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Take `low` to 0 and `high` to 255, rounding to the nearest."""
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8)


def words(error: BaseException) -> str:
    """What an error says, in one line and without the path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
