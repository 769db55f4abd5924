"""Hartigan and Wong's moves: after Lloyd's, single rows change their cluster where that lowers the inertia.

With its row, its cluster's centroid moves, too: taking row i of weight w from cluster a of weight W_a saves
``W_a w / (W_a - w) dist2(i, a)``, and adding it to b costs ``W_b w / (W_b + w) dist2(i, b)``. Lloyd's compares the bare
distances, so it can stop where a move still saves more than it costs (an optimum of these moves is one of Lloyd's, and
not the other way round). The best restart of Lloyd's is improved, and no other: trying all would cost as much as each.

**Sweeps.** All rows are scanned with products in float64, which leaves those that may gain; of these, the ones that
gain by the reference distance to the centroids at the beginning of the sweep are taken in order, lowest row first.
Each is compared once more with the centroids as they are then, and goes to the cluster that costs least (ties: the
lowest). Sums stay on their grid, so that nothing depends on chunks. A sweep without a move is the last, and there are
``max_iter`` at most: rows without clusters may want hundreds, each as long as a pass of Lloyd's in float64.

**It ends.** Centroids here are float64 and within delta of the means (`gpuclust.cluster.centres`), which changes a
squared distance q by at most ``2 sqrt(q) delta + delta^2``. A row moves only if it gains more than twice what that and
the rounding of the distances (2**-40 of both sides) can pretend, so that the true inertia falls in every move, and no
partition comes again. In the end Lloyd's runs from these centroids, so that labels belong to the returned centroids;
what it finds is kept only if its inertia is below what was there.

Source: Hartigan and Wong, "Algorithm AS 136: a k-means clustering algorithm", Applied Statistics 28, 1979.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from gpuclust.cluster.centres import Rounding
from gpuclust.cluster.exact import reference_dist2
from gpuclust.cluster.gram import gamma
from gpuclust.cluster.lloyd import Lloyd, Solution, distances
from gpuclust.cluster.sources.base import tile_rows, tiles
from gpuclust.cluster.sums import total

# What the rounding of distances and of a few operations with them can pretend to gain, as a share of them.
_PRETENDED = 2.0**-40
# Candidates whose rows are fetched at a time.
_FETCHED = 64


def improve(
    lloyd: Lloyd, best: Solution, dist2: torch.Tensor, inertia: float
) -> tuple[Solution, torch.Tensor, float, int]:
    """Move single rows of a solution, with these distances (n,) and inertia, until none helps or ``max_iter`` sweeps.

    Returns
    -------
    tuple
        The solution, its distances and inertia, as they were where nothing lowers it, and the number of moves.
    """
    source, moments, weights = lloyd.source, lloyd.moments, lloyd.weights
    moves, sweeps = 0, lloyd.limits.max_iter
    if moments.frame.vanishing:
        return best, dist2, inertia, moves
    while True:
        partition = _Partition(lloyd, best)
        made, sweeps = partition.improve(sweeps)
        if not made:
            return best, dist2, inertia, moves
        centres = partition.centres.to(best.centroids.dtype)[None]
        del partition  # whose sums are large
        found = lloyd.run(centres)[0]
        found_dist2 = distances(lloyd.backend, source, found.centroids, found.labels)
        value = total(found_dist2, None if weights is None else weights.values, moments.block)
        if not value < inertia:
            return best, dist2, inertia, moves
        best = replace(found, n_iter=best.n_iter, shifts=best.shifts)
        dist2, inertia, moves = found_dist2, value, moves + made


class _Partition:
    """A partition that rows move in: float64 ``centres`` (k, d), the means of the clusters."""

    def __init__(self, lloyd: Lloyd, solution: Solution) -> None:
        self.lloyd, self.source, self.moments = lloyd, lloyd.source, lloyd.moments
        self.scale = lloyd.moments.frame.scale
        self.labels = solution.labels.clone()
        self.weights = None if lloyd.weights is None else lloyd.weights.values
        self.rounding = Rounding(lloyd.moments, lloyd.weights, torch.float64)
        self.far = math.sqrt(lloyd.moments.frame.far2) * self.scale
        k, d = solution.centroids.shape
        device = self.labels.device
        self.sums = torch.zeros(lloyd.moments.grid.levels, 1, k, d, dtype=torch.float64, device=device)
        counts = torch.zeros(1, k, dtype=torch.float64, device=device)
        for start, x in self.source.chunks(lloyd.chunk_rows(1)):
            part = slice(start, start + x.shape[0])
            lloyd.account(x, part, self.labels[None, part], None, self.sums, counts)
        # A copy: moves write here, and the solution stays what is returned where they help nothing.
        self.centres = solution.centroids.to(torch.float64, copy=True)
        self._count()
        for cluster in self.mass.nonzero()[0]:
            self._centre(int(cluster))

    def improve(self, sweeps: int) -> tuple[int, int]:
        """Sweep so often at most, and until no row gains: how many moved, and how many sweeps are left."""
        moves = 0
        while sweeps > 0:
            sweeps -= 1
            made = self._sweep()
            if not made:
                break
            moves += made
            self._count()
        return moves, sweeps

    def _count(self) -> None:
        """Weights of the clusters, and their numbers of rows that have some, without what sums in float64 lose."""
        k = len(self.centres)
        counts = torch.bincount(self.labels, minlength=k).double()[None]
        self.mass = self.lloyd.masses(self.labels[None], counts, k)[0].cpu().numpy()
        heavy = self.labels if self.weights is None else self.labels[self.weights > 0]
        self.counts = torch.bincount(heavy, minlength=k).double().cpu().numpy()

    def _centre(self, cluster: int) -> None:
        self.centres[cluster] = self.sums[:, 0, cluster].sum(0) / self.mass[cluster]

    def _sweep(self) -> int:
        start = self._gaining(self._candidates())
        moves = 0
        for some in start.split(_FETCHED) if len(start) else ():
            x = self.source.take(some)
            for row, i in zip(x, some.tolist(), strict=True):
                moves += self._move(i, row)
        return moves

    def _candidates(self) -> torch.Tensor:
        """Rows that gain, or may gain for all that products in float64 tell: int64 (p,)."""
        d, device = self.source.shape[1], self.labels.device
        size, found = tile_rows(d, device), []
        moved = self.moments.frame.moved(self.centres)
        square = torch.linalg.vecdot(moved, moved)
        row2 = self.moments.dist2 * self.scale * self.scale
        error = gamma(d + math.ceil(d / size) + 16) * 4
        for start, x in self.source.chunks(size):
            part = slice(start, start + x.shape[0])
            dist2 = square + row2[part, None]
            for span in tiles(size, d, device):
                rows = self.moments.frame.moved(x[:, span], span)
                dist2.addmm_(rows, moved[:, span].t(), alpha=-2.0)
            slack = error * (row2[part].sqrt() + square.amax().sqrt()).square() + _PRETENDED * row2[part]
            saved, cost = self._balance(dist2.clamp_(min=0), part, slack[:, None])
            found.append((saved > cost.amin(1)).nonzero()[:, 0] + start)
        return torch.cat(found)

    def _gaining(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of these rows gain by the reference distance to the present centroids."""
        k, found = len(self.centres), [rows[:0]]
        for some in rows.split(_FETCHED) if len(rows) else ():
            which = torch.arange(k, device=rows.device).repeat(len(some))
            row = torch.arange(len(some), device=rows.device).repeat_interleave(k)
            dist2 = reference_dist2(self.source.take(some), self.centres, which, row).view(-1, k)
            saved, cost = self._balance(dist2 * self.scale * self.scale, some)
            found.append(some[saved > cost.amin(1)])
        return torch.cat(found)

    def _balance(
        self, dist2: torch.Tensor, rows: slice | torch.Tensor, slack: torch.Tensor | float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows (b,) save by leaving, float64 (b,), and what they cost in each cluster, (b, k); infinite in their
        own. Distances (b, k) are within ``slack``, which is taken in favour of the move."""
        own = self.labels[rows].long()[:, None]
        mass, counts = (torch.from_numpy(table).to(dist2.device) for table in (self.mass, self.counts))
        weight = dist2.new_ones(len(dist2), 1) if self.weights is None else self.weights[rows][:, None]
        cost = (dist2 - slack).clamp_(min=0) * (mass * weight / (mass + weight))
        left = mass[own] - weight
        factor = torch.where((counts[own] > 1) & (left > 0), mass[own] * weight / left, 0)
        saved = (dist2.gather(1, own) + slack) * factor
        return saved[:, 0], cost.nan_to_num_(0.0).scatter_(1, own, math.inf)

    def _move(self, i: int, row: torch.Tensor) -> bool:
        """Move row ``i`` to the cluster where it gains most, if it gains for certain."""
        old = int(self.labels[i])
        weight = 1.0 if self.weights is None else self.weights[i].item()
        mass = self.mass
        if self.counts[old] <= 1 or not mass[old] > weight:
            return False
        dist2 = reference_dist2(self.centres, row).mul_(self.scale).mul_(self.scale).cpu().numpy()
        factor = mass * weight / (mass + weight)
        factor[old] = mass[old] * weight / (mass[old] - weight)
        change = dist2 * factor
        others = change.copy()
        others[old] = math.inf
        new = int(others.argmin())
        pretended = _PRETENDED * (change[old] + change[new])
        for cluster in (old, new):
            delta = self._delta(cluster)
            pretended += 2 * factor[cluster] * (2 * math.sqrt(dist2[cluster]) * delta + delta * delta)
        if not change[old] - change[new] > pretended:
            return False
        terms = self.moments.grid.split(row.double()[None] * weight)
        for level, part in zip(self.sums[:, 0], terms, strict=True):
            level[old] -= part[0]
            level[new] += part[0]
        mass[old] -= weight
        mass[new] += weight
        self.counts[old] -= 1
        self.counts[new] += 1
        self.labels[i] = new
        self._centre(old)
        self._centre(new)
        return True

    def _delta(self, cluster: int) -> float:
        """How far a centre can be from the mean of its rows, times the scale."""
        if self.mass[cluster] == 0:
            return 0.0
        known = (self.counts[cluster], self.mass[cluster], self.far, self.far)
        return self.rounding.of(*torch.tensor(known, dtype=torch.float64, device="cpu")).item()
