"""The torch backend: plain tensor operations on any device. It is the reference for every other backend.

One pass works on a chunk of rows and all restarts at once, scores stored as (restarts, k, rows) so that the reductions over
k run along contiguous memory. Products are summed over slices of `SLICE` features: the worst-case error of a float32 sum
grows with its length, so short sums that are then added keep the certified margin narrow for any d.
"""

from __future__ import annotations

import torch

from gpuclust.cluster.backends.base import Candidates, Operand, Problem
from gpuclust.cluster.sums import Grid

SLICE = 1024
# Above this many clusters in all, adding rows one by one beats a product with the matrix of memberships.
_PRODUCT_CLUSTERS = 256
# Values that are held as float64 at a time.
_BLOCK = 1 << 20


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
        scores = _scores(x, operand).view(r, k, b)
        if not certify:
            scores += operand.high.view(r, k, 1)
            labels.copy_(scores.argmin(1))
            return None
        reach = operand.slope * norms
        scores += operand.high
        scores.view(r * k, b).add_(reach)
        least = scores.amin(1, keepdim=True)
        # What is left of the upper score less twice its bound is the lower score.
        scores.view(r * k, b).sub_(reach.mul_(2).add_(operand.high - operand.low))
        # Not "scores <= least": what is not a number must stay possible.
        possible = (scores > least).logical_not_().to(torch.float32)
        # Number of candidates and, where that is one, its index: both exact in float32 below 2**24 clusters.
        ones = torch.ones(k, device=x.device)
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
        offset = torch.arange(r, device=x.device)[:, None] * k
        signed = [(plus.long() + offset, 1.0)]
        if minus is not None:
            signed.append((minus.long() + offset, -1.0))
        for cluster, sign in signed:
            ones = torch.full((cluster.numel(),), sign, dtype=counts.dtype, device=x.device)
            counts.view(-1).index_add_(0, cluster.reshape(-1), ones)
        member = None
        if r * k <= _PRODUCT_CLUSTERS:
            member = torch.zeros(r * k, x.shape[0], dtype=torch.float64, device=x.device)
            for cluster, sign in signed:
                member.scatter_add_(0, cluster, torch.full_like(cluster, sign, dtype=torch.float64))
        width = max(64, _BLOCK // x.shape[0])
        for start in range(0, x.shape[1], width):
            values = x[:, start : start + width].double()
            if weights is not None:
                values *= weights[:, None]
            for total, part in zip(sums, grid.split(values, start), strict=True):
                target = total.view(r * k, -1)[:, start : start + width]
                if member is not None:
                    target.addmm_(member, part)
                    continue
                for cluster, sign in signed:
                    for restart in range(r):
                        target.index_add_(0, cluster[restart], part, alpha=sign)


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
