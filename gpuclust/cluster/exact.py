"""What makes the labels exact: the reference distance, the error bound of a pass, and the re-check.

**Reference distance.** dist2(x, c) in float64: the difference of each feature, its square, summed by the fixed tree
of `gpuclust.cluster.sums.tree_sum`, one rounding per operation (no fused multiply-add). `labels_[i]` is the least
index of its least value over the returned centroids.

**Bound.** A pass computes x^ = fl((x - m) s), c^ = fl((c - m) s) and ``score_j = bias_j - 2 x^ . c^`` with bias_j =
||c - m||^2 s^2 (where rows are used as stored, x^ = x and bias_j = ||c||^2 - ||m||^2). Exactly, ``||x - c||^2 s^2`` is
that score plus a term that is the same for all centroids of a row. With an `Arithmetic` whose operands are rounded by a
share rho and an absolute t, and whose additions round by a share v, the computed score is off by at most

    2 ||x^|| ||c - m|| s (g + 2 rho + rho^2) (1 + 4 rho) + 2 sqrt(d) t (||x^|| + ||c - m|| s) + 2 d t^2
      + g |bias_j| + 8 u (|bias_j| + 2 ||x^|| ||c - m|| s) + eta,        u = 2**-24,

where g = (K + S + 1) v / (1 - (K + S + 1) v) bounds a sum of the bias and K products in any order, of which S partial
sums are then added (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1, with Cauchy-Schwarz
for the norms); rows used as stored round nothing, which takes one rho away; 8 u covers the rounding of the bias, of the
bound itself and of the few additions around it; eta covers underflow. Tensor cores add with truncation, at most 2**-22
of the largest term for each product (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
PeerJ CS 2021). The reference distance is within (log2 d + 4) 2**-53 of exact, relatively, and ||x - c||^2 <= 2 (||x -
m||^2 + ||c - m||^2); that is added too, so that a certified label is the label that the reference distance gives. Every
centroid whose score less its bound is not above the least of score plus bound stays a candidate. Where one is left, it
is certain. Everything else, NaN and infinity included, is decided by the reference distance.

**Two parts.** `SPLIT` multiplies float32 operands x^ and c^ on float16 tensor cores: x^ = hi + lo, hi = fl16(x^) and
lo = fl16(x^ - hi), at a scale (`Frame.lifted`) at which lo hardly underflows. Half a unit in hi's last place is a power
of two, so |lo| <= 2**-11 |x^|, and lo's 11 digits miss at most 2**-23 |x^| + 2**-25. What is left out, lo . lo, is at
most 2**-22 ||x^|| ||c^||. Each operand answers for its conversion, for what lo misses, and for half of lo . lo: rho =
(1 + 2 + 2) u. Over runs of R = 16 features the tensor cores sum hi . lo, lo . hi and then hi . hi, from zero. Each of
these loses at most R v of all that the sum holds by then; together R v (1 + 2**-7) of |x^| . |c^|, since |hi| . |hi| is
at most (1 + 2**-11)**2 of that and both others 2**-10 (1 + 2**-11). Float32 additions, of the same values, join the
ceil(min(d, SLICE) / R) runs of a slice and the S slices. The bias comes last, within the 8 u, and has no g: so g = G /
(1 - G), G = (1 + 2**-7) (min(d, R) v + (ceil(min(d, SLICE) / R) + S) u). t is 2**-25, and g of it again for a hi that
underflows. ``decide.cu`` sums the same operands in float32 over 32 lanes, in fewer than SLICE / 32 + S + 5 additions
that round: that is less than G for any d, so the same bound holds there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from gpuclust.cluster.backends.base import SLICE, UNREACHED, Bounded, Candidates
from gpuclust.cluster.sources.base import block_rows
from gpuclust.cluster.sums import tree_sum

_U = 2.0**-24
# Of the bound: what its own computation rounds is far less.
INFLATE = 1 + 2.0**-10


@dataclass(frozen=True)
class Arithmetic:
    """How a pass computes, as far as its errors depend on it.

    Attributes
    ----------
    dtype : torch.dtype
        Of the operands.
    rounding : float
        rho, the relative error of an operand.
    tiny : float
        t, the absolute error of an operand near 1 that is too small for that (underflow).
    adding : float
        v, the relative error of an addition, at worst.
    reads_stored : bool
        Whether float32 rows may be read as they are stored, without centring.
    run : int
        Products that additions of the error v put together; the sums of runs are then added.
    joining : float, optional
        The relative error of an addition of the sums of runs; v by default.
    split : bool
        Whether products are of two float16 parts of each operand, and the bias is added to their sum.
    """

    dtype: torch.dtype
    rounding: float
    tiny: float
    adding: float
    reads_stored: bool = False
    run: int = SLICE
    joining: float | None = None
    split: bool = False


FLOAT32 = Arithmetic(torch.float32, _U, 0.0, _U, reads_stored=True)
# On tensor cores, with float32 accumulators.
FLOAT16 = Arithmetic(torch.float16, 2.0**-11, 2.0**-25, 2.0**-22)
# The same, of two parts; see above.
SPLIT = Arithmetic(
    torch.float32,
    5 * _U,
    1.25 * 2.0**-25,
    (1 + 2.0**-7) * 2.0**-22,
    run=16,
    joining=(1 + 2.0**-7) * _U,
    split=True,
)


def reference_dist2(
    x: torch.Tensor,
    centroids: torch.Tensor,
    which: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared Euclidean distance of rows to centroids, in float64 difference form with a fixed summation tree.

    Parameters
    ----------
    x : (b, d), any floating dtype
    centroids : (k, d) with ``which``; else (d,), one for all rows
    which : integer (p,), optional
        The centroid of each pair.
    rows : int64 (p,), optional
        The row of each pair; all rows in order by default (p = b).

    Returns
    -------
    float64 (p,)
        The same bits for any ``p`` and on any device with IEEE arithmetic.
    """
    pairs = x.shape[0] if rows is None else rows.shape[0]
    out = torch.empty(pairs, dtype=torch.float64, device=x.device)
    size = block_rows(x.shape[1], x.device)
    for start in range(0, pairs, size):
        part = slice(start, start + size)
        row = x[part] if rows is None else x.index_select(0, rows[part])
        centre = centroids if which is None else centroids.index_select(0, which[part])
        difference = row.double() if row.dtype != torch.float64 else row.clone()
        difference -= centre.double()
        difference *= difference
        out[part] = tree_sum(difference)
    return out


