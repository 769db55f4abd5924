"""torchcodec in Pillow's place: JPEG files by libjpeg-turbo in the workers, or by nvJPEG on a GPU.

Pixels differ a little from Pillow's, so it is the user's choice, and part of the result. All other formats are
Pillow's. Scaling stays where the picture is: after nvJPEG the transform's steps run on the GPU.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gpuclust.capture.decode import THUMBNAIL_PX, identify, upright
from gpuclust.errors import UnavailableError, first_line, is_out_of_memory


@dataclass(frozen=True)
class Encoded:
    """A JPEG file, to be decoded where the network is, and its EXIF orientation; itself what `decode_file` makes."""

    data: bytes
    orientation: int

    def small(self) -> Image.Image:
        """The picture for a thumbnail, decoded to a fraction of its size.

        Raises
        ------
        OSError
            If the file is broken; or another of `gpuclust.capture.decode.BROKEN`.
        """
        image = identify(io.BytesIO(self.data))
        image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
        return upright(image, self.orientation).convert("RGB")


# The markers before an image's first scan (ISO/IEC 10918-1, table B.1).
_APP1, _SCAN = 0xE1, 0xDA


def require_torchcodec() -> None:
    """Nothing if torchcodec can decode JPEG files here.

    Raises
    ------
    UnavailableError
    """
    try:
        _decoder()
    except Exception as error:  # a library of another torch's raises what it likes when it is loaded
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used: {first_line(error)}"
        raise UnavailableError(
            f"decoder torchcodec {why}; pip install 'gpuclust[torchcodec]' brings it, but each version of it goes with "
            f"few of torch's, and here is torch {torch.__version__}"
        ) from error


def decode_here(data: bytes, orientation: int) -> Image.Image:
    """For `decode_file`: the picture, decoded by this process.

    Raises
    ------
    ValueError
        If the file is broken.
    """
    try:
        pixels = _decoder()(_as_stored(data), mode="RGB")
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(first_line(error)) from error
    return upright(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), orientation)


def decode_on(device: torch.device, files: Sequence[Encoded]) -> list[Tensor | str]:
    """The picture in each file ``(3, h, w)`` uint8 on the device, upright; or why there is none."""
    sources = [_as_stored(file.data) for file in files]
    try:
        pictures = _decoder()(sources, mode="RGB", device=device) if files else []
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        if len(files) == 1:
            return [first_line(error)]
        return [found for file in files for found in decode_on(device, [file])]  # which of them it was
    return [_turned(picture, file.orientation) for picture, file in zip(pictures, files, strict=True)]


def _turned(picture: Tensor, orientation: int) -> Tensor:
    """A picture ``(c, h, w)`` as it is meant to be seen; what `upright` does."""
    if orientation >= 5:
        picture = picture.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return picture.flip(flips) if flips else picture


def _as_stored(data: bytes) -> bytes:
    """The file without its EXIF: torchcodec would turn pictures itself, by the rules of its version and device."""
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        if data[at + 1] == 0xFF:  # a byte that fills
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] != _APP1:
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])


def _decoder() -> Callable[..., Any]:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg
