"""What is asked before, between and after passes, in plain torch operations: for backends without kernels for it."""

from __future__ import annotations

import torch

from gpuclust.cluster import step
from gpuclust.cluster.exact import reference_dist2
from gpuclust.cluster.sources.base import block_rows
from gpuclust.cluster.sums import Grid


class Plain:
    """Part of a backend: `gpuclust.cluster.backends.base.Rows`, and the step after a pass."""

    advance = staticmethod(step.advance)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        largest = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for some in x.split(block_rows(x.shape[1], x.device)):
            # Apart: torch's aminmax of columns takes five times as long as both.
            torch.maximum(largest, torch.maximum(-some.amin(0), some.amax(0)).double(), out=largest)
        return largest

    def total(self, x: torch.Tensor, grid: Grid, sums: torch.Tensor) -> None:
        for some in x.split(block_rows(x.shape[1], x.device)):
            for level, terms in enumerate(grid.split(some.double())):
                sums[level] += terms.sum(0)

    def dist2(self, x: torch.Tensor, centroids: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        return reference_dist2(x, centroids, which)
