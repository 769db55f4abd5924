"""Gram: the products of all rows with each other, X~ X~^T in float64, and how far they can be from exact.

X~ = (x - m) s, as in `gpuclust.cluster.exact`, rounded to float64 alone. Sums run over slices of the features, so that
rows are never held whole in float64, and only the block triangle is multiplied, which is little more than half. Rows
that are streamed are read once for each wide slice of them, which is held in their own type: the products need no more
of them, whatever d is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gpuclust.cluster.moments import Moments
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.seeding.image import Pixels
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


def slice_width(n: int, d: int, device: torch.device, halvings: int | None = None) -> int:
    """Features whose float64 copy for all rows is cheap to hold, halved so often; by default as in this fit.

    GPUCLUST_CHUNK_BYTES sets its bytes, too.
    """
    values = (environment().chunk_bytes or _SLICE_BYTES.get(device.type, 16 << 20)) // 8
    return max(1, min(d, (relieved(values) if halvings is None else values >> halvings) // n))


def wide_width(n: int, d: int, width: int, itemsize: int, slice_bytes: int) -> int:
    """Features of all rows that are read in one pass: whole slices, as many as the bytes hold, and one at least."""
    return min(d, max(1, slice_bytes // (n * width * itemsize)) * width)


class Gram:
    """The products of the rows of a source (n, d).

    Parameters
    ----------
    slice_bytes : int
        For features of all rows that are read in one pass, where the rows are streamed.
    pixels : Pixels, optional
        The image of the rows, whose products are found in the same passes.

    Attributes
    ----------
    values : float64 (n, n)
    image : float64 (n, n) or None
        Products of the rows of the image, exact.
    norms : float64 (n,)
        Upper bounds of ||x~||.
    dist2 : float64 (n,)
        ||x~||^2, within 2**-40 of it, relatively.
    scale : float
        s, a power of two.
    error : float
        A value is within ``error ||x~_i|| ||x~_j||`` of exact; so are the `products` with other points.
    """

    def __init__(
        self, source: ChunkSource, moments: Moments, slice_bytes: int = 0, pixels: Pixels | None = None
    ) -> None:
        (n, d), device = source.shape, source.device
        self._source, self._frame, self.scale = source, moments.frame, moments.frame.scale
        self._width = slice_width(n, d, device)
        # In two steps: the square of the scale may leave the range of float64.
        self.dist2 = moments.dist2 * self.scale * self.scale
        self.norms = (moments.dist2.sqrt() * self.scale).mul_(1 + 2.0**-40)
        # Two rounded operands; d products; the slices' partial sums.
        self.error = gamma(d + math.ceil(d / self._width) + 8)
        size = math.ceil(n / BLOCKS)
        blocks = [slice(start, min(n, start + size)) for start in range(0, n, size)]
        self.values = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.image = None if pixels is None else torch.zeros_like(self.values)
        for span, x, kept in self._slices(wide_width(n, d, self._width, source.dtype.itemsize, slice_bytes)):
            _add_products(self.values, self._moved(x, span, kept), blocks)
            if pixels is not None and self.image is not None:
                for block in blocks:
                    kept[block] = pixels.place(x[block], span)
                _add_products(self.image, kept, blocks)
        for matrix in [self.values] if self.image is None else [self.values, self.image]:
            for block in blocks:
                matrix[block.stop :, block] = matrix[block, block.stop :].t()

    def products(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of points (p, d) with the rows, and their own squares: float64 (p, n) and (p,); one pass."""
        (n, d), device = self._source.shape, points.device
        out = torch.zeros(len(points), n, dtype=torch.float64, device=device)
        square = torch.zeros(len(points), dtype=torch.float64, device=device)
        spans = [slice(start, min(d, start + self._width)) for start in range(0, d, self._width)]
        for start, x in self._source.chunks(n):
            kept = torch.empty(len(x), self._width, dtype=torch.float64, device=device)
            for span in spans:
                moved = self._frame.moved(points[:, span], span)
                part = out[:, start : start + len(x)]
                part.addmm_(moved, self._moved(x[:, span], span, kept[:, : span.stop - span.start]).t())
                if start == 0:
                    square += torch.linalg.vecdot(moved, moved)
        return out, square

    def _moved(self, x: torch.Tensor, span: slice, out: torch.Tensor) -> torch.Tensor:
        """A span of the features of rows (b, w), centred and scaled: ``out``, float64."""
        return out.copy_(x).sub_(self._frame.centre[span]).mul_(self.scale)

    def _slices(self, wide: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Spans of the features, all rows in them as they are (n, w), and room for their float64 copy."""
        n = self._source.shape[0]
        kept = torch.empty(n, self._width, dtype=torch.float64, device=self._source.device)
        for first, x in _wide_slices(self._source, wide):
            for start in range(0, x.shape[1], self._width):
                some = x[:, start : start + self._width]
                at = first + start
                yield slice(at, at + some.shape[1]), some, kept[:, : some.shape[1]]


def _wide_slices(source: ChunkSource, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The features of all rows in slices of this width, each of one pass: the first feature, and (n, w).

    Rows that come as one chunk are one slice, which is not copied.
    """
    n, d = source.shape
    if source.resident:
        start, x = next(iter(source.chunks(n)))
        if len(x) == n:  # a chunk is good until the next is asked for
            yield 0, x
            return
    kept = torch.empty(n, width, dtype=source.dtype, device=source.device)
    for first in range(0, d, width):
        rows = kept[:, : min(d, first + width) - first]
        for start, x in source.chunks(n):
            rows[start : start + len(x)] = x[:, first : first + width]
        yield first, rows


def _add_products(matrix: torch.Tensor, rows: torch.Tensor, blocks: list[slice]) -> None:
    """Add the products of rows (n, w) to the block triangle of a matrix (n, n)."""
    for block in blocks:
        matrix[block, block.start :].addmm_(rows[block], rows[block.start :].t())
