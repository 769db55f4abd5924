"""Moments: what a fit knows of its rows before it starts: their mean, their spread and the grid of their sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import Rows
from gpuclust.cluster.backends.plain import Plain
from gpuclust.cluster.distributed import Block, in_all
from gpuclust.cluster.exact import Frame
from gpuclust.cluster.sources.base import ChunkSource, chunk_rows
from gpuclust.cluster.sources.checksum import require_unchanged
from gpuclust.cluster.sums import SUMMED, Grid, total
from gpuclust.errors import InputError

_PLAIN = Plain()


@dataclass(frozen=True)
class Moments:
    """The rows of a source, summed up in a way that does not depend on chunks; of all processes, but for ``dist2``.

    Attributes
    ----------
    block : Block
        Which of the rows of all processes the source has.
    mean : float64 (d,)
        Mean of the rows without weights, rounded to the type of the centroids.
    dist2 : float64 (n,)
        Reference distance of each row of the source to the mean.
    spread : float
        Sum of ``dist2`` over the rows of all processes.
    largest : float
        The largest absolute value.
    grid : Grid
        Of sums of weighted rows.
    frame : Frame
        Of the float32 passes over the rows.
    """

    block: Block
    mean: torch.Tensor
    dist2: torch.Tensor
    spread: float
    largest: float
    grid: Grid
    frame: Frame

    @classmethod
    def of(
        cls,
        source: ChunkSource,
        lightest: float | None = None,
        block: Block | None = None,
        backend: Rows = _PLAIN,
    ) -> Moments:
        """Read the source three times; ``lightest`` is the least weight above 0 where rows have weights, of at most 1.

        Raises
        ------
        InputError
            For NaN and infinity (the first of them is named), and for values whose squares leave float64's range.
        """
        n, d = source.shape
        block = block or Block.alone(n)
        rows = chunk_rows(1, d, source.device)
        largest = torch.zeros(d, dtype=torch.float64, device=source.device)
        with in_all(block.group):
            for start, x in source.chunks(rows):
                torch.maximum(largest, largest_per_column(x, block.first + start, backend), out=largest)
        largest = block.max(largest)
        plain = Grid.of(largest, block.n, source.dtype)
        sums = torch.zeros(plain.levels, d, dtype=torch.float64, device=source.device)
        for _, x in source.chunks(rows):
            backend.total(x, plain, sums)
        mean = (block.sum(sums).sum(0) / block.n).to(centroid_dtype(source.dtype)).double()
        dist2 = torch.empty(n, dtype=torch.float64, device=source.device)
        for start, x in source.chunks(rows):
            dist2[start : start + x.shape[0]] = backend.dist2(x, mean)
        far2, most = block.max(dist2.amax()).item(), largest.amax().item()
        # Four times the farthest bounds any distance between two rows.
        bound = SUMMED * 4 * far2 * block.n
        require_unchanged(math.isfinite(bound) or not math.isfinite(4 * SUMMED * most * most * d * block.n))
        require_range(bound, most)
        spread = total(dist2, None, block)
        return cls(
            block,
            mean,
            dist2,
            spread,
            most,
            plain if lightest is None else Grid.of(largest, block.n, torch.float64, lightest),
            Frame.of(source.dtype, mean, most, spread / block.n, far2),
        )


def centroid_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which centroids of rows of ``dtype`` are kept and returned: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest_per_column(x: torch.Tensor, start: int = 0, backend: Rows = _PLAIN) -> torch.Tensor:
    """The largest absolute value of each column of rows (b, d), float64 (d,); ``start`` is the first row's number.

    Raises
    ------
    InputError
        For NaN and infinity; the first of them is named.
    """
    largest = backend.largest(x)
    if not bool(largest.isfinite().all()):
        _refuse(x, start)
    return largest


def require_range(bound: float, largest: float, what: str = "values") -> None:
    """Refuse rows with ``what`` up to ``largest`` where squared distances or their sums, up to ``bound``, overflow.

    Raises
    ------
    InputError
    """
    if not math.isfinite(bound):
        raise InputError(f"{what} up to {largest:.3g} are too large: squared distances overflow float64; scale X")


def _refuse(x: torch.Tensor, start: int) -> None:
    row, column = (int(index) for index in (~x.isfinite()).nonzero()[0])
    value = x[row, column].item()
    kind = str(x.dtype).removeprefix("torch.")
    what = "NaN" if math.isnan(value) else f"infinity or a value too large for dtype({kind!r})"
    raise InputError(f"Input X contains {what}. It is {value} in row {start + row}, column {column} (counted from 0)")
