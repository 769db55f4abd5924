"""Pixels: the images of a run as a network's input, as often as they are wanted, with the same bits each time."""

from __future__ import annotations

import math
import mmap
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from gpuclust.capture.batches import Batch, without_images
from gpuclust.capture.images import ImageSource
from gpuclust.capture.keys import Keys
from gpuclust.capture.layout import CONTIGUOUS
from gpuclust.capture.loader import Transform
from gpuclust.capture.transport import ByteTransform, as_bytes, look_up_bytes
from gpuclust.cluster.sources.staging import Piece, Staging


class Pictured(Protocol):
    """Images of which it is known whether they are pictures."""

    def holds_pictures(self) -> bool:
        """Whether they need a transform."""


def pixel_bytes(images: Pictured, transform: Transform | None, example: Tensor) -> int:
    """Bytes of one image as it travels and as `Pixels` keeps it; `example` is one image ``(1, c, h, w)``."""
    return example[0].numel() * _transport(images, transform)[1].itemsize


def staged_bytes(batch_size: int, bytes_per_image: int, kind: str) -> int:
    """What `Pixels` holds on a device of this kind beside inputs and what it keeps.

    On a GPU batches to come, and a look-up; in host memory the batch that the input was made of, and one of its images
    as floats.
    """
    if kind == "cuda":
        return 2 * batch_size * bytes_per_image + look_up_bytes(kind)
    return (batch_size + torch.float32.itemsize) * bytes_per_image


