"""The CuPy backend against the torch backend and the reference distance: on a GPU, and its kernels on a processor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases_cluster import KINDS, mislabelled, rows
from cases_contract import far
from cases_cupy import (
    DTYPES,
    LITTLE,
    NARROW,
    TOO_LITTLE,
    Make,
    Spy,
    assigned,
    seeds,
)
from on_host import HostLauncher

from gpuclust.cluster import fit
from gpuclust.cluster.backends import choose, survey
from gpuclust.cluster.backends import cupy as cupy_backend
from gpuclust.cluster.backends import tile as tile_choice
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.tile import Tile
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sums import Grid
from gpuclust.errors import UnavailableError
from gpuclust.kernels.launch import architecture

# ---- labels


# Every type where rows are read as they lie; the other ways read them by the same few lines.
@pytest.mark.parametrize(
    ("dtype", "way"),
    [*((dtype, {}) for dtype in DTYPES), *((dtype, way) for dtype in DTYPES[:2] for way in NARROW[1:])],
    ids=str,
)
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


@pytest.mark.parametrize("kept", DTYPES[:2] + DTYPES[3:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_is_asked_about_rows_of_another_type(
    dtype: torch.dtype, kept: torch.dtype, device: torch.device, make: Make
) -> None:
    random = torch.Generator().manual_seed(0)
    # Whole numbers: distances tie, and the reference distance decides.
    values = torch.randint(-2, 3, (140, 6), generator=random)
    x, centroids = (values[part].to(device) for part in (slice(100), slice(100, 140)))
    labels = nearest(TensorSource(x.to(dtype)), centroids.to(kept), make())
    assert torch.equal(labels, nearest(TensorSource(x.to(dtype)), centroids.to(kept), TorchBackend()))
    assert mislabelled(labels.cpu(), x.double(), centroids.double()) == 0


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
    (20, 17_001, 3, 1, "near ties", torch.float32),
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
    (450, 16, 40, 5, "duplicates", torch.float32, 1),
    (129, 64, 64, 2, "near ties", torch.float32, 2),
    (300, 100, 130, 1, "blobs", torch.float32, 1),
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
    assert kernels == ["prepare", "repeated", "convert", "assign", "merge", "rescore", "decide"]
    assert kernels_1 == ["prepare", "repeated", *["convert", "assign", "merge"] * 3, "rescore", "decide"]
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


class Lame:
    """A launcher that leaves out one kernel."""

    def __init__(self, launcher: Any, kernel: str) -> None:
        self.launcher, self.kernel = launcher, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def __call__(self, device: torch.device, file: str, options: Any, kernel: str, *rest: Any) -> None:
        if kernel != self.kernel:
            self.launcher(device, file, options, kernel, *rest)


def test_auto_takes_it_where_its_results_are_torchs(
    device: torch.device, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = {"cupy": make(), "torch": TorchBackend()}
    monkeypatch.setattr("gpuclust.cluster.backends._backends", lambda: backends)
    monkeypatch.setattr("gpuclust.cluster.backends.ORDER", tuple(backends))
    monkeypatch.setattr(CupyBackend, "unavailable", lambda _: None)
    monkeypatch.setattr(CupyBackend, "supports", lambda *_: None)
    chosen, rejected = choose("auto", problem(str(device)))
    assert chosen.name == "cupy"
    assert rejected == {"torch": "auto takes cupy before it"}
    backends["cupy"] = CupyBackend(Lame(make().launch, "move"))
    chosen, rejected = choose("auto", problem(str(device)))
    assert chosen.name == "torch"
    assert rejected == {"cupy": "its movements are not those of the torch backend on this device"}
    assert choose("cupy", problem(str(device)))[0].name == "cupy"


def test_asked_for_where_it_cannot_run_it_is_an_error() -> None:
    assert "cupy" in survey()
    with pytest.raises(UnavailableError, match="backend 'cupy' cannot run here"):
        choose("cupy", problem("cpu"))


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_kernels_are_compiled_for_the_device(capability: tuple[int, int], arch: str) -> None:
    assert architecture(capability) == arch
