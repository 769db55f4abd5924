"""Sources of rows that are not on the device, or not in memory: a file or host memory, and chunks that come anew.

Results are those of the same rows in one tensor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch

from gpuclust.cluster.arrays import copy_rows, in_place, row_dtype, to_rows
from gpuclust.cluster.checksum import Unchanged
from gpuclust.cluster.mapped import Mapped
from gpuclust.cluster.source import ChunkSource, stage_bytes
from gpuclust.cluster.staging import Piece, Staging
from gpuclust.errors import InputError

# Of rows in host memory, whose every byte is worth a look on a GPU alone, every so many count for the checksum.
_SAMPLED = 64
# Rows that are gathered at a time from a mapped file.
_GATHERED = 1024
# What a value that is read from a mapped file brings into memory, at least: its neighbours come with it.
_AROUND_BYTES = 64 << 10


class HostSource:
    """Rows in host memory or in a memory-mapped file, for a device that does not hold them.

    For CUDA, and where rows must be converted, chunks go through `gpuclust.cluster.staging.Staging`; else they are
    views, and the pages of a file are given back after each. A large file that is stored columns first is read some
    columns at a time, since a chunk's rows are in as many places of it.

    What is noticed when rows change between passes: on CUDA any change. On the CPU a file that is written to (by its
    size and its time of change), and a change of every 64th row; not that of another single value.

    Parameters
    ----------
    x : tensor or array (n, d)
        In host memory, of any numeric type.
    device : torch.device
        Where chunks are handed out.
    memory_limit : int, optional
        Of the fit; the buffers take at most a quarter of it.
    release : bool
        Whether the pages of a file are given back.
    """

    def __init__(
        self,
        x: torch.Tensor | np.ndarray,
        device: torch.device,
        memory_limit: int | None = None,
        *,
        release: bool = True,
    ) -> None:
        self.x = x
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype = row_dtype(x)
        self.device = torch.empty(0, device=device).device  # with its index
        self.file = Mapped.of(x)
        self._release = release and self.file is not None
        self._tensor = to_rows(x) if in_place(x) else None
        size = stage_bytes(memory_limit)
        self._rows = max(1, size // (self.shape[1] * self.dtype.itemsize))
        rows_first = _stride(x, 0) >= _stride(x, 1)
        self._width = self.shape[1] if rows_first or not self._release else max(1, size // _AROUND_BYTES)
        self._unchanged = Unchanged(self.shape[1], 1 if device.type == "cuda" else _SAMPLED)

    @property
    def buffer_bytes(self) -> int:
        """What a pass allocates on the device."""
        viewed = self._tensor is not None and self.device.type == "cpu" and self._width == self.shape[1]
        return 0 if viewed else 2 * min(self._rows, self.shape[0]) * self.shape[1] * self.dtype.itemsize

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        rows = min(rows, self._rows, self.shape[0])
        checksum = self._unchanged.begin()
        for start, x in self._staged(rows) if self.buffer_bytes else self._views(rows):
            checksum.add(start, x)
            yield start, x
        if self.file:
            self.file.require_unchanged()
        self._unchanged.compare(checksum)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        order = index.cpu().argsort()
        wanted = index.cpu()[order]
        out = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        # In the order of the file, a few at a time; each goes where it was asked for.
        for place, some in zip(order.split(_GATHERED), wanted.split(_GATHERED), strict=True):
            for span in self._spans():
                columns = self.x[:, span]
                found = columns[some.numpy()] if isinstance(columns, np.ndarray) else columns[some]
                out[place, span] = to_rows(found)
                self._give_back()
        return out.to(self.device)

    def _views(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        assert self._tensor is not None
        for start in range(0, self.shape[0], rows):
            yield start, self._tensor[start : start + rows]
            self._give_back()

    def _staged(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        return Staging(rows, self.shape[1], self.dtype, self.device).stream(
            Piece(start, min(rows, self.shape[0] - start), partial(self._fill, start), self._pinned(start, rows))
            for start in range(0, self.shape[0], rows)
        )

    def _fill(self, start: int, out: torch.Tensor) -> None:
        x = (self.x if self._tensor is None else self._tensor)[start : start + len(out)]
        for span in self._spans():
            copy_rows(x[:, span], out[:, span])
            self._give_back()

    def _spans(self) -> Iterator[slice]:
        """The features, as many as are read at a time."""
        return (slice(first, first + self._width) for first in range(0, self.shape[1], self._width))

    def _pinned(self, start: int, rows: int) -> torch.Tensor | None:
        if self._tensor is None or not self._tensor.is_pinned() or not self._tensor.is_contiguous():
            return None
        return self._tensor[start : start + rows]

    def _give_back(self) -> None:
        if self._release and self.file:
            self.file.release()


def _stride(x: torch.Tensor | np.ndarray, dimension: int) -> int:
    return abs(x.strides[dimension] if isinstance(x, np.ndarray) else x.stride(dimension))


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


class WatchedSource:
    """The rows of another source; ``tell`` hears of every chunk that is handed out: its first row and their number."""

    def __init__(self, source: ChunkSource, tell: Callable[[int, int], None]) -> None:
        self._source, self._tell = source, tell
        self.shape, self.dtype, self.device = source.shape, source.dtype, source.device

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start, x in self._source.chunks(rows):
            self._tell(start, x.shape[0])
            yield start, x

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self._source.take(index)