class Bound(NamedTuple):
    """The bound of the scores of an arithmetic in a frame, in numbers that are the same for all centroids.

    With b the bias and l = ||c - m|| s of a centroid, all in float64,

        margin = of_bias |b| + of_square l^2 + of_length l + fixed,        slope = slope l + least_slope;

    where l is ``longest`` or more, or no number, the slope is no number.

    Attributes
    ----------
    scale : float
        s.
    shift : (d,) or None
        m s, as in `gpuclust.cluster.backends.base.Operand`.
    """

    scale: float
    shift: torch.Tensor | None
    of_bias: float
    of_square: float
    of_length: float
    fixed: float
    slope: float
    least_slope: float
    longest: float


@dataclass(frozen=True)
class Frame:
    """How the rows are seen by a pass: centre, scale, and whether they are converted at all.

    Attributes
    ----------
    centre : float64 (d,)
        m, subtracted from the centroids, and from the rows where they are converted; holds values of the rows' dtype
        (float32 at least), so that scaling it by a power of two is exact.
    stored : bool
        Float32 rows of modest size and offset, which a float32 pass reads as they are stored.
    scale : float
        s, a power of two that brings the largest value near 1.
    far2 : float
        The largest squared distance of a row to the centre.
    offset : float
        ||m||.
    """

    centre: torch.Tensor
    stored: bool
    scale: float
    far2: float
    offset: float

    @classmethod
    def of(cls, dtype: torch.dtype, centre: torch.Tensor, largest: float, spread: float, far2: float) -> Frame:
        """Choose from the largest absolute value and the mean (``spread``) and largest squared distance to the centre.

        Converting costs a pass over the chunk and takes an offset away; rows that have little of it do without.
        """
        offset = torch.linalg.vector_norm(centre).item()
        stored = dtype == torch.float32 and 2.0**-20 <= largest <= 2.0**40 and offset * offset <= 8 * spread
        exponent = math.frexp(largest)[1] if largest > 0 else 0
        # The scale is a number of the type that rows are converted in, and must be finite and normal there.
        limit = 1000 if dtype == torch.float64 else 120
        return cls(centre, stored, 2.0 ** -max(-limit, min(limit, exponent)), far2, offset)

    @property
    def vanishing(self) -> bool:
        """Whether squared distances are so small, in float64 itself, that they have lost digits."""
        return self.far2 < 2.0**-900

    def moved(self, values: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
        """Values (p, w) of a span of the features as float64, centred and scaled."""
        return (values.double() - self.centre[span]).mul_(self.scale)

    def lifted(self, dtype: torch.dtype) -> float:
        """A scale for rows of ``dtype`` in two float16 parts: small values keep their digits, however far the rows are
        from zero, and centroids some thousand times as far from the centre as all rows are in range."""
        by_distance = 2.0 ** min(1000, 3 - math.frexp(math.sqrt(self.far2))[1])
        limit = 2.0 ** (1006 if dtype == torch.float64 else 126)
        return min(max(2.0**6 * self.scale, by_distance), 2.0**40 * self.scale, limit)

    def norms(self, dist2: torch.Tensor) -> torch.Tensor:
        """Upper bounds of ||x - m|| s, float32 (b,), from the squared distances (b,) of the rows to the centre."""
        return (dist2.sqrt() * (self.scale * (1 + 2.0**-20)) + 2.0**-100).float()

    def operand(self, centroids: torch.Tensor, dtype: torch.dtype, arithmetic: Arithmetic = FLOAT32) -> Bounded:
        """Prepare centroids (r, k, d) for a pass over rows of ``dtype`` in an arithmetic."""
        r, k, d = centroids.shape
        bound = self.bound(dtype, arithmetic)
        flat = centroids.reshape(r * k, d)
        matrix = torch.empty(r * k, d, dtype=arithmetic.dtype, device=flat.device)
        bias = torch.empty(r * k, dtype=torch.float64, device=flat.device)
        square = torch.empty_like(bias)
        size = block_rows(d, flat.device)
        for start in range(0, r * k, size):
            part = slice(start, start + size)
            c = flat[part].double()
            moved = (c - self.centre).mul_(bound.scale)
            matrix[part] = (moved * -2.0).to(arithmetic.dtype)
            square[part] = torch.linalg.vecdot(moved, moved)
            bias[part] = torch.linalg.vecdot(moved, c + self.centre) if bound.shift is None else square[part]
        length = square.sqrt()
        slope = (length * bound.slope).add_(bound.least_slope)
        slope.masked_fill_((length < bound.longest).logical_not_(), math.nan)
        margin = bound.of_bias * bias.abs() + bound.of_square * square + bound.of_length * length + bound.fixed
        return bounded(centroids, matrix, bias, slope, margin, bound.shift, bound.scale)

    def bound(self, dtype: torch.dtype, arithmetic: Arithmetic) -> Bound:
        """The bound of passes over rows of ``dtype`` in an arithmetic; made once."""
        key = dtype, arithmetic
        if key not in self._bounds:
            self._bounds[key] = self._bound(dtype, arithmetic)
        return self._bounds[key]

    @cached_property
    def _bounds(self) -> dict[tuple[torch.dtype, Arithmetic], Bound]:
        return {}

    def _bound(self, dtype: torch.dtype, arithmetic: Arithmetic) -> Bound:
        d = len(self.centre)
        stored = self.stored and arithmetic.reads_stored
        scale = 1.0 if stored else self.lifted(dtype) if arithmetic.split else self.scale
        rho, tiny = arithmetic.rounding, arithmetic.tiny * math.sqrt(d)
        relative = relative_error(d, arithmetic) + (1 if stored else 2) * rho * (1 + 4 * rho) + rho * rho
        of_bias, of_square, fixed = self._margin(d, 0.0 if arithmetic.split else summing_error(d, arithmetic), scale)
        # Of rows used as stored ||x^|| is up to ||m|| more than ||x - m||; the bias has terms of that size, too.
        lift = self.offset if stored else 0.0
        if dtype == torch.float64 and self.vanishing:
            fixed = math.inf  # nothing can be certified
        # What leaves the range of the operands' type is infinite there: with such a centroid nothing is certain.
        most = torch.finfo(torch.float16 if arithmetic.split else arithmetic.dtype).max
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Bound(
            scale,
            None if stored else (self.centre * scale).to(wide),
            of_bias,
            of_square,
            2 * tiny + (2 * relative + d * 2.0**-51) * lift,
            fixed + 2 * tiny * (tiny + lift),
            2 * relative * (scale / self.scale),
            2 * tiny * (scale / self.scale),
            most / (2 * (1 + rho)),
        )

    def margin(self, square: torch.Tensor, d: int, summing: float) -> torch.Tensor:
        """The part of the bound that is the same for all rows: float64 (p,), for biases ||c - m||^2 s^2 (p,)."""
        of_bias, of_square, fixed = self._margin(d, summing, self.scale)
        return (of_bias + of_square) * square + fixed

    def _margin(self, d: int, summing: float, scale: float) -> tuple[float, float, float]:
        """The margin's share of the bias, its share of ||c - m||^2 s^2, and what it has beside these."""
        reference = 4 * (math.log2(d) + 4) * 2.0**-53
        far = math.sqrt(self.far2) * scale
        # Products and conversions lose this below the normal range, with the largest value near 1.
        underflow = d * 2.0**-110
        return summing + 8 * _U, d * 2.0**-52 + reference, reference * far * far + underflow


def summing_error(d: int, arithmetic: Arithmetic) -> float:
    """g: the share of its terms' absolute values that a sum of a bias and d products can lose."""
    joining = arithmetic.adding if arithmetic.joining is None else arithmetic.joining
    joined = math.ceil(min(d, SLICE) / arithmetic.run) + math.ceil(d / SLICE)
    terms = min(d, arithmetic.run) * arithmetic.adding + joined * joining
    return terms / (1 - terms)


def relative_error(d: int, arithmetic: Arithmetic) -> float:
    """The share of ||x^|| ||c^|| that summing d products can lose, and 8 u for the few operations around it."""
    return summing_error(d, arithmetic) * (1 + 4 * arithmetic.rounding) + 8 * _U


def bounded(
    centroids: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor,
    slope: torch.Tensor,
    margin: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Bounded:
    """The operand of centroids (r, k, d) with these biases, slopes and margins, float64 (r * k,)."""
    high, low = bias + margin * INFLATE, bias - margin * INFLATE
    repeated = repeated_in(centroids, bias)
    high, low = (part.masked_fill(repeated, UNREACHED) for part in (high, low))
    high, low, slope = (part.float()[:, None] for part in (high, low, slope * INFLATE))
    return Bounded(centroids, shift, scale, matrix, high, low, slope)


def repeated_in(centroids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Which of the centroids (r, k, d) equal an earlier one of their restart, which wins every tie: bool (r * k,).

    Equal ones are looked for where a number that belongs to each, ``bias`` (r * k,), is equal. One that is not found
    costs time, and is a candidate to the end.
    """
    r, k, d = centroids.shape
    bias = bias.view(r, k)
    ordered = bias.sort(1).values
    repeated = torch.zeros_like(bias, dtype=torch.bool)
    if _may_ask(bias.device) and not bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return repeated.view(-1)
    # Mirrored centroids have one bias, so a second number goes before it: then equal ones are neighbours.
    flat, size = centroids.reshape(r * k, d), block_rows(d, bias.device)
    spread = torch.arange(1, d + 1, dtype=torch.float64, device=bias.device).cos_()
    second = torch.cat([(some * spread).sum(1) for some in flat.split(size)]).view(r, k)
    order = second.argsort(dim=1, stable=True)
    order = order.gather(1, bias.gather(1, order).argsort(dim=1, stable=True))
    order += torch.arange(0, r * k, k, device=bias.device)[:, None]
    before, after = order[:, :-1].flatten(), order[:, 1:].flatten()
    pairs = zip(before.split(size), after.split(size), strict=True)
    same = [(one < other) & (flat[one] == flat[other]).all(1) for one, other in pairs]
    return repeated.view(-1).index_copy_(0, after, torch.cat(same))


def _may_ask(device: torch.device) -> bool:
    """Whether the host can look at a result without waiting for it."""
    return device.type == "cpu"


def decide(x: torch.Tensor, centroids: torch.Tensor, candidates: Candidates, labels: torch.Tensor) -> torch.Tensor:
    """Label what a pass left open: the least reference distance among the candidates; the lowest index of a tie.

    Parameters
    ----------
    x : (b, d)
    centroids : (r, k, d)
        In the dtype in which they are returned.
    candidates : Candidates
        Of rows of ``x``.
    labels : int32 (r, b), in and out

    Returns
    -------
    int64 ()
        How many labels it decided.
    """
    r, k, d = centroids.shape
    row, restart, centroid = candidates
    if row.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    dist2 = reference_dist2(x, centroids.reshape(r * k, d), restart * k + centroid, row)
    pair, group = torch.unique_consecutive(row * r + restart, return_inverse=True)
    least = dist2.new_full(pair.shape, math.inf).scatter_reduce_(0, group, dist2, "amin")
    # A label is below k whatever the distances are: of rows that changed meanwhile none may equal the least.
    tied = torch.where(dist2 == least[group], centroid, k - 1)
    best = tied.new_full(pair.shape, k - 1).scatter_reduce_(0, group, tied, "amin")
    labels[pair % r, pair // r] = best.to(labels.dtype)
    return torch.tensor(pair.numel(), device=x.device)
