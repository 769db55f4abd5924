"""The torch backend: plain tensor operations on any device. It is the reference for every other backend.

One pass works on a chunk of rows and all restarts at once, scores stored as (restarts, k, rows) so that the
reductions over k run along contiguous memory. Products are summed over slices of `SLICE` features: the worst-case
error of a float32 sum grows with its length, so short sums that are then added keep the certified margin narrow for
any d.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpuclust.cluster.backends.base import SLICE, Candidates, Operand, Problem
from gpuclust.cluster.source import tile_rows, tiles
from gpuclust.cluster.sums import Grid

# Adding a row to a sum takes as long as that many rows times one column of a product with the matrix of memberships.
_PRODUCTS_PER_ADD = 16


class TorchBackend:
    """k-means steps as torch operations, on the CPU, CUDA, or any device that has float64."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return f"device {problem.device.type} has no float64" if problem.device.type in ("mps", "xla") else None

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, certify: bool
    ) -> Candidates | None:
        r, k, b = operand.restarts, operand.k, x.shape[0]
        flat = _scores(x, operand)
        scores = flat.view(r, k, b)
        if not certify:
            flat.add_(operand.high)
            labels.copy_(scores.argmin(1))
            return None
        reach = operand.slope * norms
        flat.add_(reach).add_(operand.high)
        least = scores.amin(1, keepdim=True)
        # What is left of the upper score less twice its bound is the lower score.
        flat.sub_(reach.mul_(2)).sub_(operand.high - operand.low)
        # Not "scores <= least": what is not a number must stay possible.
        possible = (scores > least).logical_not_().to(torch.float32)
        # Number of candidates and, where that is one, its index: both exact in float32 below 2**24 clusters.
        ones = torch.ones(k, device=x.device, dtype=torch.float32)
        index = torch.arange(k, device=x.device, dtype=torch.float32)
        found = torch.matmul(torch.stack([ones, index]), possible)
        labels.copy_(found[:, 1])
        row, restart = (found[:, 0] != 1).t().nonzero(as_tuple=True)
        which, centroid = possible[restart, :, row].nonzero(as_tuple=True)
        return Candidates(row[which], restart[which], centroid)

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


def _scores(x: torch.Tensor, operand: Operand) -> torch.Tensor:
    """x^ . matrix as float32 (r * k, b), each slice of features summed apart."""
    total: torch.Tensor | None = None
    for start in range(0, x.shape[1], SLICE):
        end = start + SLICE
        block = x[:, start:end]
        if operand.shift is not None:
            block = (block.to(operand.shift.dtype) * operand.scale).sub_(operand.shift[start:end]).float()
        product = torch.mm(operand.matrix[:, start:end], block.t())
        total = product if total is None else total.add_(product)
    assert total is not None
    return total
