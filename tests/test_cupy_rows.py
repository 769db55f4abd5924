"""What the CuPy backend is asked of rows before and after the passes: the bits of plain torch operations."""

from __future__ import annotations

import pytest
import torch
from cases_cluster import KINDS, rows
from cases_contract import Case
from on_host import HostLauncher

from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.plain import Plain
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sums import Grid

SHAPES = [
    (1, 3, "plain"),
    (37, 300, "columns first"),
    (70, 1, "every other row"),
    (300, 33, "part of the columns"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def backend(device: torch.device) -> CupyBackend:
    return CupyBackend(HostLauncher(falling=True) if device.type == "cpu" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "layout"), SHAPES)
def test_largest_values_and_sums_of_columns(
    backend: CupyBackend, device: torch.device, n: int, d: int, layout: str, dtype: torch.dtype
) -> None:
    x = Case(n, d, 1, dtype, layout, "offset", 1, None).rows(str(device))
    largest = Plain().largest(x)
    assert torch.equal(backend.largest(x), largest)
    grid = Grid.of(largest, n, dtype)
    found, expected = torch.zeros(2, grid.levels, d, dtype=torch.float64, device=device)
    backend.total(x, grid, found)
    Plain().total(x, grid, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_passes_on(backend: CupyBackend, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(90, 4, dtype=dtype, device=device)
    x[80, 1], x[3, 2], x[70, 2], x[5, 3] = torch.nan, torch.inf, -torch.nan, -torch.inf
    one, two, three, four = backend.largest(x).tolist()
    assert (one, four) == (1.0, float("inf"))
    assert two != two
    assert three != three


# A warp and a block for a row; a tree that shared memory holds, and trees of subtrees.
@pytest.mark.parametrize("d", [1, 100, 256, 257, 1000, 4097, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances(backend: CupyBackend, device: torch.device, d: int, dtype: torch.dtype) -> None:
    n, k = 19, 4
    x = Case(n, d, 1, dtype, "part of the columns", "noise", 1, None).rows(str(device))
    centroids = torch.randn(k, d, generator=torch.Generator().manual_seed(0)).to(device)
    which = torch.arange(n, device=device) * 7 % k
    for given in (centroids, centroids.double() + 1e-9):
        assert torch.equal(backend.dist2(x, given, which), Plain().dist2(x, given, which))
        assert torch.equal(backend.dist2(x, given, which.int()), Plain().dist2(x, given, which))
        assert torch.equal(backend.dist2(x, given[1]), Plain().dist2(x, given[1]))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_moments(backend: CupyBackend, device: torch.device, kind: str) -> None:
    source = TensorSource(rows(kind, 211, 7).to(device))
    ours, plain = Moments.of(source, backend=backend), Moments.of(source)
    assert torch.equal(ours.mean, plain.mean)
    assert torch.equal(ours.dist2, plain.dist2)
    assert (ours.spread, ours.largest) == (plain.spread, plain.largest)
