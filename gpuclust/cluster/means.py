"""True centroids of the dual solver: the primal's sums of the rows of clusters, many clusters in one pass.

Rows that are streamed are dear: what several restarts need comes from one pass, or from one `take`, as far as memory
allows. Rows on the device cost what is taken of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch

from gpuclust.cluster.lloyd import Lloyd
from gpuclust.cluster.moments import centroid_dtype
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.sums import joined
from gpuclust.config import environment

T = TypeVar("T")

# Bytes of rows that are taken at a time.
_TAKEN_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}


class Means:
    """Sums, centroids and rows, as they are read from the source of a primal solver.

    Parameters
    ----------
    lloyd : Lloyd
    spare_bytes : int
        For more centroids, and more rows, than are needed at a time.
    summed : int, optional
        Clusters whose sums there is room for beside the centroids of one restart; by default all.

    Attributes
    ----------
    more : int
        Centroids that memory has room for, sums included, beside those of one restart.
    """

    def __init__(self, lloyd: Lloyd, spare_bytes: int = 0, summed: int | None = None) -> None:
        self._lloyd, self._source, self._levels = lloyd, lloyd.source, lloyd.moments.grid.levels
        self.dtype = centroid_dtype(lloyd.source.dtype)
        d, device = lloyd.source.shape[1], lloyd.source.device
        self.more = spare_bytes // 2 // (d * (8 * self._levels + 2 * self.dtype.itemsize))
        self._together = sys.maxsize if summed is None else summed + self.more
        taken = relieved(environment().chunk_bytes or _TAKEN_BYTES.get(device.type, 8 << 20))
        if not self._source.resident:
            taken = max(taken, spare_bytes // 2)
        self._taken = max(1, taken // (d * lloyd.source.dtype.itemsize))

    def parts(self, jobs: Sequence[tuple[torch.Tensor, list[int]]]) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """`sums`, those of as many clusters in a pass as memory has room for, and of one job at a time.

        Yields
        ------
        job : int
        part : slice
            Of the clusters of that job.
        sums : float64 (levels, p, d)
            They are gone when the next are asked for, whoever still refers to them: these need the room.
        """
        one_by_one = [(1, (job, at)) for job, (_, clusters) in enumerate(jobs) for at in range(len(clusters))]
        for group in grouped(one_by_one, self._together):
            parts = []
            for job, some in groupby(group, itemgetter(0)):
                places = [at for _, at in some]
                parts.append((job, slice(places[0], places[-1] + 1)))
            sums = self.sums([(jobs[job][0], jobs[job][1][part]) for job, part in parts])
            first = 0
            for job, part in parts:
                last = first + part.stop - part.start
                yield job, part, sums[:, first:last]
                first = last
            sums.untyped_storage().resize_(0)

    def sums(self, jobs: Sequence[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
        """The primal's sums of the rows of some clusters by labels (n,), of all jobs one after another: one pass.

        Returns
        -------
        float64 (levels, p, d)
        """
        d, device, count = self._source.shape[1], self._source.device, sum(len(clusters) for _, clusters in jobs)
        places, first = [], 0
        for labels, clusters in jobs:
            place = torch.full((int(labels.amax()) + 1,), -1, dtype=torch.int32, device=device)
            known = [cluster for cluster in clusters if cluster < len(place)]
            place[known] = torch.tensor(
                [first + at for at, cluster in enumerate(clusters) if cluster < len(place)],
                dtype=torch.int32,
                device=device,
            )
            places.append(place[labels.long()])
            first += len(clusters)
        sums = torch.zeros(self._levels, 1, count, d, dtype=torch.float64, device=device)
        counts = torch.zeros(1, count, dtype=torch.float64, device=device)
        wanted = torch.stack([place >= 0 for place in places]).any(0)
        for rows, x in self.rows(wanted.nonzero()[:, 0]):
            for place in places:
                here = place[rows]
                mine = (here >= 0).nonzero()[:, 0]
                if len(mine) == len(here):
                    self._lloyd.account(x, rows, here[None], None, sums, counts)
                    continue
                for some in mine.split(self._taken):
                    numbers = some + rows.start if isinstance(rows, slice) else rows[some]
                    self._lloyd.account(x[some], numbers, here[None, some], None, sums, counts)
        return sums[:, 0]

    def empty(self, count: int) -> torch.Tensor:
        """Room for so many centroids: (count, d)."""
        return torch.empty(count, self._source.shape[1], dtype=self.dtype, device=self._source.device)

    def centroid(self, sums: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """The centroid (d,) of sums (levels, d) and of the weight of its rows."""
        return (joined(sums) / mass).to(self.dtype)

    def take(self, rows: list[int]) -> torch.Tensor:
        """Rows with these numbers (m,): (m, d)."""
        return self._source.take(torch.tensor(rows, dtype=torch.int64, device=self._source.device))

    def rows(self, index: torch.Tensor) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor]]:
        """The rows with these numbers (m,), which ascend, a few at a time; nothing is copied where they are all.

        Streamed rows that are too many to be taken at once come in one pass.
        """
        n = self._source.shape[0]
        if len(index) == n:
            for start, x in self._source.chunks(n):
                yield slice(start, start + len(x)), x
        elif self._source.resident or len(index) <= self._taken:
            for some in index.split(self._taken):
                yield some, self._source.take(some)
        else:
            for start, x in self._source.chunks(n):
                first, last = torch.searchsorted(index, index.new_tensor([start, start + len(x)])).tolist()
                if last - first == len(x):
                    yield slice(start, start + len(x)), x
                    continue
                for some in index[first:last].split(self._taken):
                    if len(some):
                        yield some, x[some - start]


def grouped(items: Sequence[tuple[int, T]], most: int) -> Iterator[list[T]]:
    """Things in groups of consecutive ones, whose sizes add up to at most so much where they are not alone."""
    group: list[T] = []
    size = 0
    for own, item in items:
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append(item)
        size += own
    if group:
        yield group
