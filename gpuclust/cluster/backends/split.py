"""The operand of the second look of the CuPy backend (``rescore.cu``): centroids in two float16 parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from gpuclust.cluster.backends.base import SLICE, Operand
from gpuclust.cluster.backends.tile import up
from gpuclust.cluster.exact import SPLIT, Frame

# As in the kernel: features of a piece, open rows of a block, and centroids that warps side by side have each.
_DEPTH, _OPEN_ROWS, _CENTROIDS = 32, 64, 32
# Static shared memory of a block, and some to spare.
_STATIC_BYTES = 8 << 10


@dataclass(frozen=True)
class Split(Operand):
    """The float32 operand, which the reference distance's look reads, and its parts, rounded and what that leaves.

    Attributes
    ----------
    parts : float16 (r, k', p, 2, 32)
        Of each centroid p pieces of 32 features, in each the higher parts and then the lower; zeros up to whole tiles
        and pieces.
    terms : float32 (r, k', 2)
        ``low`` and ``slope``; of what is no centroid infinity and 0.
    reach : float32 (r, k')
        ``high`` less ``low``.
    warps : int
        Warps side by side.
    """

    parts: torch.Tensor
    terms: torch.Tensor
    reach: torch.Tensor
    warps: int

    @classmethod
    def of(cls, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Split:
        """The centroids (r, k, d) for rows of ``dtype``."""
        operand = frame.operand(centroids, dtype, SPLIT)
        r, k, d = centroids.shape
        warps = 1 if k <= _CENTROIDS else 2 if k <= 2 * _CENTROIDS else 4
        padded, pieces = up(k, warps * _CENTROIDS), -(-d // _DEPTH)
        both = torch.zeros(r, padded, 2, pieces * _DEPTH, dtype=torch.float16, device=centroids.device)
        matrix = operand.matrix.view(r, k, d)
        both[:, :k, 0, :d] = matrix
        both[:, :k, 1, :d] = matrix - both[:, :k, 0, :d]  # exact in float32, then rounded
        parts = both.unflatten(3, (pieces, _DEPTH)).transpose(2, 3).contiguous()
        own = {field.name: getattr(operand, field.name) for field in fields(Operand)}
        return cls(**own, parts=parts, **ends(operand, padded), warps=warps)

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


def ends(operand: Operand, padded: int, never: float = math.inf) -> dict[str, Any]:
    """``terms`` and ``reach`` of an operand, for a number of centroids that makes whole tiles; ``never`` is the score of
    what is none."""
    r, k, _ = operand.centroids.shape
    terms, reach = operand.low.new_zeros(r, padded, 2), operand.low.new_zeros(r, padded)
    terms[:, k:, 0].fill_(never)
    terms[:, :k] = torch.cat([operand.low, operand.slope], 1).view(r, k, 2)
    reach[:, :k] = (operand.high - operand.low).view(r, k)
    return {"terms": terms, "reach": reach}
