"""Rows in host memory, or in a file, for a device that does not hold them: the same bits as if it did."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from gpuclust.cluster.sources.arrays import copy_rows, in_place, row_dtype, to_rows
from gpuclust.cluster.sources.base import stage_bytes
from gpuclust.cluster.sources.checksum import Unchanged
from gpuclust.cluster.sources.mapped import Mapped
from gpuclust.cluster.sources.staging import Piece, Staging

# Of rows in host memory, whose every byte is worth a look on a GPU alone, every so many count for the checksum.
_SAMPLED = 64
# Rows that are gathered at a time from a mapped file.
_GATHERED = 1024
# What a value that is read from a mapped file brings into memory, at least: its neighbours come with it.
_AROUND_BYTES = 64 << 10


class HostSource:
    """Rows in host memory or in a memory-mapped file, for a device that does not hold them.

    For CUDA, and where rows must be converted, chunks go through `staging.Staging`; else they are
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
        Whether the pages of a file are given back. Where they are not, and the rows are used as they lie, the source
        is resident.
    file : Mapped, optional
        Behind a tensor, which does not say that it lies in one.
    """

    def __init__(
        self,
        x: torch.Tensor | np.ndarray,
        device: torch.device,
        memory_limit: int | None = None,
        *,
        release: bool = True,
        file: Mapped | None = None,
    ) -> None:
        self.x = x
        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.dtype = row_dtype(x)
        self.device = torch.empty(0, device=device).device  # with its index
        self.file = file or Mapped.of(x)
        self._release = release and self.file is not None
        self._tensor = to_rows(x) if in_place(x) else None
        size = stage_bytes(memory_limit)
        self._rows = max(1, size // (self.shape[1] * self.dtype.itemsize))
        rows_first = _stride(x, 0) >= _stride(x, 1)
        self._width = (
            self.shape[1] if rows_first or not self._release else min(self.shape[1], max(1, size // _AROUND_BYTES))
        )
        self._unchanged = Unchanged(self.shape[1], 1 if device.type == "cuda" else _SAMPLED)
        self.resident = self.file is not None and not release and not self.buffer_bytes
        if self.resident:  # a chunk is a view, however long
            self._rows = self.shape[0]

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
        if self.resident and self._tensor is not None:
            return self._tensor.index_select(0, index)
        order = index.cpu().argsort()
        wanted = index.cpu()[order]
        out = torch.empty(len(wanted), self.shape[1], dtype=self.dtype, device="cpu")
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
