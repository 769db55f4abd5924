"""The operands of the CuPy backend's looks, which ``prepare.cu`` makes of centroids in two launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpuclust.cluster.backends.base import Operand
from gpuclust.cluster.backends.cupy_rows import WIDE, wide
from gpuclust.cluster.backends.split import Split
from gpuclust.cluster.backends.tile import PIECE, Tile, blocks
from gpuclust.cluster.exact import FLOAT16, SPLIT, Bound, Frame

# Threads that go across the features of a centroid, of many and of few.
_THREADS = {True: 1024, False: 128}
_MANY = 4096


@dataclass(frozen=True)
class Looks(Operand):
    """The float16 operand, as the kernels read it, and the one of two parts.

    Attributes
    ----------
    padded : float16 (r, k', w), or (r, t, p, c, 64)
        -2 (c - m) s, rounded, with zeros up to whole tiles of centroids and of features; (r, k, w) where the tile has
        no rows. For ``assign_hopper.cu`` t tiles of c centroids, each in p pieces of 64 features, as they will lie in
        shared memory (``place`` of prepare.cu).
    terms : float32 (r, k', 2)
        Bias less ``margin``, and ``slope`` (`gpuclust.cluster.exact`); of what is no centroid infinity (the largest
        number for ``assign_hopper.cu``) and 0.
    reach : float32 (r, k')
        Twice the ``margin``.
    tile : Tile
        How the first look's kernel sees them.
    finer : Split
        For the rows that float16 leaves open.
    """

    padded: torch.Tensor
    terms: torch.Tensor
    reach: torch.Tensor
    tile: Tile
    finer: Split

    @classmethod
    def of(cls, launch: Any, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype, tile: Tile) -> Looks:
        """The centroids (r, k, d) for rows of ``dtype``."""
        centroids = wide(centroids)
        (r, k, d), device = centroids.shape, centroids.device
        columns, width = tile.padded(k), tile.width(d)
        bound, fine = frame.bound(dtype, FLOAT16), frame.bound(dtype, SPLIT)
        shape = (columns // tile.columns, width // PIECE, tile.columns, PIECE) if tile.stages else (columns, width)
        padded = torch.empty(r, *shape, dtype=torch.float16, device=device)
        terms = torch.empty(r, columns, 2, dtype=torch.float32, device=device)
        reach = torch.empty(r, columns, dtype=torch.float32, device=device)
        bias = torch.empty(r, k, dtype=torch.float64, device=device)
        finer = Split.empty(fine, centroids)
        fine_columns, pieces = finer.terms.shape[1], finer.parts.shape[2]
        threads = _THREADS[d > _MANY]
        options = (
            f"-DROW={WIDE[centroids.dtype]}",
            f"-DTHREADS={threads}",
            *([f"-DSWIZZLED_COLUMNS={tile.columns}"] if tile.stages else []),
        )
        launch(
            device, "prepare.cu", options, "prepare", (max(columns, fine_columns), r), threads, 0,
            centroids, k, d, frame.centre, *_numbers(bound), padded, columns, width, terms, reach,
            *_numbers(fine), finer.parts, fine_columns, pieces, finer.matrix, finer.terms, finer.reach, bias,
        )  # fmt: skip
        launch(
            device, "prepare.cu", options, "repeated", (blocks(k, threads // 32), r), threads, 0,
            centroids, k, d, bias, terms, reach, columns, finer.terms, finer.reach, fine_columns,
        )  # fmt: skip
        return cls(centroids, bound.shift, bound.scale, padded, terms, reach, tile, finer)


def _numbers(bound: Bound) -> tuple[float, ...]:
    """As the kernel takes them; the bias is the square there."""
    of_square = bound.of_bias + bound.of_square
    return (bound.scale, of_square, bound.of_length, bound.fixed, bound.slope, bound.least_slope, bound.longest)
