"""The rows on a grid of whole numbers, about 18 bits per value, where seeding computes distances without rounding."""

from __future__ import annotations

import math

import torch

from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import ChunkSource, block_rows, tile_rows, tiles

# Points that share one conversion of a chunk of rows.
_POINTS = 128


class Pixels:
    """The grid. With R = ||x - m|| s + sqrt(d) / 2 a distance between two rows on it is at most (2 R)**2, which is kept
    below 2**53 and below 2**62 / n."""

    def __init__(self, source: ChunkSource, moments: Moments) -> None:
        d = source.shape[1]
        far = math.sqrt(moments.frame.far2) * (1 + 2.0**-20)
        reach = min(2.0**26, math.sqrt(2.0**62 / moments.block.n)) / 2 - math.sqrt(d) / 2
        exponent = math.frexp(reach / far)[1] - 1 if far > 0 else 0
        self.mean, self.scale = moments.mean, 2.0 ** max(-1000, min(1000, exponent))
        # Narrow rows are moved in their own precision, which is finer than the grid, where no number leaves its range.
        narrow = source.dtype != torch.float64 and abs(exponent) < 100 and moments.largest < 2.0**100
        if narrow:
            self.mean = self.mean.float()

    def of(self, x: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
        """Rows (b, d), or a span of their features, on the grid: whole numbers as float64."""
        return self.place(x[:, span], span)

    def place(self, x: torch.Tensor, span: slice) -> torch.Tensor:
        """Features (b, w) of rows, a span of all, on the grid."""
        return (x.to(self.mean.dtype) - self.mean[span]).mul_(self.scale).round_().double()


class Image:
    """Distances of the rows to some of them, from their image. Every sum is of whole numbers, and exact.

    Attributes
    ----------
    norms : float64 (n,)
        Squared norms of the rows of the image.
    rows : int
        Rows of the chunks that it is made for.
    reads : bool
        Whether it must see the rows again.
    """

    reads: bool
    norms: torch.Tensor
    rows: int

    def points(self, index: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """What the rows ``x`` (p, d) with these numbers (p,) are here; they are only looked at where it ``reads``."""
        raise NotImplementedError

    def dist2(self, x: torch.Tensor | None, part: slice, points: torch.Tensor, out: torch.Tensor) -> None:
        """Squared distances of a part of the rows, ``x`` (b, d), to points (p, ...): ``out`` (p, b)."""
        self._scores(x, part, points, out)
        out += self.norms[part]

    def nearest(self, x: torch.Tensor | None, part: slice, points: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Lower the ``known`` distances (b,) to the least of these distances: the first point that has it, int64 (b,).

        -1 where no distance is below what was known.
        """
        b = len(known)
        norms, which = self.norms[part], known.new_full((b,), -1, dtype=torch.int64)
        least = known - norms
        size = max(_POINTS, block_rows(b, known.device))
        for first in range(0, len(points), size):
            some = points[first : first + size]
            scores = known.new_empty(len(some), b)
            self._scores(x, part, some, scores)
            # Finding the index takes much longer than the least, and few rows come closer in most steps.
            closer = (scores.amin(0) < least).nonzero()[:, 0]
            found, index = scores[:, closer].min(0)
            least[closer] = found
            which[closer] = index + first
        torch.add(least, norms, out=known)
        return which

    def _scores(self, x: torch.Tensor | None, part: slice, points: torch.Tensor, out: torch.Tensor) -> None:
        """Squared distances less the squared norms of the rows."""
        raise NotImplementedError


class SeenImage(Image):
    """The image of rows that are read for it: once, where ``spare_bytes`` hold it, else in every pass. Nothing depends
    on that."""

    def __init__(self, source: ChunkSource, moments: Moments, spare_bytes: int) -> None:
        n, d = source.shape
        self.pixels, self.reads = Pixels(source, moments), True
        self.rows = min(n, tile_rows(d, source.device))
        self.norms = torch.zeros(n, dtype=torch.float64, device=source.device)
        self._kept = torch.empty(n, d, dtype=torch.float64, device=source.device) if 8 * n * d <= spare_bytes else None
        for start, x in source.chunks(self.rows):
            part = slice(start, start + x.shape[0])
            for span in tiles(self.rows, d, source.device):
                points = self.pixels.of(x, span)
                self.norms[part] += torch.linalg.vecdot(points, points)
                if self._kept is not None:
                    self._kept[part, span] = points

    def points(self, index: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return self.pixels.of(x)

    def _scores(self, x: torch.Tensor | None, part: slice, points: torch.Tensor, out: torch.Tensor) -> None:
        square = torch.linalg.vecdot(points, points)
        out.copy_(square[:, None].expand_as(out))
        if self._kept is not None:
            out.addmm_(points, self._kept[part].t(), alpha=-2.0)
            return
        assert x is not None
        for span in tiles(self.rows, x.shape[1], x.device):
            out.addmm_(points[:, span], self.pixels.of(x, span).t(), alpha=-2.0)


class KnownImage(Image):
    """An image of which all products, float64 (n, n), are known: no row is read. Its points are numbers of rows."""

    def __init__(self, products: torch.Tensor) -> None:
        self._products, self.reads, self.rows = products, False, len(products)
        self.norms = products.diagonal().clone()

    def points(self, index: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        return index

    def _scores(self, x: torch.Tensor | None, part: slice, points: torch.Tensor, out: torch.Tensor) -> None:
        torch.index_select(self._products[:, part], 0, points, out=out)
        out.mul_(-2.0).add_(self.norms[points][:, None])
