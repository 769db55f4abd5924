"""Centres: the centroids of all restarts as the Gram matrix sees them, and how far that is from the true ones.

A centroid c_j is known by its products with all rows and its own square. Where it is the mean of rows i with weights
w_i, those are ``sum_i w_i G_ij / W`` and ``sum_ij w_i w_j G_ij / W^2``. The true centroid, which the primal solver has,
is the mean of values rounded to a grid, and is itself rounded to the type in which it is returned. In units of s,
with h half the norm of the last steps of the grid, N = sum_i w_i ||x~_i|| / W (so that ||c~|| <= N) and L levels,

    ||c' - c|| <= delta = base + unit (||m|| s + ||c~|| + base) + sqrt(d) tiny s,
    base = h s n_c / W + (2 L + 6) 2^-53 (||m|| s + N) + e ||m|| s.

Each row's term moves by at most half of the last step of each feature (n_c rows, divided by W); products with weights,
the addition of levels and the division round; e is what the sum of the weights themselves can be off, relatively, 0
without weights; ``unit`` and ``tiny`` are half a last place and half of the least number of the returned type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from gpuclust.cluster.gram import Gram, U, gamma
from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.moments import Moments, centroid_dtype

# What is kept in lists, one thing for each restart.
_LISTS = ("starts", "known")
_MORE = 1 + 2.0**-20


class Rounding:
    """How far the primal's centroids can be from the means of their rows; lengths are times the scale."""

    def __init__(self, moments: Moments, weights: Weights | None, dtype: torch.dtype) -> None:
        scale, magic = moments.frame.scale, moments.grid.magic[-1]
        d = magic.numel()
        self.levels, self.weights = moments.grid.levels, weights
        self.half_step = torch.linalg.vector_norm(magic * (scale * 2.0**-53 / 1.5)).item() * _MORE
        self.offset = torch.linalg.vector_norm(moments.mean * scale).item() * _MORE
        narrow = centroid_dtype(dtype) == torch.float32
        self.unit, self.tiny = (2.0**-24, math.sqrt(d) * 2.0**-150 * scale) if narrow else (0.0, 0.0)

    def of(self, counts: torch.Tensor, mass: torch.Tensor, reach: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """delta of clusters with these numbers of rows, weights, N and upper bounds of ||c~||."""
        base = self.half_step * counts / mass + (2 * self.levels + 6) * U * (self.offset + reach)
        if self.weights is not None:
            wrong = self.weights.rounding * counts / mass + (self.weights.levels + 2) * U
            base += wrong * self.offset
        return (base + self.unit * (self.offset + length + base) + self.tiny) * _MORE


@dataclass
class Centres:
    """Centroids of r restarts, k each.

    Attributes
    ----------
    inner : float64 (r, k, n)
        Products with the rows, times ``mass``.
    error : float64 (r, k)
        ``inner`` is within ``error ||x~||`` of exact.
    mass : float64 (r, k)
    square : float64 (r, k)
        ||c~||^2.
    slope, margin : float64 (r, k)
        ``square - 2 inner / mass`` is within ``slope ||x~|| + margin`` of exact.
    delta : float64 (r, k)
        How far the true centroid can be.
    reach : float64 (r, k)
        N, at least ||c~||.
    home : int32 (r, n)
        The cluster in whose mean each row is; -1 in a restart whose centroids are given.
    starts : list
        For each restart the given centroids (k, d), or the numbers of the rows that they are; None where they moved.
    known : list of dict
        For each restart the true centroids (d,) that were needed.
    repeated : bool (r, k)
        Equal to an earlier centroid of the restart, which wins every tie.
    """

    inner: torch.Tensor
    error: torch.Tensor
    mass: torch.Tensor
    square: torch.Tensor
    slope: torch.Tensor
    margin: torch.Tensor
    delta: torch.Tensor
    reach: torch.Tensor
    home: torch.Tensor
    starts: list[list[int] | torch.Tensor | None]
    known: list[dict[int, torch.Tensor]]
    repeated: torch.Tensor

    @classmethod
    def empty(cls, r: int, k: int, n: int, device: torch.device) -> Centres:
        table = torch.zeros(r, k, dtype=torch.float64, device=device)
        return cls(
            inner=torch.empty(r, k, n, dtype=torch.float64, device=device),
            **{name: table.clone() for name in ("error", "mass", "square", "slope", "margin", "delta", "reach")},
            home=torch.full((r, n), -1, dtype=torch.int32, device=device),
            starts=[None] * r,
            known=[{} for _ in range(r)],
            repeated=torch.zeros(r, k, dtype=torch.bool, device=device),
        )

    def keep(self, restarts: list[int]) -> Centres:
        """Some of the restarts, as a copy."""
        index = torch.tensor(restarts, dtype=torch.int64, device=self.inner.device)
        tables = {one.name: getattr(self, one.name)[index] for one in fields(self) if one.name not in _LISTS}
        lists: dict[str, Any] = {name: [getattr(self, name)[i] for i in restarts] for name in _LISTS}
        return Centres(**tables, **lists)

    def place(
        self, i: int, start: list[int] | torch.Tensor, inner: torch.Tensor, square: torch.Tensor, error: float
    ) -> None:
        """Restart ``i`` has given centroids, with these products (k, n), squares (k,) and relative error of both."""
        length = square.sqrt() * (1 + error) * _MORE
        self.inner[i], self.square[i], self.mass[i], self.reach[i] = inner, square, 1.0, length
        self.error[i], self.delta[i], self.home[i] = error * length, 0.0, -1
        self.starts[i], self.known[i] = start, {}
        self._bound(i, error * length.square())

    def move(
        self, gram: Gram, rounding: Rounding, labels: torch.Tensor, masses: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """All centroids become the means of their rows by ``labels`` (r, n); no cluster has no mass."""
        r, k, n = self.inner.shape
        weights = None if rounding.weights is None else rounding.weights.values
        weighted = gram.norms if weights is None else gram.norms * weights
        lengths = per_cluster(weighted.expand(r, n), labels, k) * _MORE
        moved = (self.home != labels).any(0).nonzero()[:, 0]
        if 2 * len(moved) < n:
            old, new = self.home[:, moved].long()[:, None], labels[:, moved].long()[:, None]
            change = (old != new).double()
            change = change if weights is None else change * weights[moved]
            member = change.new_zeros(r, k, len(moved)).scatter_add_(1, new, change).scatter_add_(1, old, -change)
            self.inner.view(r * k, n).addmm_(member.view(r * k, -1), gram.values[moved])
            both = member.abs_() @ gram.norms[moved]
            # Before the move a cluster's lengths were at most what they are now and what moved.
            self.error += gram.error * both + gamma(len(moved) + 8) * (lengths + 2 * both + self.error)
        else:
            ones = torch.ones(n, dtype=torch.float64, device=labels.device) if weights is None else weights
            member = self.inner.new_zeros(r, k, n).scatter_(1, labels.long()[:, None], ones.expand(r, 1, n))
            torch.mm(member.view(r * k, n), gram.values, out=self.inner.view(r * k, n))
            self.error = (gram.error + gamma(n + 8)) * lengths
        self.home.copy_(labels)
        self.starts = [None] * r
        self.mass = masses.clone()
        inner = self.inner.gather(1, labels.long()[:, None])[:, 0]
        self.square = per_cluster(inner if weights is None else inner * weights, labels, k) / self.mass.square()
        self.reach = lengths / self.mass * _MORE
        self._bound(slice(None), self.error / self.mass * self.reach + gamma(n + 8) * self.reach.square())
        length = torch.minimum((self.square + self.margin).clamp_(min=0).sqrt_() * _MORE, self.reach)
        self.delta = rounding.of(counts, self.mass, self.reach, length)
        self.repeated.zero_()

    def _bound(self, which: int | slice, margin: torch.Tensor) -> None:
        reach = self.reach[which]
        self.slope[which] = (2 * self.error[which] / self.mass[which] + 16 * U * reach) * _MORE
        self.margin[which] = (margin + 16 * U * reach.square()) * _MORE


def per_cluster(values: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Sums of values (r, n) in each cluster of each restart: float64 (r, k)."""
    return values.new_zeros(len(labels), k).scatter_add_(1, labels.long(), values)
