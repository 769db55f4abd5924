"""The operand of the second look of the CuPy backend (``rescore.cu``): centroids in two float16 parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import SLICE, Operand
from gpuclust.cluster.backends.tile import blocks, up
from gpuclust.cluster.exact import Bound

# As in the kernel: features of a piece, open rows of a block, and centroids that warps side by side have each.
_DEPTH, _OPEN_ROWS, _CENTROIDS = 32, 64, 32
# Static shared memory of a block, and some to spare.
_STATIC_BYTES = 8 << 10


@dataclass(frozen=True)
class Split(Operand):
    """The float32 operand, which the reference distance's look reads, and its parts, rounded and what that leaves.

    Attributes
    ----------
    matrix : float32 (r * k, d)
        -2 (c - m) s, rounded.
    parts : float16 (r, k, p, 2, 32)
        Of each centroid p pieces of 32 features, in each the higher parts and then the lower; zeros up to whole pieces.
    terms : float32 (r, k', 2)
        Bias less ``margin``, and ``slope`` (`gpuclust.cluster.exact`); of what is no centroid, up to whole tiles,
        infinity and 0.
    reach : float32 (r, k')
        Twice the ``margin``.
    warps : int
        Warps side by side.
    """

    matrix: torch.Tensor
    parts: torch.Tensor
    terms: torch.Tensor
    reach: torch.Tensor
    warps: int

    @classmethod
    def empty(cls, bound: Bound, centroids: torch.Tensor) -> Split:
        """Room for centroids (r, k, d), which ``prepare.cu`` fills."""
        (r, k, d), device = centroids.shape, centroids.device
        warps = 1 if k <= _CENTROIDS else 2 if k <= 2 * _CENTROIDS else 4
        columns, pieces = up(k, warps * _CENTROIDS), blocks(d, _DEPTH)
        return cls(
            centroids,
            bound.shift,
            bound.scale,
            torch.empty(r * k, d, dtype=torch.float32, device=device),
            torch.empty(r, k, pieces, 2, _DEPTH, dtype=torch.float16, device=device),
            torch.empty(r, columns, 2, dtype=torch.float32, device=device),
            torch.empty(r, columns, dtype=torch.float32, device=device),
            warps,
        )

    @property
    def threads(self) -> int:
        return _OPEN_ROWS * self.warps

    def room(self, most_bytes: int) -> tuple[int, int]:
        """Pieces of a row that a block holds, all where they fit, and its dynamic shared memory in bytes.

        Where they do not, the rows are read again for every tile of centroids; then two blocks share a multiprocessor.
        """
        pieces = self.parts.shape[2]
        per_piece = _OPEN_ROWS * 2 * _DEPTH * 2
        sums = self.threads * 32 * 4 if pieces * _DEPTH > SLICE else 0
        other = 2 * (_OPEN_ROWS * 8 + 2 * self.warps * _CENTROIDS * (2 * _DEPTH + 8)) + sums
        held, shared = ((most - _STATIC_BYTES - other) // per_piece for most in (most_bytes, most_bytes // 2))
        held = pieces if pieces <= held else max(1, shared)
        return held, other + held * per_piece