class Pixels:
    """The images of a run in batches on the device: decoded once where they are kept there, else in every pass.

    Pictures travel as bytes where their transform allows it (`as_bytes`), and are kept so; all others as float32.
    Every input is memory of its own, freshly written and of one memory format, since a network's rounding may depend on
    how its input lies; and batches are cut at the same images in every pass. In host memory it is that of the input
    before, if nothing refers to that any more.

    Parameters
    ----------
    images : ImageSource
    transform : callable or None
        PIL image -> tensor ``(c, h, w)``.
    batch_size : int
    device : torch.device
    dtype : torch.dtype
        Of the network's input.
    workers : int or None
        Processes that decode; see `ImageSource.batches`. By default, where the network is on the CPU, threads decode
        between its batches, if the images are files and their transform is a known one.
    keep : bool
        Whether the first pass keeps the images on the device for later ones; may be set until it begins.
    memory_format : torch.memory_format
        Of the network's input; see `find_memory_format`.

    Attributes
    ----------
    n : int
        Images that the first pass gave; 0 before its end.
    kept_bytes : int
        What is kept on the device.
    """

    def __init__(
        self,
        images: ImageSource,
        transform: Transform | None,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        workers: int | None,
        keep: bool,
        memory_format: torch.memory_format = CONTIGUOUS,
    ) -> None:
        self.images, self.batch_size, self.keep = images, batch_size, keep
        self.device, self.dtype, self.memory_format = device, dtype, memory_format
        self.n = 0
        self._transform, self._sent = _transport(images, transform)
        split = self._transform if isinstance(self._transform, ByteTransform) else None
        self._floats = split.floats(device, dtype) if split else None
        # A CPU's cores are the network's or the decoders': nothing is won by a thread and two more batches of memory,
        # and processes that decode while the network computes keep its threads waiting for one another.
        alone = workers is None and device.type == "cpu" and images.for_threads(self._transform)
        self.workers = 0 if alone else workers
        self._decodes_on = device if images.decodes_on(device, self._transform) else None
        self._staged = device.type == "cuda" and not self._decodes_on
        self._kept: Tensor | None = None
        self._keys = Keys()
        self._shape: tuple[int, ...] = ()

    @property
    def kept_bytes(self) -> int:
        return 0 if self._kept is None else self._kept.nbytes

    def first(self) -> Generator[tuple[int, Tensor, Batch], None, None]:
        """The first pass: (index of the first image, input ``(b, c, h, w)``, batch without its images) of each batch.

        What is kept is written as the batches come; `again` may be called after the last.
        """
        self.n, self._keys = 0, Keys()
        if not self.keep:
            self._kept = None  # of a first pass that was given up
        known: deque[Batch] = deque()  # of the batches that are on their way
        inputs, start = _Inputs(self.device, self.dtype, self.memory_format), 0
        with closing(self._arrived(_told_apart(self._groups(), known))) as batches:
            for parts in batches:
                batch = known.popleft()
                self._shape = tuple(parts[0].shape[1:])
                if self.keep:
                    self._store(parts, start)
                for key in batch.keys:
                    self._keys.append(key)
                yield start, self._input(parts, inputs), batch
                start += len(batch)
                del parts
        self.n = start

    def again(self, wanted: Sequence[int] | None = None) -> Generator[tuple[int, int, Tensor], None, None]:
        """A later pass: (number of the batch, index of its first image, input) of all batches, or of those wanted.

        Batches come in ascending order, from what is kept or decoded once more.

        Raises
        ------
        InputError
            If an image that is decoded once more cannot be read now, or has another shape.
        """
        numbers = range(-(-self.n // self.batch_size)) if wanted is None else sorted(set(wanted))
        starts = [number * self.batch_size for number in numbers]
        inputs = _Inputs(self.device, self.dtype, self.memory_format)
        if self._kept is not None:
            for number, start in zip(numbers, starts, strict=True):
                kept = self._kept[start : min(start + self.batch_size, self.n)]
                yield number, start, self._input([kept], inputs)
            return
        keys = [key for start in starts for key in self._keys[start : start + self.batch_size]]
        decoded = self.images.again(keys, self._shape, self._transform, self.batch_size, self.workers, self._decodes_on)
        with closing(self._arrived(decoded)) as batches:
            for number, start, parts in zip(numbers, starts, batches, strict=True):
                yield number, start, self._input(parts, inputs)
                del parts

    def drop(self) -> None:
        """Give back what is kept; later passes decode."""
        self.keep, self._kept = False, None

    def _groups(self) -> Generator[list[Batch], None, None]:
        return self.images.groups(self._transform, self.batch_size, self.workers, self._decodes_on)

    def _arrived(self, batches: Generator[list[Tensor], None, None]) -> Generator[list[Tensor], None, None]:
        """The parts of each batch where the device reads them; they are valid until the next is asked for."""
        with closing(batches):
            if not self._staged:
                yield from batches
            elif parts := next(batches, None):
                shape = parts[0].shape[1:]
                staging = Staging(min(self.batch_size, self.images.n), shape.numel(), self._sent, self.device)
                with closing(staging.stream(_pieces(chain([parts], batches)))) as pieces:
                    del parts
                    for _, rows in pieces:
                        yield [rows.view(-1, *shape)]

    def _store(self, parts: list[Tensor], start: int) -> None:
        if self._kept is None or self._kept.shape[1:] != self._shape:
            self._kept = None
            self._kept = torch.empty(self.images.n, *self._shape, dtype=self._sent, device=self.device)
        for part in parts:
            self._kept[start : start + len(part)].copy_(part)
            start += len(part)

    def _input(self, parts: list[Tensor], inputs: _Inputs) -> Tensor:
        """The network's input from its parts on the device."""
        images = inputs.empty((sum(map(len, parts)), *self._shape))
        for part, out in zip(parts, images.split([len(part) for part in parts]), strict=True):
            if self._floats is None:
                out.copy_(part)
            else:
                self._floats(part, out)
        return images


def _transport(images: Pictured, transform: Transform | None) -> tuple[Transform | None, torch.dtype]:
    """What workers do to each image, and the type of what they send."""
    split = as_bytes(transform) if images.holds_pictures() else None
    return (transform, torch.float32) if split is None else (split, torch.uint8)


class _Inputs:
    """Memory for the inputs of one pass.

    In host memory it is mapped, and so given back with the pass. Where the C library hands out aligned memory (glibc
    2.36), a hole of an input's size is too small for the next one, and every batch would leave one behind; and the
    system takes longer to map an input than it takes to fill it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._unused = self._references()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the pass's format that no tensor refers to."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=self._memory_format)
        values = math.prod(shape)
        if len(self._memory) < values * self._dtype.itemsize or self._references() > self._unused:
            self._memory = mmap.mmap(-1, values * self._dtype.itemsize)
        strides = torch.empty(shape, device="meta", memory_format=self._memory_format).stride()
        return torch.frombuffer(self._memory, dtype=self._dtype, count=values).as_strided(shape, strides)

    def _references(self) -> int:
        """A tensor refers to its memory for as long as it, or a view of it, is there."""
        return sys.getrefcount(self._memory)


def _told_apart(groups: Generator[list[Batch], None, None], known: deque[Batch]) -> Generator[list[Tensor], None, None]:
    """The images of batches in their parts; what else is known of each batch goes to `known`."""
    with closing(groups):
        for parts in groups:
            known.append(without_images(parts))
            yield [part.images for part in parts]
            del parts


def _pieces(batches: Iterable[list[Tensor]]) -> Iterator[Piece]:
    """Batches as rows that a thread copies into page-locked memory while the network has the batch before."""
    start = 0
    for parts in batches:
        size = sum(map(len, parts))
        yield Piece(start, size, partial(_fill, parts))
        start += size


def _fill(parts: list[Tensor], rows: Tensor) -> None:
    for part, out in zip(parts, rows.split([len(part) for part in parts]), strict=True):
        out.copy_(part.flatten(1))
