"""The CuPy backend against the torch backend and the reference distance: on a GPU, and its kernels on a processor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, mislabelled, rows
from cases_contract import far
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import HostLauncher

from gpuclust.cluster import fit
from gpuclust.cluster.backends import choose, survey
from gpuclust.cluster.backends import cupy as cupy_backend
from gpuclust.cluster.backends import tile as tile_choice
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.cupy import CupyBackend, Looks
from gpuclust.cluster.backends.tile import Tile
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sums import Grid
from gpuclust.errors import UnavailableError
from gpuclust.kernels.launch import Launcher, architecture

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Shared memory that no tile of assign.cu fits in: torch multiplies; and that the larger tile of streamed rows does not.
TOO_LITTLE, LITTLE = 9 << 10, 81 << 10
# What a block can ask for.
H100, A100, L4 = 227 << 10, 163 << 10, 99 << 10
# Width and backend for each way of the first look: resident rows, a matrix product, streamed rows, Hopper's products.
HOPPER = {"hopper": True}
NARROW = [{}, {"shared_bytes": TOO_LITTLE}, HOPPER]
WAYS: list[tuple[int, dict[str, Any]]] = [*((3, way) for way in NARROW), (1030, {"shared_bytes": LITTLE})]

Make = Callable[..., CupyBackend]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.compiler),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.nvrtc]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def make(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Backends of the device: with so much shared memory, on a processor with threads in falling order, for Hopper."""

    def made(shared_bytes: int | None = None, falling: bool = False, hopper: bool = False) -> CupyBackend:
        if device.type == "cpu":
            # Torch multiplies float16 into float32 on CUDA only.
            monkeypatch.setattr(cupy_backend, "multiplied", lambda a, b: a.float() @ b.float())
            return CupyBackend(HostLauncher(shared_bytes or (H100 if hopper else A100), falling, hopper))
        launcher = Launcher()
        if hopper and not launcher.hopper(device):
            pytest.skip("the products of warpgroups need compute capability 9.0")
        monkeypatch.setattr(launcher, "hopper", lambda _: hopper)
        # As many as on the processor: a few small tiles are then enough for streaming.
        monkeypatch.setattr(launcher, "multiprocessors", lambda _: 3)
        if shared_bytes:
            monkeypatch.setattr(launcher, "shared_memory_bytes", lambda _: shared_bytes)
        return CupyBackend(launcher)

    return made


def assigned(
    backend: Any, x: torch.Tensor, centroids: torch.Tensor, spoil: Callable[[Looks], Looks] | None = None, **known: Any
) -> tuple[torch.Tensor, int]:
    """Labels (r, n) of centroids (r, k, d), and how many the reference distance decided."""
    moments = Moments.of(TensorSource(x))
    operand = backend.prepare(moments.frame, centroids, x.dtype)
    operand = operand if spoil is None else spoil(operand)
    # Unwritten labels would be seen: they are a view, between others that must stay.
    held = torch.full((len(centroids), len(x) + 2), -7, dtype=torch.int32, device=x.device)
    norms = known.get("norms", moments.frame.norms(moments.dist2))
    count = backend.assign(x, norms, operand, held[:, 1:-1], known.get("precision", "exact"))
    assert count.dtype == torch.int64
    assert count.device == x.device
    assert bool((held[:, [0, -1]] == -7).all())
    return held[:, 1:-1].cpu(), int(count)


class Spy:
    """A launcher that keeps how many rows each first look left open, and the list that the second left."""

    def __init__(self, launcher: Any) -> None:
        self.launcher, self.opened, self.kernels = launcher, list[torch.Tensor](), list[str]()
        self.left, self.decides = list[tuple[torch.Tensor, ...]](), True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def __call__(self, device: torch.device, file: str, options: Any, kernel: str, *rest: Any) -> None:
        if kernel == "rescore":
            self.opened.append(rest[-5].clone())
        self.kernels.append(kernel)
        if kernel == "decide":
            self.left.append(tuple(part.cpu().clone() for part in rest[-3:]))
            if not self.decides:
                return
        self.launcher(device, file, options, kernel, *rest)


