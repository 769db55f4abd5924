"""Rows that come in chunks, anew in each pass: the same bits as of one tensor, or an error where they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from gpuclust.cluster.sources.arrays import copy_rows
from gpuclust.cluster.sources.base import stage_bytes
from gpuclust.cluster.sources.checksum import Unchanged
from gpuclust.cluster.sources.staging import Piece, Staging
from gpuclust.errors import InputError


class ChunksSource:
    """Rows of chunks that an object gives again, in the same order, each time it is iterated over.

    They are counted in a first pass. Every pass must bring the same rows: their number, width and type, and a checksum
    of all of their bits are compared. Where the chunks end is no matter.

    Parameters
    ----------
    x : iterable of arrays or tensors (b, d)
        Its ``__iter__`` begins anew each time.
    read : Callable
        Makes a chunk a floating tensor (b, d).
    device : torch.device, optional
        Where chunks are handed out; where the first one is by default.
    memory_limit : int, optional
        Of the fit; the buffers take at most a quarter of it, beside the chunks that ``x`` itself holds.

    Raises
    ------
    InputError
        If there are no rows, or chunks of several widths or types.
    """

    resident = False

    def __init__(
        self,
        x: Iterable[object],
        read: Callable[[object], torch.Tensor],
        device: torch.device | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self._x, self._read = x, read
        n, sums, first = 0, None, None
        for item in x:
            chunk = read(item)
            if chunk.shape[1] == 0:
                raise InputError("Found array with 0 feature(s) in the chunks of X while a minimum of 1 is required.")
            if first is None or sums is None:
                first = chunk[:0]
                self._unchanged = Unchanged(chunk.shape[1])
                sums = self._unchanged.begin()
            self._require_like(first, chunk, n)
            sums.add(n, chunk)
            n += chunk.shape[0]
        if first is None or sums is None or n == 0:
            raise InputError("Found array with 0 sample(s): X gave no chunk with rows, and a minimum of 1 is required.")
        self._unchanged.compare(sums)
        self._first = first
        self.shape = (n, first.shape[1])
        self.dtype = first.dtype
        self.device = first.device if device is None else torch.empty(0, device=device).device
        self._staged = self.device.type == "cuda" and first.device.type == "cpu"
        self._rows = max(1, stage_bytes(memory_limit) // (self.shape[1] * self.dtype.itemsize))

    @property
    def buffer_bytes(self) -> int:
        """What a pass allocates on the device, at most."""
        return 2 * min(self._rows, self.shape[0]) * self.shape[1] * self.dtype.itemsize

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        rows = min(rows, self._rows, self.shape[0])
        checksum = self._unchanged.begin()
        pieces = self._pieces(rows)
        if self._staged:
            pieces = Staging(rows, self.shape[1], self.dtype, self.device).stream(
                Piece(start, len(x), partial(copy_rows, x)) for start, x in pieces
            )
        for start, x in pieces:
            checksum.add(start, x)
            yield start, x
        self._unchanged.compare(checksum)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        index = index.to(self._first.device)
        out = torch.empty(len(index), self.shape[1], dtype=self.dtype, device=index.device)
        checksum = self._unchanged.begin()
        for start, x in self._pass():
            checksum.add(start, x)
            place = ((index >= start) & (index < start + x.shape[0])).nonzero()[:, 0]
            out[place] = x[index[place] - start]
        self._unchanged.compare(checksum)
        return out.to(self.device)

    def _pass(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The chunks as they come, where the first one was."""
        start, n = 0, self.shape[0]
        for item in self._x:
            chunk = self._read(item)
            self._require_like(self._first, chunk, start)
            if start + chunk.shape[0] > n:
                raise InputError(f"X changed between two passes: it gave {n} rows in the first pass, and now more")
            yield start, chunk.to(self._first.device)
            start += chunk.shape[0]
        if start < n:
            raise InputError(f"X changed between two passes: it gave {n} rows in the first pass, and now {start}")

    def _pieces(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows in pieces of ``rows``: views of a chunk, or put together in one buffer. Valid until the next.

        A chunk is copied as soon as it comes where a piece reaches into the next, which may take its memory.
        """
        begin = held = 0
        buffer: torch.Tensor | None = None
        for _, chunk in self._pass():
            chunk = chunk if self._staged else chunk.to(self.device)
            while chunk.shape[0]:
                part, chunk = chunk[: rows - held], chunk[rows - held :]
                if part.shape[0] < rows:
                    if buffer is None:
                        buffer = torch.empty(rows, self.shape[1], dtype=self.dtype, device=part.device)
                    buffer[held : held + part.shape[0]] = part
                    held += part.shape[0]
                if part.shape[0] == rows or held == rows:
                    yield begin, part if held == 0 else buffer  # type: ignore[misc]
                    begin, held = begin + rows, 0
        if held and buffer is not None:
            yield begin, buffer[:held]

    @staticmethod
    def _require_like(first: torch.Tensor, chunk: torch.Tensor, start: int) -> None:
        if chunk.shape[1] != first.shape[1]:
            raise InputError(
                f"the chunks of X have rows of one width; the first has {first.shape[1]} features, and the one that "
                f"begins with row {start} has {chunk.shape[1]}"
            )
        if chunk.dtype != first.dtype:
            raise InputError(
                f"the chunks of X are of one type; the first is {first.dtype}, and the one that begins with row "
                f"{start} is {chunk.dtype}"
            )
