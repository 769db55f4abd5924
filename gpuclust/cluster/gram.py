"""Gram: the products of all rows with each other, X~ X~^T in float64, and how far they can be from exact.

X~ = (x - m) s, as in `gpuclust.cluster.exact`, rounded to float64 alone. Sums run over slices of the features, so that
rows are never held whole in float64, and only the block triangle is multiplied, which is little more than half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gpuclust.cluster.moments import Moments
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.sources.base import ChunkSource
from gpuclust.config import environment

U = 2.0**-53
# Blocks of rows: the triangle of blocks is (1 + 1 / BLOCKS) / 2 of the square.
BLOCKS = 8
# Bytes of a slice of the features in float64.
_SLICE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def gamma(terms: float) -> float:
    """The share of a sum of so many products that rounding in float64 can lose, in any order (Higham 2002, 3.1)."""
    return terms * U / (1 - terms * U)


def slice_width(n: int, d: int, device: torch.device) -> int:
    """Features whose float64 copy for all rows is cheap to hold. GPUCLUST_CHUNK_BYTES sets its bytes, too."""
    size = environment().chunk_bytes or _SLICE_BYTES.get(device.type, 16 << 20)
    return max(1, min(d, relieved(size // 8) // n))


class Gram:
    """The products of the rows of a source (n, d) that lie on the device.

    Attributes
    ----------
    values : float64 (n, n)
    norms : float64 (n,)
        Upper bounds of ||x~||.
    dist2 : float64 (n,)
        ||x~||^2, within 2**-40 of it, relatively.
    scale : float
        s, a power of two.
    error : float
        A value is within ``error ||x~_i|| ||x~_j||`` of exact; so are the `products` with other points.
    """

    def __init__(self, source: ChunkSource, moments: Moments) -> None:
        (n, d), device = source.shape, source.device
        self._source, self._frame, self.scale = source, moments.frame, moments.frame.scale
        self._width = slice_width(n, d, device)
        # In two steps: the square of the scale may leave the range of float64.
        self.dist2 = moments.dist2 * self.scale * self.scale
        self.norms = (moments.dist2.sqrt() * self.scale).mul_(1 + 2.0**-40)
        # Two rounded operands; d products; the slices' partial sums.
        self.error = gamma(d + math.ceil(d / self._width) + 8)
        self.values = torch.zeros(n, n, dtype=torch.float64, device=device)
        size = math.ceil(n / BLOCKS)
        blocks = [slice(start, min(n, start + size)) for start in range(0, n, size)]
        for _, points in self._slices():
            for block in blocks:
                self.values[block, block.start :].addmm_(points[block], points[block.start :].t())
        for block in blocks:
            self.values[block.stop :, block] = self.values[block, block.stop :].t()

    def products(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of points (p, d) with the rows, and their own squares: float64 (p, n) and (p,)."""
        out = torch.zeros(len(points), self._source.shape[0], dtype=torch.float64, device=points.device)
        square = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        for span, rows in self._slices():
            moved = self._frame.moved(points[:, span], span)
            out.addmm_(moved, rows.t())
            square += torch.linalg.vecdot(moved, moved)
        return out, square

    def _slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Spans of the features, and the rows in them, centred and scaled: float64 (n, w), overwritten by the next."""
        n, d = self._source.shape
        kept = torch.empty(n, self._width, dtype=torch.float64, device=self._source.device)
        first, x = next(iter(self._source.chunks(n)))
        whole = [(first, x)] if len(x) == n else None  # a chunk is good until the next is asked for
        for start in range(0, d, self._width):
            span = slice(start, min(d, start + self._width))
            rows = kept[:, : span.stop - start]
            for first, x in whole or self._source.chunks(n):
                rows[first : first + len(x)] = x[:, span]
            rows.sub_(self._frame.centre[span]).mul_(self.scale)
            yield span, rows
