"""metric="cosine": spherical k-means, which is k-means of rows of unit length with centroids of unit length.

A row x becomes x / ||x||: its values are scaled by the power of two that brings the largest near 1, which is exact, the
length is the square root of the fixed-tree sum of their squares in float64 (`gpuclust.cluster.sums.tree_sum`), and the
quotient is rounded to the type of the centroids (float64 for float64 rows, else float32). So a row's direction depends
on that row alone: not on chunks, and not on a power of two that the row is multiplied with. A centroid is the mean of
its rows, made of unit length in the same way; where that mean is zero it has no direction, and the centroid stays.

For rows and centroids of unit length ||x - c||^2 / 2 is 1 - cos(x, c). Here it is so within a share of 2**-22 for
float32 (2**-51 for float64), and 2**-46, since they are rounded; this half of the squared distance is what inertia,
`transform` and `score` count. Labels are the nearest by the reference distance of the rounded unit rows.

Source: Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", Machine Learning 42,
2001.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpuclust.cluster.moments import centroid_dtype, largest_per_column
from gpuclust.cluster.sources.base import ChunkSource, block_rows, stage_bytes
from gpuclust.cluster.sums import tree_sum
from gpuclust.errors import InputError

# What squared distances of rows of unit length count as: 1 - cos.
HALF = 0.5


class UnitRows:
    """The rows of another source, each of unit length; made anew in each pass, chunk by chunk.

    Parameters
    ----------
    source : ChunkSource (n, d)
    memory_limit : int, optional
        Of the fit; a chunk takes an eighth of it at most.
    first : int
        The number of the source's first row, for messages.
    """

    def __init__(self, source: ChunkSource, memory_limit: int | None = None, first: int = 0) -> None:
        self._source, self._first, self._checked = source, first, False
        self.shape, self.device, self.resident = source.shape, source.device, source.resident
        self.dtype = centroid_dtype(source.dtype)
        self._rows = max(1, stage_bytes(memory_limit) // (self.shape[1] * self.dtype.itemsize))

    @property
    def buffer_bytes(self) -> int:
        """Of the chunk in use and the next."""
        return 2 * min(self._rows, self.shape[0]) * self.shape[1] * self.dtype.itemsize

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Chunks of unit rows.

        Raises
        ------
        InputError
            In the first pass, for NaN and infinity, and for a row of zeros: the first of them is named.
        """
        for start, x in self._source.chunks(min(rows, self._rows)):
            if not self._checked:
                largest_per_column(x, self._first + start)
                require_directions(x, self._first + start)
            yield start, unit_rows(x, self.dtype)
        self._checked = True

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return unit_rows(self._source.take(index), self.dtype)


def unit_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (b, d) divided by their lengths, rounded to ``dtype``; a row of zeros stays one."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = block_rows(x.shape[1], x.device)
    for start in range(0, x.shape[0], size):
        values = x[start : start + size].to(torch.float64, copy=True)
        exponent = torch.frexp(values.abs().amax(1, keepdim=True)).exponent
        # In two steps: the power of two that a subnormal row needs is itself beyond float64.
        half = exponent // 2
        values.mul_(_power_of_two(-half)).mul_(_power_of_two(half - exponent))
        length = tree_sum(values * values).sqrt_()[:, None]
        out[start : start + size] = values.div_(length.masked_fill_(length == 0, 1.0))
    return out


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent as float64, by its bits, for exponents of normal numbers: no device's rounding is asked."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def require_directions(x: torch.Tensor, start: int = 0, what: str = "Input X contains a row of zeros: row") -> None:
    """Refuse the first of the rows (b, d) that are all zeros; ``start`` is the number of the first row.

    Raises
    ------
    InputError
    """
    zero = ~x.any(1)
    if bool(zero.any()):
        raise InputError(
            f"{what} {start + int(zero.nonzero()[0, 0])} (counted from 0) has no direction, which metric='cosine' "
            "compares: leave such rows out"
        )


def unit_means(means: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Means (k, d) float64 as centroids of unit length in the type of those before; a mean of zero leaves its own."""
    return torch.where(means.any(1, keepdim=True), unit_rows(means, before.dtype), before)
