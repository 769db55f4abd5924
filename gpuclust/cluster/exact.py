"""What makes the labels exact: the reference distance, the error bound of the float32 pass, and the re-check.

**Reference distance.** dist2(x, c) in float64: the difference of each feature, its square, summed by the fixed tree of
`gpuclust.cluster.sums.tree_sum`, one rounding per operation (no fused multiply-add). `labels_[i]` is its least index of the
least value over the returned centroids.

**Bound.** A pass in float32 (unit roundoff u = 2**-24) forms x^ = fl((x - m_x) s), c^ = fl((c - m) s) and
``score_j = bias_j - 2 x^ . c^``. Exactly, ``||x - c||^2 s^2`` is that score plus a term that is the same for all
centroids of a row. The computed score is off by at most

    2 ||x^|| ||c^|| (g + rho_x + rho_c) + 8 u (|bias_j| + 2 ||x^|| ||c^||) + eta,

where g = (K + S) u / (1 - (K + S) u) bounds a sum of K products in any order, of which S partial sums are then added
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1, with Cauchy-Schwarz for the norms);
rho_x is u where rows are converted and 0 where they are used as stored; rho_c is u; 8 u covers the rounding of the bias,
of the bound itself and of the few additions around it; eta covers underflow. The reference distance is within
(log2 d + 4) 2**-53 of exact, relatively, which is added too, so that a certified label is the label that the reference
distance gives. Every centroid whose score minus its bound is not above the least score plus bound stays a candidate.
Where one is left, it is certain. Everything else, NaN and infinity included, is decided by the reference distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import Candidates, Operand
from gpuclust.cluster.backends.torch import SLICE
from gpuclust.cluster.sums import tree_sum

_U = 2.0**-24
# Values per temporary of the float64 difference form: small enough to stay in a processor's cache.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


def reference_dist2(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Squared Euclidean distance of each row to its centroid, in float64 difference form with a fixed summation tree.

    Parameters
    ----------
    x : (b, d), any floating dtype
    centroids : (k, d) with ``labels``; else (d,), one for all rows
    labels : integer (b,), optional

    Returns
    -------
    float64 (b,)
        The same bits for any ``b`` and on any device with IEEE arithmetic.
    """
    out = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    rows = max(1, _BLOCK.get(x.device.type, 1 << 24) // x.shape[1])
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        centre = centroids if labels is None else centroids.index_select(0, labels[part])
        difference = x[part].double()
        difference -= centre.double()
        difference *= difference
        out[part] = tree_sum(difference)
    return out


@dataclass(frozen=True)
class Frame:
    """How the rows are seen by the float32 pass: centre, scale, and whether they are converted at all.

    Attributes
    ----------
    centre : float64 (d,)
        m, subtracted from the centroids, and from the rows where they are converted.
    converted : bool
        False: float32 rows of modest size and offset, read as stored.
    scale : float
        s, a power of two that brings the largest value near 1.
    """

    centre: torch.Tensor
    converted: bool
    scale: float

    @classmethod
    def of(cls, dtype: torch.dtype, centre: torch.Tensor, largest: float, spread: float, offset: float) -> Frame:
        """Choose from the largest absolute value, the mean squared distance to the centre, and the centre's squared norm.

        Converting costs a pass over the chunk and takes an offset away; rows that have little of it do without.
        """
        if dtype == torch.float32 and 2.0**-20 <= largest <= 2.0**40 and offset <= 8 * spread:
            return cls(centre, False, 1.0)
        exponent = math.frexp(largest)[1] if largest > 0 else 0
        return cls(centre, True, 2.0 ** -max(-1000, min(1000, exponent)))

    def norms(self, dist2: torch.Tensor) -> torch.Tensor:
        """Upper bounds of ||x^||, float32 (b,), from the squared distances (b,) of the rows to the centre."""
        bound = dist2.sqrt() if self.converted else dist2.sqrt() + torch.linalg.vector_norm(self.centre)
        return (bound * (self.scale * (1 + 2.0**-20)) + 2.0**-100).float()

    def operand(self, centroids: torch.Tensor, dtype: torch.dtype) -> Operand:
        """Prepare centroids (r, k, d) for a pass over rows of ``dtype``."""
        r, k, d = centroids.shape
        flat = centroids.reshape(r * k, d)
        matrix = torch.empty(r * k, d, dtype=torch.float32, device=flat.device)
        bias = torch.empty(r * k, dtype=torch.float64, device=flat.device)
        square = torch.empty_like(bias)
        rows = max(1, (1 << 20) // d)
        for start in range(0, r * k, rows):
            part = slice(start, start + rows)
            c = flat[part].double()
            moved = (c - self.centre).mul_(self.scale)
            matrix[part] = moved
            square[part] = torch.linalg.vecdot(moved, moved)
            other = moved if self.converted else (c + self.centre).mul_(self.scale)
            bias[part] = square[part] if self.converted else torch.linalg.vecdot(moved, other)
        matrix *= -2.0
        terms = min(d, SLICE) + math.ceil(d / SLICE)
        relative = terms * _U / (1 - terms * _U) + (2 if self.converted else 1) * _U + 8 * _U
        reference = (math.log2(d) + 4) * 2.0**-53
        norm = square.sqrt()
        # 2**-110 d: what products and conversions lose below the normal range, with the largest value near 1.
        margin = 8 * _U * bias.abs() + 4 * reference * (square + self._far2()) + d * 2.0**-110
        slope = 2 * norm * (relative + 4 * reference)
        inflate = 1 + 2.0**-10
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        shift = (self.centre * self.scale).to(compute) if self.converted else None
        return Operand(
            matrix,
            (bias + margin * inflate).float()[:, None],
            (bias - margin * inflate).float()[:, None],
            (slope * inflate).float()[:, None],
            shift,
            self.scale,
            r,
            k,
        )