def line(operand: Looks, j: int) -> tuple[Any, ...]:
    """Where centroid ``j`` of the first restart is in ``padded``."""
    columns = operand.tile.columns
    return (0, j // columns, slice(None), j % columns) if operand.tile.stages else (0, j)


def all_open(operand: Looks) -> Looks:
    """Every row gets a second look."""
    return replace(operand, terms=torch.full_like(operand.terms, math.nan))


def seeds(x: torch.Tensor, r: int, k: int) -> torch.Tensor:
    """Centroids (r, k, d) near rows and between them."""
    generator = torch.Generator().manual_seed(k)
    chosen = torch.stack([x[torch.randperm(len(x), generator=generator)[:k].to(x.device)] for _ in range(r)])
    chosen = chosen.to(centroid_dtype(x.dtype))
    return chosen * 0.7 + chosen.flip(1) * 0.3


# ---- labels


@pytest.mark.parametrize("way", NARROW, ids=["fused", "wide", "hopper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_are_exact_for_every_kind_of_rows(
    dtype: torch.dtype, way: dict[str, Any], device: torch.device, make: Make
) -> None:
    backend = make(**way)
    decided = 0
    for kind in KINDS:
        n = 60 if kind == "one far row" else 150  # the reference distance decides all of its rows
        x = rows(kind, n, 37, dtype).to(device)
        centroids = torch.stack([x[:11], x[11:22]]).to(centroid_dtype(dtype))
        labels, count = assigned(backend, x, centroids)
        expected, _ = assigned(TorchBackend(), x, centroids)
        assert [mislabelled(labels[i], x, centroids[i]) for i in range(2)] == [0, 0], kind
        assert torch.equal(labels, expected), kind
        decided += count
    assert decided > 0


SHAPES = [
    (1, 1, 1, 1, "noise", torch.float32),
    (130, 1, 5, 2, "noise", torch.float32),
    (129, 33, 64, 2, "near ties", torch.float32),
    (200, 64, 150, 1, "blobs", torch.float32),
    (65, 31, 65, 2, "duplicates", torch.float64),
    (70, 500, 33, 1, "relu", torch.float16),
    (70, 900, 7, 1, "offset", torch.float32),
    (66, 1030, 3, 1, "relu", torch.bfloat16),
    (40, 5000, 7, 2, "blobs", torch.float32),
    (20, 70_001, 3, 1, "near ties", torch.float32),
]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize(("n", "d", "k", "r", "kind", "dtype"), SHAPES, ids=str)
def test_labels_are_exact_for_every_shape(
    n: int, d: int, k: int, r: int, kind: str, dtype: torch.dtype, falling: bool, device: torch.device, make: Make
) -> None:
    x = rows(kind, n, d, dtype).to(device)
    centroids = seeds(x, r, k)
    expected, decided = assigned(TorchBackend(), x, centroids)
    for shared_bytes in (None, TOO_LITTLE):
        labels, count = assigned(make(shared_bytes, falling), x, centroids)
        assert [mislabelled(labels[i], x, centroids[i]) for i in range(r)] == [0] * r
        assert torch.equal(labels, expected)
        assert abs(count - decided) <= 2 + n * r // 20  # float32 sums of another order leave other rows open


ON_HOPPER = [
    # n, d, k, r, kind, dtype, multiprocessors: blocks, so warpgroups have none, one or more turns at rows
    (1, 1, 1, 1, "noise", torch.float32, 3),
    (300, 3, 5, 1, "noise", torch.float32, 1),
    (450, 16, 40, 5, "duplicates", torch.float64, 1),
    (129, 64, 64, 2, "near ties", torch.float32, 2),
    (300, 100, 130, 1, "blobs", torch.float16, 1),
    (130, 130, 300, 3, "duplicates", torch.float32, 1),
    (70, 350, 40, 1, "relu", torch.bfloat16, 1),
    (66, 513, 300, 1, "blobs", torch.float32, 1),
    (66, 1024, 7, 2, "offset", torch.float32, 3),
]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize(("n", "d", "k", "r", "kind", "dtype", "multiprocessors"), ON_HOPPER, ids=str)
def test_labels_and_open_rows_of_warpgroups_are_those_of_warps(
    n: int,
    d: int,
    k: int,
    r: int,
    kind: str,
    dtype: torch.dtype,
    multiprocessors: int,
    falling: bool,
    device: torch.device,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rows(kind, max(n, k), d, dtype).to(device)
    centroids, x = seeds(x, r, k), x[:n]
    opened = []
    for hopper in (True, False):
        backend = make(hopper=hopper, falling=falling)
        monkeypatch.setattr(backend.launch, "multiprocessors", lambda _: multiprocessors)
        spy = backend.launch = Spy(backend.launch)
        labels, _ = assigned(backend, x, centroids)
        assert [mislabelled(labels[i], x, centroids[i]) for i in range(r)] == [0] * r
        opened.append(spy.opened[0].cpu())
    assert (opened[0] - opened[1]).abs().max() <= 1


STREAMED = [
    # n, d, k, r, kind, dtype, multiprocessors (they set how many tiles of centroids a block takes)
    (130, 1025, 5, 1, "noise", torch.float32, 3),
    (97, 1030, 129, 2, "near ties", torch.float16, 3),
    (60, 1056, 300, 1, "blobs", torch.float64, 1),
    (60, 1057, 300, 2, "duplicates", torch.float32, 4),
    (193, 2048, 33, 2, "relu", torch.bfloat16, 3),
    (50, 2049, 130, 1, "offset", torch.float32, 3),
    (50, 3000, 20, 3, "near ties", torch.float64, 3),
    (100, 4096, 7, 1, "blobs", torch.float32, 3),
    (1, 4095, 1, 1, "noise", torch.float16, 3),
]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize(("n", "d", "k", "r", "kind", "dtype", "multiprocessors"), STREAMED, ids=str)
def test_labels_of_streamed_rows_are_exact(
    n: int,
    d: int,
    k: int,
    r: int,
    kind: str,
    dtype: torch.dtype,
    multiprocessors: int,
    falling: bool,
    device: torch.device,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rows(kind, max(n, k), d, dtype).to(device)
    centroids, x = seeds(x, r, k), x[:n]
    expected, decided = assigned(TorchBackend(), x, centroids)
    backend = make(LITTLE if falling else None, falling)
    monkeypatch.setattr(backend.launch, "multiprocessors", lambda _: multiprocessors)
    tile = backend.prepare(Moments.of(TensorSource(x)).frame, centroids, dtype).tile
    assert tile == Tile(128, 96 if falling else 192, streamed=True)
    labels, count = assigned(backend, x, centroids)
    assert [mislabelled(labels[i], x, centroids[i]) for i in range(r)] == [0] * r
    assert torch.equal(labels, expected)
    assert count <= decided + 2 + n * r // 20  # the second look's bound is narrower than float32's


@pytest.mark.parametrize("kind", ["near ties", "blobs"])
def test_streamed_rows_in_several_chunks_have_the_labels_and_open_rows_of_one(
    kind: str, device: torch.device, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(kind, 250, 1100, torch.float32).to(device)
    centroids = seeds(x, 2, 20)
    found = []
    for seen_bytes in (1 << 20, 1):
        monkeypatch.setattr(tile_choice, "_SEEN_BYTES", seen_bytes)
        backend = make(LITTLE)
        monkeypatch.setattr(backend.launch, "multiprocessors", lambda _: 1)
        spy = backend.launch = Spy(backend.launch)
        found.append((*assigned(backend, x, centroids), spy.opened[0].tolist(), spy.kernels))
    (labels, decided, opened, kernels), (labels_1, decided_1, opened_1, kernels_1) = found
    assert kernels == ["convert", "assign", "merge", "rescore", "decide"]
    assert kernels_1 == ["convert", "assign", "merge"] * 3 + ["rescore", "decide"]
    assert [mislabelled(labels_1[i], x, centroids[i]) for i in range(2)] == [0, 0]
    assert torch.equal(labels, labels_1)
    assert (decided, opened) == (decided_1, opened_1)
    assert kind == "blobs" or min(opened) > 0


def test_the_open_rows_do_not_depend_on_how_blocks_share_the_centroids(
    device: torch.device, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows("blobs", 300, 1030, torch.float32).to(device)
    centroids, x = seeds(x, 1, 300), x[:120]
    norms = (moments := Moments.of(TensorSource(x))).frame.norms(moments.dist2)
    norms[:16] = math.nan  # these rows, and none of another block
    opened = []
    for multiprocessors, span in ((4, 2), (6, 1)):
        backend = make(LITTLE)
        monkeypatch.setattr(backend.launch, "multiprocessors", lambda _, some=multiprocessors: some)
        assert Tile(128, 96, streamed=True).span(120, 3, 1, multiprocessors) == span
        spy = backend.launch = Spy(backend.launch)
        labels, _ = assigned(backend, x, centroids, norms=norms)
        assert mislabelled(labels[0], x, centroids[0]) == 0
        opened.append(int(spy.opened[0]))
    assert opened[0] == opened[1]
    backend = make(TOO_LITTLE)
    spy = backend.launch = Spy(backend.launch)
    assigned(backend, x, centroids, norms=norms)
    assert abs(opened[0] - int(spy.opened[0])) <= 1
    assert 16 < opened[0] < 115


def test_rows_of_any_strides_are_read_where_they_lie(device: torch.device, make: Make) -> None:
    whole = rows("noise", 80, 96, torch.float32).to(device)
    wide = rows("noise", 40, 2200, torch.float32).to(device)
    little = [{"shared_bytes": LITTLE}]
    for x, ways in (
        *((x, NARROW) for x in (whole[1::3], whole[:, ::2], whole[:, 5:40], whole.t().contiguous().t())),
        (whole[7:8].expand(9, -1), NARROW),
        *((x, little) for x in (wide[1::3], wide[:, ::2], wide[:, 5:1040], wide[:, :1030].t().contiguous().t())),
        (wide[7:8].expand(9, -1), little),
    ):
        centroids = seeds(x, 1, 4)
        for way in ways:
            labels, _ = assigned(make(**way), x, centroids)
            assert mislabelled(labels[0], x, centroids[0]) == 0


@pytest.mark.parametrize(
    ("n", "d", "way"), [*((1040, 3, way) for way in NARROW), (40, 1040, {"shared_bytes": LITTLE})], ids=str
)
def test_rows_and_features_beyond_32_bits_are_read_where_they_lie(
    n: int, d: int, way: dict[str, Any], device: torch.device, make: Make
) -> None:
    near = rows("noise", n, d, torch.float16).to(device)
    x = far(near) if n > d else far(near.t()).t()
    assert max(x.stride(0) * (n - 1), x.stride(1) * (d - 1)) > 2**32
    backend, centroids = make(**way), seeds(near, 1, 4)
    labels, _ = assigned(backend, x, centroids)
    assert mislabelled(labels[0], near, centroids[0]) == 0
    grid, found = Grid.of(near.abs().amax(0), n, x.dtype), []
    for one, read in ((TorchBackend(), near), (backend, x)):
        sums = torch.zeros(grid.levels, 1, 4, d, dtype=torch.float64, device=device)
        counts = torch.zeros(1, 4, dtype=torch.float64, device=device)
        given = labels.to(device)
        one.accumulate(read, None, grid, given, None, sums, counts)
        one.accumulate(read, None, grid, given.roll(1, 1), given, sums, counts)
        found.append((sums, counts))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "width"), [(36, 48), (300, 304), (37, 41), (2090, 2096)])
def test_the_first_look_leaves_open_what_its_bound_says_and_reads_nothing_beside_the_rows(
    d: int, width: int, dtype: torch.dtype, device: torch.device, make: Make
) -> None:
    # What is not a number would open the rows whose scores it gets into.
    whole = torch.full((101, width), math.nan, dtype=dtype, device=device)
    x = whole[:100, :d]
    x.copy_(rows("blobs", 100, d, dtype))
    frame, norms = (moments := Moments.of(TensorSource(x))).frame, moments.frame.norms(moments.dist2).double()
    narrow = (5, {}), (50, {}), (70, {}), (70, {"shared_bytes": TOO_LITTLE}), (5, HOPPER), (70, HOPPER)
    for k, way in narrow if d < 1024 else ((20, {"shared_bytes": LITTLE}),):
        backend = make(**way)
        spy = backend.launch = Spy(backend.launch)
        centroids = seeds(x, 2, k)
        labels, _ = assigned(backend, x, centroids)
        assert mislabelled(labels[0], x, centroids[0]) == 0
        operand = backend.prepare(frame, centroids, dtype)
        assert operand.shift is not None
        seen = (x.to(operand.shift.dtype) * operand.scale - operand.shift).half().double()
        products = operand.matrix.double() @ seen.t()
        bounds = operand.slope.double() * norms
        upper, lower = operand.high.double() + products + bounds, operand.low.double() + products - bounds
        least = upper.view(2, k, -1).amin(1, keepdim=True)
        expected = ((lower.view(2, k, -1) <= least).sum(1) > 1).sum(1)
        assert (spy.opened[0].cpu() - expected.cpu()).abs().max() <= 1, (k, way)
        assert expected.max() < (60 if d < 1024 else 75)


SECOND = [
    # n, d, k, r, kind, dtype, KiB of shared memory: of 5000 features, say, a block then holds 32, 192 or 576 at a time.
    (1, 1, 2, 1, "noise", torch.float32, None),
    (65, 1, 40, 2, "noise", torch.float32, None),
    (150, 33, 100, 2, "tight", torch.float32, None),
    (200, 64, 33, 3, "tight", torch.float16, None),
    (130, 100, 65, 1, "tight", torch.float64, None),
    (70, 300, 129, 1, "tight", torch.bfloat16, None),
    (66, 600, 130, 1, "relu", torch.float32, 99),
    (63, 1024, 20, 2, "tight", torch.float32, None),
    (40, 1056, 40, 1, "offset", torch.float32, TOO_LITTLE >> 10),
    (30, 2048, 7, 1, "tight", torch.float32, 99),
    (20, 5000, 3, 1, "tight", torch.float32, TOO_LITTLE >> 10),
]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize(("n", "d", "k", "r", "kind", "dtype", "kib"), SECOND, ids=str)
def test_the_second_look_has_the_scores_that_its_bound_says(
    n: int,
    d: int,
    k: int,
    r: int,
    kind: str,
    dtype: torch.dtype,
    kib: int | None,
    falling: bool,
    device: torch.device,
    make: Make,
) -> None:
    # Not one row is certain in the first two looks, so that the list holds them all, with the second's upper ends.
    x = (tight(n, d, dtype) if kind == "tight" else rows(kind, n, d, dtype)).to(device)
    centroids = seeds(x, r, k) if n >= k else seeds(x.repeat(k, 1) * (1 + torch.rand(n * k, 1, device=device)), r, k)
    backend = make(kib and kib << 10, falling)
    spy = backend.launch = Spy(backend.launch)
    spy.decides = False  # it would take every centroid for a candidate
    width = 0.0

    def spoil(operand: Looks) -> Looks:
        nonlocal width
        finer = operand.finer
        norms = moments.frame.norms(moments.dist2).double()
        width = float((finer.high.double().abs() + finer.slope.double() * norms).max()) * 2**6 + 1
        return all_open(replace(operand, finer=replace(finer, reach=torch.full_like(finer.reach, width))))

    moments = Moments.of(TensorSource(x))
    labels, decided = assigned(backend, x, centroids, spoil)
    assert decided == n * r
    finer = backend.prepare(moments.frame, centroids, dtype).finer
    assert finer.shift is not None
    seen = (x.to(finer.shift.dtype) * finer.scale - finer.shift).float().double()
    norms = moments.frame.norms(moments.dist2).double()
    bounds = finer.slope.double() * norms
    lower = (finer.low.double() + finer.matrix.double() @ seen.t() - bounds).view(r, k, n)
    least, index = lower.min(1)
    upper = (least + 2 * bounds.view(r, k, n).gather(1, index[:, None])[:, 0] + width).cpu()
    slack = bounds.view(r, k, n).amax(1).cpu() + 2.0**-22 * width
    counts, places, ends_ = spy.left[0]
    assert counts.tolist() == [n] * r
    for restart in range(r):
        assert places[restart].sort().values.tolist() == list(range(n))
        error = (ends_[restart].double() - upper[restart][places[restart].long()]).abs()
        assert bool((error <= slack[restart][places[restart].long()]).all())
    labelled = lower.gather(1, labels.to(device).long()[:, None])[:, 0]
    assert bool((labelled - least <= bounds.view(r, k, n).amax(1)).all())


def tight(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows in tight groups: differences between those of a group are beneath what float16 sees."""
    random = torch.Generator().manual_seed(d)
    centres = torch.randn(4, d, generator=random, dtype=torch.float64)
    return (
        centres[torch.arange(n) % 4] + 0.02 * d**0.25 * torch.randn(n, d, generator=random, dtype=torch.float64)
    ).to(dtype)


@pytest.mark.parametrize("shared_bytes", [None, TOO_LITTLE], ids=["fused", "wide"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("n", "d", "k", "r"), [(300, 16, 50, 2), (200, 70, 20, 1), (100, 1100, 12, 1)])
def test_of_rows_in_tight_groups_the_first_look_leaves_most_and_the_second_few(
    n: int, d: int, k: int, r: int, offset: float, shared_bytes: int | None, device: torch.device, make: Make
) -> None:
    x = (tight(n, d, torch.float32) + offset).to(device)
    backend = make(shared_bytes)
    spy = backend.launch = Spy(backend.launch)
    centroids = torch.stack([x[i * k : (i + 1) * k] for i in range(r)])
    labels, decided = assigned(backend, x, centroids)
    assert [mislabelled(labels[i], x.cpu(), centroids[i].cpu()) for i in range(r)] == [0] * r
    assert spy.opened[0].sum() > 0.7 * n * r
    assert decided < 0.05 * n * r


def test_centroids_out_of_all_proportion_certify_nothing_wrong(device: torch.device, make: Make) -> None:
    x = rows("noise", 60, 5, torch.float32).to(device)
    far = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    for scale in (1e3, 1e5, 1e8, 1e20, 1e30):
        for centroids in (far * scale, torch.cat([x[:3], far[:3] * scale]), far + scale):
            for way in NARROW:
                found = nearest(TensorSource(x), centroids, make(**way))
                assert mislabelled(found.cpu(), x, centroids) == 0


@pytest.mark.compiler
@settings(max_examples=80, deadline=None)
@given(
    d=st.sampled_from([1, 3, 37, 200, 1030]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["blobs", "noise", "relu", "heavy tails", "unequal features"]),
    scale=st.integers(-140, 100),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    beside=st.integers(0, 26),
    seed=st.integers(0, 2**31 - 1),
)
def test_rows_near_the_border_of_two_centroids_are_no_escape(
    d: int, dtype: torch.dtype, kind: str, scale: int, offset: float, beside: int, seed: int
) -> None:
    rng = np.random.RandomState(seed)
    values = KINDS[kind](rng, 40, d) + offset
    step = np.std(values, axis=0) * rng.randn(3, d)
    # Between a centroid and its mirror image, and 2**-beside of the way to one of them, with what lies across that way.
    along = step[0] / np.linalg.norm(step[0]) if step[0].any() else step[0]
    middle = values - np.outer((values - values[0]) @ along, along)
    values[1:] = (middle + np.outer(rng.choice([-1, 1], 40) * 2.0**-beside, step[0]))[1:]
    centres = np.concatenate([values[0] + step, values[0] - step])
    largest = max(np.abs(values).max(), np.abs(centres).max())
    unit = 2.0**14 / largest if dtype == torch.float16 else min(2.0**scale, 2.0**120 / largest)
    x = torch.from_numpy(values * unit).to(dtype)
    centroids = torch.from_numpy(centres * unit).to(centroid_dtype(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_backend, "multiplied", lambda a, b: a.float() @ b.float())
        for launcher in (HostLauncher(), HostLauncher(TOO_LITTLE), HostLauncher(H100, hopper=True)):
            backend = CupyBackend(launcher)
            labels, _ = assigned(backend, x, centroids[None])
            assert mislabelled(labels[0], x, centroids) == 0
            assert mislabelled(nearest(TensorSource(x), centroids, backend), x, centroids) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("padded", math.nan),  # what is infinite there has a slope that is no number: `Frame.operand` sees to it
        ("low", math.nan),
        ("low", -math.inf),
        ("slope", math.nan),
        ("slope", math.inf),
        ("reach", math.nan),
        ("reach", math.inf),
    ],
)
def test_what_is_not_a_number_certifies_nothing_wrong(
    field: str, value: float, device: torch.device, make: Make
) -> None:
    def first(operand: Looks) -> Looks:
        if field in ("low", "slope"):
            terms = operand.terms.clone()
            terms[0, 2, field == "slope"] = value
            return replace(operand, terms=terms)
        spoiled = getattr(operand, field).clone()
        spoiled[line(operand, 2) if field == "padded" else (0, 2)] = value
        return replace(operand, **{field: spoiled})

    def second(operand: Looks) -> Looks:
        finer = operand.finer
        if field in ("low", "slope"):
            terms = finer.terms.clone()
            terms[0, 2, field == "slope"] = value
            return all_open(replace(operand, finer=replace(finer, terms=terms)))
        name = {"padded": "parts"}.get(field, field)
        spoiled = getattr(finer, name).clone()
        spoiled[0, 2] = value
        return all_open(replace(operand, finer=replace(finer, **{name: spoiled})))

    def third(operand: Looks) -> Looks:
        name = {"padded": "matrix", "reach": "high"}.get(field, field)
        spoiled = getattr(operand.finer, name).clone()
        spoiled[2] = value
        nothing_certain = torch.full_like(operand.finer.reach, math.nan)
        return all_open(replace(operand, finer=replace(operand.finer, reach=nothing_certain, **{name: spoiled})))

    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        for spoil in (first, second, third):
            labels, _ = assigned(make(**way), x, x[None, :4], spoil)
            assert mislabelled(labels[0], x, x[:4]) == 0


def test_every_row_is_left_open_where_one_score_is_no_number(device: torch.device, make: Make) -> None:
    def spoil(operand: Looks) -> Looks:
        parts, padded = operand.finer.parts.clone(), operand.padded.clone()
        parts[0, 3, 0, 1, 2] = padded[line(operand, 3)] = math.nan  # of the lower parts
        return replace(operand, padded=padded, finer=replace(operand.finer, parts=parts))

    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        labels, decided = assigned(make(**way), x, x[None, :4], spoil)
        assert decided == 50
        assert mislabelled(labels[0], x, x[:4]) == 0


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_labels_are_in_range_whatever_became_of_the_rows(
    spoiled: float, precision: str, device: torch.device, make: Make
) -> None:
    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        moments = Moments.of(TensorSource(x))
        centroids = x[None, :4].clone()
        x[7, 0], x[9] = spoiled, spoiled
        backend = make(**way)
        labels = torch.full((1, 50), -1, dtype=torch.int32, device=device)
        operand = backend.prepare(moments.frame, centroids, x.dtype)
        backend.assign(x, moments.frame.norms(moments.dist2), operand, labels, precision)
        assert ((labels >= 0) & (labels < 4)).all()


def test_fast_takes_the_least_score(device: torch.device, make: Make) -> None:
    for d, way in (*((30, way) for way in NARROW), (1100, {"shared_bytes": LITTLE})):
        x = rows("blobs", 200, d).to(device)
        centroids = seeds(x, 1, 40)
        operand = make().prepare(Moments.of(TensorSource(x)).frame, centroids, x.dtype)
        assert operand.shift is not None
        seen = (x * operand.scale - operand.shift).half().double()
        scores = seen @ operand.matrix.double().t() + (operand.high[:, 0].double() + operand.low[:, 0].double()) / 2
        least = scores.amin(1)
        labels, decided = assigned(make(**way), x, centroids, precision="fast")
        assert decided == 0
        excess = scores.gather(1, labels[0].long().to(device)[:, None])[:, 0] - least
        assert excess.max() <= 1e-5 * scores.abs().max()


# ---- tiles


@pytest.mark.parametrize(
    ("k", "d", "shared_bytes", "multiprocessors", "expected"),
    [
        (5, 64, H100, 132, Tile(32, 128)),
        (64, 600, H100, 132, Tile(64, 128)),
        (4096, 1024, H100, 132, Tile(128, 64)),
        (4096, 1024, A100, 108, Tile(128, 192, True)),  # 64 whole rows do not fit
        (4096, 1025, H100, 132, Tile(128, 192, True)),
        (4096, 4096, H100, 132, Tile(128, 192, True)),
        (4096, 4096, L4, 58, Tile(128, 96, True)),
        (4096, 4097, H100, 132, Tile(128, 0)),
        (1000, 4096, H100, 132, Tile(128, 192, True)),  # 16 x 8 tiles of a chunk
        (500, 4096, H100, 132, Tile(128, 0)),  # 16 x 4: half of the device would wait
        (100, 1025, H100, 132, Tile(128, 0)),
        (4096, 2000, TOO_LITTLE, 132, Tile(128, 0)),
    ],
    ids=str,
)
def test_the_tile_fits_the_device(k: int, d: int, shared_bytes: int, multiprocessors: int, expected: Tile) -> None:
    tile = Tile.of(k, d, shared_bytes, multiprocessors)
    assert tile == expected
    assert tile.rows == 0 or tile.shared_bytes(d) + (8 << 10) <= shared_bytes


@pytest.mark.parametrize(
    ("k", "d", "expected"),
    [
        (5, 64, Tile(32, 256, stages=16)),
        (64, 128, Tile(64, 256, stages=16)),
        (4096, 128, Tile(128, 256, stages=9)),
        (4096, 256, Tile(128, 256, stages=5)),
        (4096, 300, Tile(128, 192, stages=6)),
        (4096, 512, Tile(128, 128, stages=5)),
        (4096, 704, Tile(128, 128, stages=2)),
        (4096, 1024, Tile(128, 64, stages=5)),
        (4096, 1025, Tile(128, 192, True)),
    ],
    ids=str,
)
def test_the_tile_of_warpgroups_has_room_for_its_ring(k: int, d: int, expected: Tile) -> None:
    tile = Tile.of(k, d, H100, 132, hopper=True)
    assert tile == expected
    assert tile.shared_bytes(d) + (1 << 10) <= H100
    assert tile.blocks(10**6, 132) == (132 if tile.stages else 5209)
    assert tile.blocks(130, 132) == (3 if tile.stages else 1)


def test_the_image_of_centroids_has_each_feature_where_the_tensor_cores_look_for_it() -> None:
    r, k, d, tile = 2, 70, 130, Tile(32, 256, stages=4)
    matrix = torch.arange(r * k * d, dtype=torch.float32).view(r, k, d) + 1
    image = tile.image(matrix)
    assert image.shape == (r, 3, 3, 32, 64)
    assert image.is_contiguous()
    assert int((image != 0).sum()) == r * k * d
    flat = image.flatten()
    for restart, j, f in ((0, 0, 0), (0, 1, 0), (1, 69, 129), (1, 37, 70), (0, 31, 63), (1, 7, 8)):
        piece = (restart * 3 + j // 32) * 3 + f // 64
        place = (piece * 32 + j % 32) * 64 + ((f % 64 // 8) ^ (j % 8)) * 8 + f % 8
        assert flat[place] == matrix[restart, j, f]


def test_a_chunk_of_streamed_rows_is_whole_tiles_and_its_blocks_end_together() -> None:
    tile = Tile(128, 192, True)
    assert [tile.chunk_rows(d) for d in (1025, 2048, 4096)] == [11904, 6144, 3072]
    assert tile.span(3072, 32, 1, 132) == 4  # 16 x 8 blocks for 132
    assert tile.span(3072, 33, 1, 132) == 1  # 5 by 8 would be 112 blocks, 1 tile each ends as early
    assert tile.span(192, 8, 1, 132) == 1
    assert tile.span(11904, 2, 1, 132) == 1
    assert tile.span(100_000, 3, 1, 58) == 3
    assert 5000 * -(-32 // tile.span(192, 32, 5000, 132)) <= 65535  # blocks of a grid's second dimension


# ---- sums


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
    monkeypatch.setattr(cupy_backend, "_MOST_SPANS", 1 if weighted else 65535)
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
        backend.accumulate(x, weights, grid, old.contiguous(), None, sums, counts)
        first = sums.clone(), counts.clone()
        backend.accumulate(x, weights, grid, new, old, sums, counts)
        found.append((*first, sums, counts))
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


# ---- whole fits


@pytest.mark.parametrize(
    ("kind", "n", "d", "k", "dtype", "weighted"),
    [
        ("blobs", 200, 6, 5, torch.float32, False),
        ("near ties", 150, 3, 8, torch.float32, True),
        ("relu", 120, 40, 4, torch.float16, False),
        ("offset", 150, 5, 3, torch.float64, False),
    ],
    ids=str,
)
def test_a_fit_has_the_bits_of_the_torch_backend(
    kind: str,
    n: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    weighted: bool,
    device: torch.device,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = rows(kind, n, d, dtype).to(device)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    fits: list[Fit] = []
    for backend in (TorchBackend(), make(hopper=kind == "blobs")):
        monkeypatch.setattr(fit, "choose", lambda *_, backend=backend: (backend, {}))
        fits.append(fit_kmeans(TensorSource(x), k, n_init=3, seed=5, weights=weights if weighted else None))
    expected, got = fits
    assert (expected.backend, got.backend) == ("torch", "cupy")
    assert torch.equal(expected.labels, got.labels)
    assert torch.equal(expected.centroids, got.centroids)
    assert (expected.inertia, expected.n_iter, expected.trace) == (got.inertia, got.n_iter, got.trace)
    assert mislabelled(got.labels.cpu(), x, got.centroids) == 0


@pytest.mark.gpu
@pytest.mark.nvrtc
@pytest.mark.slow
def test_more_than_2_to_the_31_values_are_one_launch() -> None:
    n, d, k = 2**24 + 3, 129, 5
    x = torch.empty(n, d, dtype=torch.float16, device="cuda").normal_()
    centroids = x[None, :k].float()
    labels, _ = assigned(CupyBackend(), x, centroids)
    some = torch.cat([torch.arange(200), torch.arange(n - 200, n)])
    assert mislabelled(labels[0, some], x[some.cuda()], centroids[0]) == 0
    grid = Grid.of(x.abs().amax(0), n, x.dtype)
    found = []
    for backend in (TorchBackend(), CupyBackend()):
        sums = torch.zeros(grid.levels, 1, k, d, dtype=torch.float64, device="cuda")
        counts = torch.zeros(1, k, dtype=torch.float64, device="cuda")
        backend.accumulate(x, None, grid, labels.cuda(), None, sums, counts)
        found.append((sums, counts))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


# ---- who may use it


def problem(device: str, d: int = 3) -> Problem:
    return Problem(10, d, 2, torch.float32, torch.device(device))


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CupyBackend(HostLauncher())
    monkeypatch.setattr(cupy_backend.importlib.util, "find_spec", lambda _: None)
    assert "cupy is not installed" in str(backend.unavailable())
    monkeypatch.setattr(cupy_backend.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert backend.unavailable() == "its kernels need compute capability 8.0; this machine has 7.5"
    assert "cuda:0 has 7.5" in str(backend.supports(problem("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert backend.unavailable() is None
    assert backend.supports(problem("cuda:0")) is None
    assert "fewer than 2**31 features" in str(backend.supports(problem("cuda:0", 2**31)))
    assert backend.supports(problem("cpu")) == "its kernels run on CUDA devices; X is on cpu"


def test_auto_leaves_it_until_a_row_shows_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CupyBackend, "unavailable", lambda _: None)
    monkeypatch.setattr(CupyBackend, "supports", lambda *_: None)
    chosen, rejected = choose("auto", problem("cpu"))
    assert chosen.name != "cupy"
    assert rejected["cupy"] == "auto takes it once a committed GPU row shows its contract test passing"
    assert choose("cupy", problem("cpu"))[0].name == "cupy"


def test_asked_for_where_it_cannot_run_it_is_an_error() -> None:
    assert "cupy" in survey()
    with pytest.raises(UnavailableError, match="backend 'cupy' cannot run here"):
        choose("cupy", problem("cpu"))


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_kernels_are_compiled_for_the_device(capability: tuple[int, int], arch: str) -> None:
    assert architecture(capability) == arch
