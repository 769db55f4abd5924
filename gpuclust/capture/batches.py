"""Batches: images that go through the network together, cut from the chunks that workers send."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gpuclust.capture.catalog import shown
from gpuclust.capture.loader import Chunk
from gpuclust.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Some images in the order of the run.

    Attributes
    ----------
    images : Tensor (b, c, h, w)
        On the CPU; float32, or uint8 of a `ByteTransform`.
    labels : int64 array (b,)
        Indices into `ImageSource.classes`.
    paths : list of str
        Path of each image, relative to the folder or as in the manifest; the index, for a data set.
    thumbs : list of bytes
        A JPEG of each image, its longest side at most 64 pixels.
    keys : list of str
        What `ImageSource.again` finds each image by.
    """

    images: Tensor
    labels: np.ndarray
    paths: list[str]
    thumbs: list[bytes]
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, images and labels as views."""
        rows = slice(start, stop)
        return Batch(self.images[rows], self.labels[rows], self.paths[rows], self.thumbs[rows], self.keys[rows])


def without_images(parts: list[Batch]) -> Batch:
    """What is known of the images of a batch that came in parts."""
    return replace(_join([replace(part, images=part.images[:0]) for part in parts]), images=torch.empty(0))


def joined(groups: Generator[list[Batch], None, None]) -> Generator[Batch, None, None]:
    with closing(groups):
        for parts in groups:
            yield _join(parts)
            del parts


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return Batch(
        torch.cat([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [path for part in parts for path in part.paths],
        [thumb for part in parts for thumb in part.thumbs],
        [key for part in parts for key in part.keys],
    )


def grouped(pieces: Generator[Batch, None, None], size: int) -> Generator[list[Batch], None, None]:
    """The parts of batches of exactly `size`, the last one aside, from batches of at most `size`."""
    held: list[Batch] = []
    with closing(pieces):
        for piece in pieces:
            more = sum(map(len, held)) + len(piece) - size
            if more < 0:
                held.append(piece)
            else:
                whole = [*held, piece.part(0, len(piece) - more)]
                held = [piece.part(len(piece) - more, len(piece))] if more else []
                yield whole
                del whole
            del piece
    if held:
        yield held


def unchanged(chunks: Generator[Chunk, None, None], keys: Sequence[str]) -> Generator[Batch, None, None]:
    """Chunks of images that were all good before, as batches of images alone."""
    with closing(chunks):
        for chunk in chunks:
            for position, reason in chunk.bad:
                raise InputError(f"image {shown(keys[position])} changed since the first pass: {reason}")
            names = [keys[position] for position in chunk.good]
            yield Batch(chunk.images, np.empty(len(names), dtype=np.int64), names, [], names)
            del chunk
