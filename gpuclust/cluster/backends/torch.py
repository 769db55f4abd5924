"""The torch backend: plain tensor operations on any device. It is the reference for every other backend.

One pass works on a chunk of rows and all restarts at once, scores stored as (restarts, k, rows) so that reductions over
k add and compare whole vectors of rows: those are a torch CPU's fast ones (0.05 ns a score; its argmin takes 17).
Products are summed over slices of `SLICE` features: the worst-case error of a float32 sum grows with its length, so
short sums that are then added keep the certified margin narrow for any d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from gpuclust.cluster.backends.base import SLICE, Bounded, Candidates, Operand, Problem
from gpuclust.cluster.backends.plain import Plain
from gpuclust.cluster.exact import Frame, decide
from gpuclust.cluster.sources.base import chunk_rows, piece_rows, tile_rows, tiles
from gpuclust.cluster.sums import Grid

# Adding a row to a sum takes as long as that many rows times one column of a product with the matrix of memberships.
_PRODUCTS_PER_ADD = 16
# Copying a slice of the rows costs little where there are so many centroids for each of its features.
_COPIED = 2
# Centroids of a group, where there are many: the trip over all scores keeps one value for each group.
_GROUP = 16


class TorchBackend(Plain):
    """k-means steps as torch operations, on the CPU, CUDA, or any device that has float64."""

    name = "torch"
    waits = True

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return f"device {problem.device.type} has no float64" if problem.device.type in ("mps", "xla") else None

    def reserved(self, problem: Problem) -> str | None:
        return None

    def chunk_rows(self, r: int, k: int, d: int, device: torch.device) -> int:
        return chunk_rows(r * k, d, device, r)

    def prepare(self, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Operand:
        return frame.operand(centroids, dtype)

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, precision: str
    ) -> torch.Tensor:
        assert isinstance(operand, Bounded)
        candidates = propose(x, norms, operand, labels)
        if precision == "fast":
            return torch.zeros((), dtype=torch.int64, device=x.device)
        return decide(x, operand.centroids, candidates, labels)

    def accumulate(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        grid: Grid,
        plus: torch.Tensor,
        minus: torch.Tensor | None,
        sums: torch.Tensor,
        counts: torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        r, k = counts.shape
        moved = torch.ones_like(plus, dtype=torch.bool) if minus is None else plus != minus
        if changed is not None:
            changed += moved.sum(1)
        row, restart = rows_of(moved)
        if row.numel() == 0:
            return
        base = restart * k
        signed = [(1.0, plus[restart, row] + base)]
        if minus is not None:
            signed.append((-1.0, minus[restart, row] + base))
        for sign, cluster in signed:
            counts.view(-1).index_add_(0, cluster, torch.full_like(row, sign, dtype=torch.float64))

        target = sums.view(len(sums), r * k, -1)
        moved, column = row.unique_consecutive(return_inverse=True)
        member: torch.Tensor | None = None
        if len(signed) * row.numel() * _PRODUCTS_PER_ADD >= moved.numel() * r * k:
            member = torch.zeros(r * k, moved.numel(), dtype=torch.float64, device=x.device)
            for sign, cluster in signed:
                member[cluster, column] = sign
        every = moved.numel() == len(x)
        for part, span in _tiles(moved.numel(), x):
            terms = _terms(x, part if every else moved[part], span, weights, grid)
            if member is not None:
                for level, values in enumerate(terms):
                    target[level, :, span].addmm_(member[:, part], values)
                continue
            # Where the rows of the part begin and end among those of all restarts.
            pairs = slice(*torch.searchsorted(column, column.new_tensor([part.start, part.stop])).tolist())
            for level, values in enumerate(terms):
                values = values.index_select(0, column[pairs] - part.start)
                for sign, cluster in signed:
                    target[level, :, span].index_add_(0, cluster[pairs], values if sign > 0 else values.neg_())


def propose(x: torch.Tensor, norms: torch.Tensor, operand: Bounded, labels: torch.Tensor) -> Candidates:
    """Label the rows (b, d) of a chunk by their least scores in float32, ``labels`` (r, b); and what is not certain.

    First, piece by piece, with one bound per row, the largest of its centroids', in few trips over the scores; then,
    for the few rows that it leaves open, with the bound of each centroid.
    """
    r, k, d = operand.centroids.shape
    # With groups most trips are over a part of the scores: then fewer pieces are worth a larger one.
    size = min(len(x), piece_rows(r * k, d, x.device) * (2 if k >= 4 * _GROUP else 1))
    look = Look(operand, size, x.device)
    left = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        row, restart, scores = look(x[part], norms[part], labels[:, part])
        left.append((row + start, restart, scores))
    row, restart, scores = (torch.cat(parts) for parts in zip(*left, strict=True))
    bound = look.slope[restart, :, 0] * norms[row, None] + look.margin[restart, :, 0]
    # Not "<=": what is not a number must stay possible.
    possible = (scores - bound > (scores + bound).amin(1, keepdim=True)).logical_not_()
    # Where one is left it is the one of the least score.
    which, centroid = possible.logical_and_((possible.sum(1) != 1)[:, None]).nonzero(as_tuple=True)
    return Candidates(row[which], restart[which], centroid)


class Look:
    """The first look at pieces of at most ``size`` rows: what is the same for all of them, and memory for the scores.

    A fresh tensor for the scores of each piece would cost more than the scores: its pages come from the system.
    """

    def __init__(self, operand: Bounded, size: int, device: torch.device) -> None:
        self.operand = operand
        r, k = operand.centroids.shape[:2]
        high, low, self.slope = (part.view(r, k, 1) for part in (operand.high, operand.low, operand.slope))
        self.margin = (high - low) / 2
        self.bias = (high - self.margin).view(r * k, 1)
        self.most = self.slope.amax(1, keepdim=True), self.margin.amax(1, keepdim=True)
        self.index = torch.arange(k, device=device, dtype=torch.float32)[:, None]
        self.scores, self.work = (torch.empty(r * k * size, dtype=torch.float32, device=device) for _ in range(2))
        self.seen = None
        width = min(operand.matrix.shape[1], SLICE)
        if r * k >= _COPIED * width:
            # The bias as one more product, with a 1 at the end of each row: a trip over the scores less.
            self.matrix = torch.cat([operand.matrix[:, :width], self.bias], 1)
            self.seen = torch.ones(size, width + 1, dtype=torch.float32, device=device)

    def __call__(
        self, x: torch.Tensor, norms: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Label the rows (b, d): the row, the restart (p,) and the scores (p, k) of each label that is not certain."""
        r, k, _ = self.operand.centroids.shape
        b = len(x)
        scores = self.score(x).view(r, k, b)
        slope, margin = self.most
        reach = (slope * norms + margin) * (2 + 2.0**-18)
        if k < 4 * _GROUP:
            work = self.work[: r * k * b].view(r, k, b)
            label, within = self._least(scores.sub_(scores.amin(1, keepdim=True)), reach, work)
        else:
            # One trip finds the least of each group; what follows looks at groups, then into the one of the least.
            whole = k // _GROUP * _GROUP
            groups = scores[:, :whole].unflatten(1, (-1, _GROUP)).amin(2)
            if whole < k:
                groups = torch.cat([groups, scores[:, whole:].amin(1, keepdim=True)], 1)
            least = groups.amin(1, keepdim=True)
            group, alone = self._least(groups.sub_(least), reach)
            inside = group[:, None] * _GROUP + self.index[:_GROUP]
            some = scores.gather(1, inside.clamp(max=k - 1).long())
            label, within = self._least(some.sub_(least).masked_fill_(inside >= k, math.inf), reach)
            label += group * _GROUP
            within = torch.maximum(within, alone)
        labels.copy_(label)
        # Not ">=": what is not a number stays open.
        row, restart = rows_of((within < reach[:, 0] * (1 + 2.0**-21)).logical_not_())
        return row, restart, scores[restart, :, row]

    def least(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least of scores (r, k, b), and its first index, as float32 (r, b)."""
        least, work = scores.amin(1, keepdim=True), self.work[: scores.numel()].view_as(scores)
        return least[:, 0], self._first(torch.sub(scores, least, out=work), work)

    def _least(
        self, above: torch.Tensor, reach: torch.Tensor, work: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first index of the least of scores less their least, (r, m, b), and how much is within ``reach`` of it.

        The least itself counts as ``reach`` and any other as at least 2**-20 of that: float32 (r, b), ``reach`` where
        it is alone, and no number where a score is none.
        """
        work = torch.empty_like(above) if work is None else work
        return self._first(above, work), torch.sub(reach, above, out=work).clamp_(min=0).sum(1)

    def _first(self, above: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
        """The first index of zero in what scores (r, m, b) are above their least, and 0 without one: float32 (r, b)."""
        # What is above the least becomes huge, so that the least of these is the first index of the least score.
        return torch.add(self.index[: above.shape[1]], above, alpha=2.0**126, out=work).amin(1).nan_to_num_(0.0, 0.0)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """bias + x^ . matrix as float32 (r * k, b), each slice of features summed apart."""
        operand, (b, d) = self.operand, x.shape
        size = len(operand.matrix) * b
        total, product = self.scores[:size].view(-1, b), self.work[:size].view(-1, b)
        for start in range(0, d, SLICE):
            end = start + SLICE
            block = x[:, start:end]
            if operand.shift is not None:
                block = (block.to(operand.shift.dtype) * operand.scale).sub_(operand.shift[start:end]).float()
            matrix = operand.matrix[:, start:end]
            if start == 0 and self.seen is not None:
                self.seen[:b, :-1] = block
                torch.mm(self.matrix, self.seen[:b].t(), out=total)
            elif start == 0:
                torch.addmm(self.bias, matrix, block.t(), out=total)
            else:
                total += torch.mm(matrix, block.t(), out=product)
        return total


def places(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask (m,) is true, int64, in order."""
    # On a CPU NumPy takes a fifth of the time.
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def rows_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a mask (r, b) is true: row and restart, int64 (p,), sorted by row, then restart."""
    if len(mask) == 1:
        row = places(mask[0])
        return row, torch.zeros_like(row)
    pair = places(mask.t().flatten())
    row = pair.div(len(mask), rounding_mode="floor")
    return row, pair - row * len(mask)


def _tiles(count: int, x: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """So many rows and the features of ``x`` in blocks that are cheap to hold as float64."""
    size = min(count, tile_rows(x.shape[1], x.device))
    for span in tiles(size, x.shape[1], x.device):
        for start in range(0, count, size):
            yield slice(start, start + size), span


def _terms(
    x: torch.Tensor, rows: slice | torch.Tensor, span: slice, weights: torch.Tensor | None, grid: Grid
) -> list[torch.Tensor]:
    """Some rows, a span of their features, as the sums take them: per level, float64 (rows, w) on the grid."""
    values = (x[rows, span] if isinstance(rows, slice) else x[:, span].index_select(0, rows)).double()
    if weights is not None:
        values = values * weights[rows, None]  # not in place: they may be X's own
    return grid.split(values, span.start)
