"""The rows that `gpuclust.compare.similarity` looks at, as it reads them: slices of features of the sample, and blocks
of rows; from a device that holds them all or from passes over a source that doesn't, in the same shapes, hence with the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from gpuclust.compare.workspace import Workspace


class Source(Protocol):
    """Rows in a fixed order, as `gpuclust.cluster.sources.base.ChunkSource` has them."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def resident(self) -> bool: ...

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]: ...
    def take(self, index: torch.Tensor) -> torch.Tensor: ...


class Resident:
    """The rows of a tensor (n, d) on its device."""

    resident = True

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.shape, self.dtype, self.device = x, (x.shape[0], x.shape[1]), x.dtype, x.device

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.shape[0], rows):
            yield start, self.x[start : start + rows]

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self.x.index_select(0, index)


class Picked:
    """Some rows of a source.

    Parameters
    ----------
    source
        Where they come from.
    index : int64 array (m,), sorted
        Which they are; None for all.
    work
        Shapes in which they are read.
    """

    def __init__(self, source: Source, index: np.ndarray | None, work: Workspace) -> None:
        self.source, self.work = source, work
        self.index = None if index is None or len(index) == source.shape[0] else index
        self.count = source.shape[0] if self.index is None else len(self.index)

    def held(self) -> Picked:
        """The same rows, copied to the device."""
        index = np.arange(self.count) if self.index is None else self.index
        return Picked(Resident(self.source.take(self._on_device(index))), None, self.work)

    def slices(self, features: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Slices of ``work.width`` features, in order: which, the rows centred (m, w) and their mean (w,), float64.

        Of rows that don't lie on the device ``features`` at a time are, a multiple of the width, in their own dtype.
        The rows are overwritten by the next slice.
        """
        width, m = self.work.width, self.count
        kept = torch.empty(m * width, dtype=torch.float64, device=self.source.device)
        for first, x, picked in self._wide(features):
            places = None if picked is None else self._on_device(picked)
            for start in range(0, x.shape[1], width):
                values = x[:, start : start + width]
                # Contiguous whatever the strides of the rows are: the bits of a product may depend on them.
                part = kept[: m * values.shape[1]].view(m, -1)
                part.copy_(values if places is None else values.index_select(0, places))
                mean = part.mean(0)
                yield slice(first + start, first + start + len(mean)), part.sub_(mean), mean

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of ``work.block`` rows, the last may be shorter: the first row's number, and the rows in float64.

        They are overwritten by the next block.
        """
        size, filled = self.work.block, 0
        kept = torch.empty(size, self.source.shape[1], dtype=torch.float64, device=self.source.device)
        for first, x, picked in self._chunks():
            places = None if picked is None else self._on_device(picked)
            count, at = len(x) if places is None else len(places), 0
            while at < count:
                part = slice(at, min(count, at + size - filled))
                into = kept[filled : filled + part.stop - at]
                into.copy_(x[part] if places is None else x.index_select(0, places[part]))
                at, filled = part.stop, filled + len(into)
                if filled == size or first + at == self.count:
                    yield first + at - filled, kept[:filled]
                    filled = 0
            del x  # a chunk may be a whole batch of a network: it goes before the next comes

    def _wide(self, features: int) -> Iterator[tuple[int, torch.Tensor, np.ndarray | None]]:
        """Wide slices: their first feature, rows, and the numbers of those that count (None: all)."""
        d = self.source.shape[1]
        if self.source.resident:
            for _, x, places in self._chunks():
                yield 0, x, places
            return
        kept = torch.empty(self.count * min(d, features), dtype=self.source.dtype, device=self.source.device)
        for start in range(0, d, features):
            stop = min(d, start + features)
            wide = kept[: self.count * (stop - start)].view(self.count, -1)
            for first, x, places in self._chunks():
                if places is None:
                    wide[first : first + len(x)] = x[:, start:stop]
                else:
                    # One by one: gathered at once they would be held twice.
                    for row, place in enumerate(places, first):
                        wide[row] = x[place, start:stop]
                del x
            yield start, wide, None

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor, np.ndarray | None]]:
        """One pass: the number of a chunk's first picked row among all of them, the chunk, and which of it are picked
        (None: all)."""
        n = self.source.shape[0]
        for start, x in self.source.chunks(n if self.source.resident else min(n, self.work.block)):
            if self.index is None:
                yield start, x, None
            else:
                first, end = np.searchsorted(self.index, (start, start + len(x))).tolist()
                if first < end:
                    yield first, x, self.index[first:end] - start
            del x

    def _on_device(self, index: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(index, device=self.source.device)
