"""The rows on a grid of whole numbers, about 18 bits per value, where seeding computes distances without rounding."""

from __future__ import annotations

import math

import torch

from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import ChunkSource, block_rows, tile_rows, tiles

# Points that share one conversion of a chunk of rows.
_POINTS = 128


class Image:
    """The rows on a grid of whole numbers so small that squared distances, and sums of n of them, are exact.

    With R = ||x - m|| s + sqrt(d) / 2 a distance is at most (2 R)**2, which is kept below 2**53 and below 2**62 / n.

    Parameters
    ----------
    source : ChunkSource (n, d)
    moments : Moments
    spare_bytes : int
        The image is kept if it fits; else it is made again in every pass. Nothing depends on it.

    Attributes
    ----------
    rows : int
        Rows of the chunks that it is made for.
    """

    def __init__(self, source: ChunkSource, moments: Moments, spare_bytes: int) -> None:
        n, d = source.shape
        far = math.sqrt(moments.frame.far2) * (1 + 2.0**-20)
        reach = min(2.0**26, math.sqrt(2.0**62 / moments.block.n)) / 2 - math.sqrt(d) / 2
        exponent = math.frexp(reach / far)[1] - 1 if far > 0 else 0
        self.mean, self.scale = moments.mean, 2.0 ** max(-1000, min(1000, exponent))
        # Narrow rows are moved in their own precision, which is finer than the grid, where no number leaves its range.
        narrow = source.dtype != torch.float64 and abs(exponent) < 100 and moments.largest < 2.0**100
        if narrow:
            self.mean = self.mean.float()
        self.rows = min(n, tile_rows(d, source.device))
        self.norms = torch.zeros(n, dtype=torch.float64, device=source.device)
        self._kept = torch.empty(n, d, dtype=torch.float64, device=source.device) if 8 * n * d <= spare_bytes else None
        for start, x in source.chunks(self.rows):
            part = slice(start, start + x.shape[0])
            for span in tiles(self.rows, d, source.device):
                points = self.of(x, span)
                self.norms[part] += torch.linalg.vecdot(points, points)
                if self._kept is not None:
                    self._kept[part, span] = points

    def of(self, x: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
        """The image of rows (b, d), or of a span of their features: whole numbers as float64."""
        seen = x[:, span].to(self.mean.dtype)
        return (seen - self.mean[span]).mul_(self.scale).round_().double()

    def dist2(self, x: torch.Tensor, start: int, points: torch.Tensor, out: torch.Tensor) -> None:
        """Squared distances of the rows ``x``, which begin at ``start``, to image points (p, d): ``out`` (p, b)."""
        self._scores(x, start, points, out)
        out += self.norms[start : start + x.shape[0]]

    def nearest(self, x: torch.Tensor, start: int, points: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Lower the ``known`` distances (b,) to the least of these distances: the first point that has it, int64 (b,).

        -1 where no distance is below what was known.
        """
        b = x.shape[0]
        norms, which = self.norms[start : start + b], known.new_full((b,), -1, dtype=torch.int64)
        least = known - norms
        size = max(_POINTS, block_rows(b, x.device))
        for first in range(0, len(points), size):
            some = points[first : first + size]
            scores = known.new_empty(len(some), b)
            self._scores(x, start, some, scores)
            # Finding the index takes much longer than the least, and few rows come closer in most steps.
            closer = (scores.amin(0) < least).nonzero()[:, 0]
            found, index = scores[:, closer].min(0)
            least[closer] = found
            which[closer] = index + first
        torch.add(least, norms, out=known)
        return which

    def _scores(self, x: torch.Tensor, start: int, points: torch.Tensor, out: torch.Tensor) -> None:
        """Squared distances less the squared norms of the rows. Every partial sum is exact, whatever the tiles."""
        square = torch.linalg.vecdot(points, points)
        out.copy_(square[:, None].expand_as(out))
        if self._kept is not None:
            out.addmm_(points, self._kept[start : start + x.shape[0]].t(), alpha=-2.0)
            return
        for span in tiles(self.rows, x.shape[1], x.device):
            out.addmm_(points[:, span], self.of(x, span).t(), alpha=-2.0)
