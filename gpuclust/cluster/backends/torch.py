"""The torch backend: plain tensor operations on any device. It is the reference for every other backend.

One pass works on a chunk of rows and all restarts at once, scores stored as (restarts, k, rows) so that reductions over
k add and compare whole vectors of rows: those are a torch CPU's fast ones (0.05 ns a score; its argmin takes 17).
Products are summed over slices of `SLICE` features: the worst-case error of a float32 sum grows with its length, so
short sums that are then added keep the certified margin narrow for any d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gpuclust.cluster.backends.base import SLICE, Candidates, Operand, Problem
from gpuclust.cluster.exact import Frame, decide
from gpuclust.cluster.sources.base import chunk_rows, piece_rows, tile_rows, tiles
from gpuclust.cluster.sums import Grid

# Adding a row to a sum takes as long as that many rows times one column of a product with the matrix of memberships.
_PRODUCTS_PER_ADD = 16
# Centroids of a group, where there are many: the trip over all scores keeps one value for each group.
_GROUP = 16


class TorchBackend:
    """k-means steps as torch operations, on the CPU, CUDA, or any device that has float64."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return f"device {problem.device.type} has no float64" if problem.device.type in ("mps", "xla") else None

    def reserved(self, problem: Problem) -> str | None:
        return None

    def chunk_rows(self, r: int, k: int, d: int, device: torch.device, memory_limit: int | None = None) -> int:
        return chunk_rows(r * k, d, device, memory_limit)

    def prepare(self, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Operand:
        return frame.operand(centroids, dtype)

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, precision: str
    ) -> torch.Tensor:
        r, k, d = operand.centroids.shape
        size = piece_rows(r * k, d, x.device)
        found = []
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            row, restart, centroid = propose(x[part], norms[part], operand, labels[:, part])
            found.append(Candidates(row + start, restart, centroid))
        candidates = Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))
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
    ) -> None:
        r, k = counts.shape
        changed = torch.ones_like(plus, dtype=torch.bool) if minus is None else plus != minus
        row, restart = changed.t().nonzero(as_tuple=True)
        if row.numel() == 0:
            return
        cluster, sign = plus[restart, row] + restart * k, torch.ones_like(row, dtype=torch.float64)
        if minus is not None:
            cluster = torch.cat([cluster, minus[restart, row] + restart * k])
            sign = torch.cat([sign, -sign])
            row = row.repeat(2)
        counts.view(-1).index_add_(0, cluster, sign)

        target = sums.view(len(sums), r * k, -1)
        moved = row[: sign.numel() if minus is None else sign.numel() // 2].unique_consecutive()
        if row.numel() * _PRODUCTS_PER_ADD < moved.numel() * r * k:
            for part, span in _tiles(row.numel(), x):
                for level, terms in enumerate(_terms(x, row[part], span, weights, grid)):
                    target[level, :, span].index_add_(0, cluster[part], terms.mul_(sign[part, None]))
            return
        column = torch.searchsorted(moved, row)
        member = torch.zeros(r * k, moved.numel(), dtype=torch.float64, device=x.device)
        member[cluster, column] = sign
        for part, span in _tiles(moved.numel(), x):
            for level, terms in enumerate(_terms(x, moved[part], span, weights, grid)):
                target[level, :, span].addmm_(member[:, part], terms)


def propose(x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor) -> Candidates:
    """Label the rows (b, d) of a chunk by their least scores in float32, ``labels`` (r, b); and what is not certain.

    First with one bound per row, the largest of its centroids', in few trips over the scores; then, for the few rows
    that it leaves open, with the bound of each centroid.
    """
    r, k, _ = operand.centroids.shape
    high, low, slope = (part.view(r, k, 1) for part in (operand.high, operand.low, operand.slope))
    margin = (high - low) / 2
    scores = _scores(x, operand, operand.high - margin.view(-1, 1)).view(r, k, -1)
    reach = (slope.amax(1, keepdim=True) * norms + margin.amax(1, keepdim=True)) * (2 + 2.0**-18)
    if k < 4 * _GROUP:
        label, within = _least(scores, scores.amin(1, keepdim=True), reach)
    else:
        # One trip finds the least of each group; what follows looks at groups, then into the one of the least.
        whole = k // _GROUP * _GROUP
        groups = scores[:, :whole].unflatten(1, (-1, _GROUP)).amin(2)
        if whole < k:
            groups = torch.cat([groups, scores[:, whole:].amin(1, keepdim=True)], 1)
        least = groups.amin(1, keepdim=True)
        group, alone = _least(groups, least, reach)
        inside = (group[:, None] * _GROUP).long() + torch.arange(_GROUP, device=x.device)[:, None]
        some = scores.gather(1, inside.clamp(max=k - 1))
        label, within = _least(some.masked_fill_(inside >= k, math.inf), least, reach)
        label += group * _GROUP
        within = torch.maximum(within, alone)
    labels.copy_(label)
    # Not ">=": what is not a number stays open.
    row, restart = (within < reach[:, 0] * (1 + 2.0**-21)).logical_not_().t().nonzero(as_tuple=True)
    if row.numel() == 0:
        return Candidates(row, restart, row)
    some = scores[restart, :, row]
    bound = slope[restart, :, 0] * norms[row, None] + margin[restart, :, 0]
    possible = (some - bound > (some + bound).amin(1, keepdim=True)).logical_not_()
    # Where one is left it is the one of the least score.
    which, centroid = possible.logical_and_((possible.sum(1) != 1)[:, None]).nonzero(as_tuple=True)
    return Candidates(row[which], restart[which], centroid)


def _least(scores: torch.Tensor, least: torch.Tensor, reach: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index of the ``least`` (r, 1, b) of scores (r, m, b), and how much of them is within ``reach`` of it.

    The least itself counts as ``reach`` and any other as at least 2**-20 of that: float32 (r, b), ``reach`` where it is
    alone, and no number where a score is none.
    """
    above = scores - least
    # What is above the least becomes huge, so that the least of these is the first index of the least score.
    index = torch.arange(scores.shape[1], device=scores.device, dtype=torch.float32)[:, None]
    work = torch.add(index, above, alpha=2.0**126)
    first = work.amin(1).nan_to_num_(0.0, 0.0)
    return first, torch.sub(reach, above, out=work).clamp_(min=0).sum(1)


def _tiles(count: int, x: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """So many rows and the features of ``x`` in blocks that are cheap to hold as float64."""
    size = min(count, tile_rows(x.shape[1], x.device))
    for span in tiles(size, x.shape[1], x.device):
        for start in range(0, count, size):
            yield slice(start, start + size), span


def _terms(
    x: torch.Tensor, rows: torch.Tensor, span: slice, weights: torch.Tensor | None, grid: Grid
) -> list[torch.Tensor]:
    """The chosen rows, a span of their features, as the sums take them: per level, float64 (rows, w) on the grid."""
    values = x[:, span].index_select(0, rows).double()
    if weights is not None:
        values *= weights[rows, None]
    return grid.split(values, span.start)


def _scores(x: torch.Tensor, operand: Operand, bias: torch.Tensor) -> torch.Tensor:
    """bias + x^ . matrix as float32 (r * k, b), each slice of features summed apart."""
    total: torch.Tensor | None = None
    for start in range(0, x.shape[1], SLICE):
        end = start + SLICE
        block = x[:, start:end]
        if operand.shift is not None:
            block = (block.to(operand.shift.dtype) * operand.scale).sub_(operand.shift[start:end]).float()
        matrix = operand.matrix[:, start:end]
        total = torch.addmm(bias, matrix, block.t()) if total is None else total.add_(torch.mm(matrix, block.t()))
    assert total is not None
    return total
