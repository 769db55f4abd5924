"""What the CuPy backend is asked of rows before and after the passes, as kernels that read the rows once."""

from __future__ import annotations

from typing import Any

import torch

from gpuclust.cluster.backends.tile import MOST_PARTS, blocks
from gpuclust.cluster.sums import Grid

_ROW = {torch.float16: "Float16", torch.bfloat16: "BFloat16", torch.float32: "float", torch.float64: "double"}
# Of centroids.
WIDE = {torch.float32: "float", torch.float64: "double"}
_THREADS = 256
# Wider rows are summed by a block each, others by a warp; as in the kernel.
_NARROW = 4096


class RowKernels:
    """Part of the backend: `gpuclust.cluster.backends.base.Rows`."""

    launch: Any

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        n, d = x.shape
        double = x.dtype == torch.float64
        bits = torch.zeros(d, dtype=torch.int64 if double else torch.int32, device=x.device)
        spans = min(blocks(d, _THREADS), MOST_PARTS)
        rows = max(16, blocks(n, max(1, 8 * self.launch.blocks(x.device) // spans)))
        self.launch(
            x.device,
            "largest.cu",
            self._options(x),
            "largest",
            (blocks(n, rows), spans),
            _THREADS,
            0,
            *strided(x),
            rows,
            bits,
        )
        return bits.view(torch.float64 if double else torch.float32).double()

    def total(self, x: torch.Tensor, grid: Grid, sums: torch.Tensor) -> None:
        one = torch.zeros(1, x.shape[0], dtype=torch.int32, device=x.device)
        self.accumulate(x, None, grid, one, None, sums[:, None, None], sums.new_zeros(1, 1))  # type: ignore[attr-defined]

    def dist2(self, x: torch.Tensor, centroids: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        n, d = x.shape
        centroids = wide(centroids)
        which = None if which is None else which.int().contiguous()
        out = torch.empty(n, dtype=torch.float64, device=x.device)
        group = 32 if d <= _NARROW else _THREADS
        grid = min(blocks(n, _THREADS // group), 4 * self.launch.blocks(x.device))
        given = (*self._options(x), f"-DGROUP={group}", f"-DCENTRE={WIDE[centroids.dtype]}")
        self.launch(
            x.device,
            "dist2.cu",
            given,
            "dist2",
            (grid, 1),
            _THREADS,
            0,
            *strided(x),
            centroids,
            which,
            out,
        )
        return out

    @staticmethod
    def _options(x: torch.Tensor) -> tuple[str, ...]:
        """For the compiler."""
        return (f"-DROW={_ROW[x.dtype]}",)


def wide(centroids: torch.Tensor) -> torch.Tensor:
    """Centroids as kernels take them; those of a fitted model may be of another type than its rows' would be."""
    return (centroids if centroids.dtype in WIDE else centroids.float()).contiguous()


def strided(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """Rows as every kernel takes them."""
    return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
