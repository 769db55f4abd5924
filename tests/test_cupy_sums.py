"""Sums and counts of the CuPy backend have the bits of the torch backend."""

from __future__ import annotations

import pytest
import torch
from cases_cluster import rows
from cases_cupy import (
    Make,
)
from on_host import HostLauncher

from gpuclust.cluster.backends import cupy as cupy_backend
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.sums import Grid


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "d", "k", "r"), [(1, 1, 1, 1), (300, 5, 3, 2), (200, 300, 130, 1), (70, 131, 12, 3)])
def test_sums_and_counts_have_the_bits_of_the_torch_backend(
    n: int,
    d: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    weighted: bool,
    device: torch.device,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cupy_backend, "MOST_PARTS", 1 if weighted else 65535)
    random = torch.Generator().manual_seed(n)
    x = rows("relu", n, d, dtype).to(device)[:, ::1]
    weights = torch.rand(n, generator=random, dtype=torch.float64).to(device) if weighted else None
    grid = Grid.of(x.double().abs().amax(0), n, torch.float64 if weighted else dtype, 1e-3 if weighted else 1.0)
    old = torch.randint(k, (r, n + 4), generator=random, dtype=torch.int32).to(device)[:, 2 : n + 2]
    new = torch.where(torch.rand(r, n, generator=random).to(device) < 0.3, old.flip(1), old).contiguous()
    found = []
    for backend in (TorchBackend(), make()):
        sums = torch.zeros(grid.levels, r, k, d, dtype=torch.float64, device=device)
        counts = torch.zeros(r, k, dtype=torch.float64, device=device)
        changed = torch.full((r,), 2, dtype=torch.int64, device=device)
        backend.accumulate(x, weights, grid, old.contiguous(), None, sums, counts, changed)
        first = sums.clone(), counts.clone(), changed.clone()
        backend.accumulate(x, weights, grid, new, old, sums, counts, changed)
        assert torch.equal(changed - first[2], (new != old).sum(1))
        found.append((*first, sums, counts, changed))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)
        assert not bool(torch.signbit(got[got == 0]).any())


@pytest.mark.compiler
def test_few_clusters_are_summed_in_shared_memory_first_and_many_are_not() -> None:
    backend = CupyBackend(HostLauncher())
    x = rows("noise", 40, 3)
    for k, kernel in ((5, "first"), (200, "accumulate")):
        backend.launch.launched.clear()
        grid = Grid.of(x.abs().amax(0), 40, x.dtype)
        sums, counts = torch.zeros(grid.levels, 1, k, 3, dtype=torch.float64), torch.zeros(1, k, dtype=torch.float64)
        backend.accumulate(x, None, grid, torch.zeros(1, 40, dtype=torch.int32), None, sums, counts)
        assert backend.launch.launched == ["count", kernel]
