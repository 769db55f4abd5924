"""What follows a pass has the bits of `gpuclust.cluster.step` in every backend: who ends, means, movements."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from on_host import HostLauncher

from gpuclust.cluster import step
from gpuclust.cluster.backends.base import Backend
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.step import EMPTY, ENDED, MOVES, Course, Limits
from gpuclust.cluster.sums import joined, tree_sum

SHAPES = [(1, 1, 1, 1), (3, 1, 5, 1), (2, 7, 1, 2), (4, 5, 300, 2), (1, 1030, 3, 1), (2, 3, 1025, 3), (1, 2, 5000, 1)]


@pytest.fixture(
    params=[
        pytest.param("torch", id="torch"),
        pytest.param("rising", marks=pytest.mark.compiler),
        pytest.param("falling", marks=pytest.mark.compiler),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.nvrtc]),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "torch":
        return TorchBackend()
    return CupyBackend(None if request.param == "cuda" else HostLauncher(falling=request.param == "falling"))


def on(backend: Backend) -> torch.device:
    cuda = isinstance(backend, CupyBackend) and not isinstance(backend.launch, HostLauncher)
    return torch.device("cuda" if cuda else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("r", "k", "d", "levels"), SHAPES)
def test_means_are_divided_and_rounded_once_and_movements_summed_in_trees(
    r: int, k: int, d: int, levels: int, dtype: torch.dtype, backend: Backend
) -> None:
    random, device = torch.Generator().manual_seed(d), on(backend)
    masses = torch.randint(1, 50, (r, k), generator=random).double() / (1 if levels == 1 else 7)
    sums = torch.randn(levels, r, k, d, generator=random, dtype=torch.float64) * 40
    sums[1:] *= 2.0**-40
    sums[0, :, :, : d // 3] *= 2.0**-1060  # subnormal
    before = torch.randn(r, k, d, generator=random, dtype=torch.float64).to(dtype)
    course = Course(
        torch.zeros(r, dtype=torch.int64, device=device),
        torch.full((r,), 3, device=device),
        torch.zeros(r, dtype=torch.bool, device=device),
    )
    centroids = before.to(device, copy=True)
    changed = torch.ones(r, dtype=torch.int64, device=device)
    report = backend.advance(course, changed, masses.to(device), sums.to(device), centroids, Limits(9, 0.0)).cpu()
    means = (joined(sums) / masses[..., None]).to(dtype)
    ways = tree_sum((means.double() - before.double()).square().view(r * k, d)).view(r, k)
    assert torch.equal(centroids.cpu(), means)
    assert report.tolist() == [[1.0, shift] for shift in tree_sum(ways).tolist()]
    assert (course.does.tolist(), course.passes.tolist(), course.closing.tolist()) == ([0] * r, [4] * r, [False] * r)


def test_who_ends_waits_or_goes_on(backend: Backend) -> None:
    device, k, d = on(backend), 600, 3
    cases = list(product((MOVES, ENDED, EMPTY), (False, True), (0, 5), (False, True), (3, 4), (0.0, 1e30)))
    for tol in (0.0, 1e30):
        some = [case for case in cases if case[-1] == tol]
        does, closing, changed, empty, passes, _ = (torch.tensor(part) for part in zip(*some, strict=True))
        r = len(some)
        masses = torch.ones(r, k, dtype=torch.float64)
        masses[empty, (torch.arange(r) * 7 % k)[empty]] = 0
        sums = torch.arange(1.0 * r * k * d, dtype=torch.float64).view(1, r, k, d)
        before = torch.zeros(r, k, d)
        course = Course(does.to(device), passes.to(device), closing.to(device))
        centroids = before.to(device, copy=True)
        given = course, changed.to(device), masses.to(device), sums.to(device), centroids, Limits(5, tol)
        report = backend.advance(*given).cpu()
        for i, (was, close, moved, without, passed, _) in enumerate(some):
            moves = was == MOVES
            end = moves and (close or not moved)
            wait = moves and not end and without
            steps = moves and not end and not wait
            assert course.does[i] == (ENDED if end else EMPTY if wait else was)
            assert course.passes[i] == passed + moves
            assert course.closing[i] == ((tol > 0 or passed + 1 >= 5) if steps else close)
            assert report[i, 0] == steps
            assert (report[i, 1] > 0) == steps
            assert torch.equal(centroids[i].cpu(), sums[0, i].float() if steps else before[i])


def test_a_cluster_without_weight_stays_where_it_is() -> None:
    centroids, masses = torch.ones(1, 2, 3), torch.tensor([[0.0, 4.0]], dtype=torch.float64)
    sums = torch.full((1, 1, 2, 3), 8.0, dtype=torch.float64)
    shift = step.move(centroids, sums, masses, torch.ones(1, dtype=torch.bool))
    assert centroids[0].tolist() == [[1.0] * 3, [2.0] * 3]
    assert shift.tolist() == [3.0]


def test_sums_of_any_strides_are_read_where_they_lie(backend: Backend) -> None:
    device = on(backend)
    whole = torch.randn(2, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for sums in (whole[:, 1::2], whole[:, 1::2].contiguous()):
        centroids, flags = torch.zeros(2, 4, 6, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        course = Course(flags, flags.clone(), flags.bool())
        masses = torch.full((2, 4), 3.0, dtype=torch.float64, device=device)
        report = backend.advance(course, flags + 1, masses, sums, centroids, Limits(9, 0.0))
        found.append((centroids, report))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
