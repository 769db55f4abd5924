"""Triton's kernels, in its interpreter where there is no CUDA device and compiled where there is: exact labels, the
torch backend's bits, and nothing certain that is not a number. Compiled ahead of time for devices that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases_cluster import KINDS, mislabelled, reference_dist2, rows

from gpuclust import KMeans
from gpuclust.cluster.backends import choose
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.backends.triton import Cascade, TritonBackend
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.errors import UnavailableError

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# The interpreter computes with NumPy, which speaks of NaN where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def starts(x: torch.Tensor, k: int, restarts: int = 2) -> torch.Tensor:
    """Centroids (restarts, k, d) near rows of ``x``, a few of them equal."""
    kept = x.to(centroid_dtype(x.dtype))
    first = [torch.randint(len(x), (k,), generator=torch.Generator().manual_seed(seed)) for seed in range(restarts)]
    return torch.stack([kept[index.to(x.device)] * 0.9 + kept[:1] * 0.1 for index in first])


class Pass:
    """One pass over rows: what the kernel proposes, and where the cascade ends."""

    def __init__(self, x: torch.Tensor, centroids: torch.Tensor) -> None:
        self.x, self.centroids = x, centroids
        self.moments = Moments.of(TensorSource(x))
        self.norms = self.moments.frame.norms(self.moments.dist2)
        self.backend = TritonBackend()
        operand = self.backend.prepare(self.moments.frame, centroids, x.dtype)
        assert isinstance(operand, Cascade)
        self.operand: Cascade = operand

    def empty(self) -> torch.Tensor:
        return torch.full((len(self.centroids), len(self.x)), -1, dtype=torch.int32, device=self.x.device)

    def propose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (r, n), and which of them are open."""
        labels = self.empty()
        return labels, self.backend.propose(self.x, self.norms, self.operand, labels) != 0

    def assign(self, precision: str = "exact") -> tuple[torch.Tensor, int]:
        labels = self.empty()
        decided = self.backend.assign(self.x, self.norms, self.operand, labels, precision)
        return labels, int(decided)

    def by_torch(self) -> tuple[torch.Tensor, int]:
        labels, backend = self.empty(), TorchBackend()
        operand = backend.prepare(self.moments.frame, self.centroids, self.x.dtype)
        return labels, int(backend.assign(self.x, self.norms, operand, labels, "exact"))

    def wrong(self, labels: torch.Tensor) -> int:
        return sum(mislabelled(found.cpu(), self.x, own) for found, own in zip(labels, self.centroids, strict=True))


def require_exact(x: torch.Tensor, centroids: torch.Tensor) -> Pass:
    """What is certain is right by itself, what is open is put right, and torch decides the same rows."""
    made = Pass(x, centroids)
    proposed, is_open = made.propose()
    labels, decided = made.assign()
    assert made.wrong(labels) == 0
    assert torch.equal(proposed[~is_open], labels[~is_open])
    assert ((proposed >= 0) & (proposed < centroids.shape[1])).all()
    by_torch, decided_by_torch = made.by_torch()
    assert torch.equal(labels, by_torch)
    assert decided <= int(is_open.sum())
    assert decided <= decided_by_torch or made.moments.frame.stored
    return made


# ---- labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_exact_and_torchs(kind: str, dtype: torch.dtype, device: str) -> None:
    x = rows(kind, 140, 20, dtype).to(device)
    require_exact(x, starts(x, 70))


@pytest.mark.parametrize(
    ("n", "d", "k"),
    [
        (1, 1, 1),
        (2, 3, 2),
        (129, 1, 5),
        (127, 127, 64),
        (128, 128, 65),
        (257, 129, 129),
        (63, 1000, 100),
        (65, 1024, 3),
        (70, 1025, 200),
        (9, 2049, 9),
        (300, 2, 300),
    ],
)
def test_any_shape(n: int, d: int, k: int, device: str) -> None:
    x = rows("noise", n, d).to(device)
    require_exact(x, starts(x, k, 1 + (d < 1000)))


def test_rows_of_a_wide_layer(device: str) -> None:
    x = rows("relu", 20, 70_001).to(device)
    made = Pass(x, starts(x, 3, 1))
    labels, decided = made.assign()
    assert made.wrong(labels) == 0
    assert decided < 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_strides(dtype: torch.dtype, device: str) -> None:
    x = rows("blobs", 150, 12, dtype).to(device)
    centroids = starts(x, 9)
    labels, _ = Pass(x, centroids).assign()
    wide = torch.full((300, 40), float("nan"), dtype=dtype, device=device)
    wide[::2, 3:39:3] = x
    for seen in (wide[::2, 3:39:3], x.t().contiguous().t()):
        assert torch.equal(seen, x)
        assert torch.equal(Pass(seen, centroids).assign()[0], labels)
        require_same_sums(seen, labels)
    same = x[:1].expand(150, 12)
    assert torch.equal(Pass(same, centroids).assign()[0], labels[:, :1].expand(-1, 150))


def test_ties_stay_open_and_go_to_the_lowest_index(device: str) -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 5.0], [3.0, 1.0]], device=device).repeat(50, 1)
    centroids = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0]]], device=device)
    made = Pass(x, centroids)
    _, is_open = made.propose()
    assert is_open[0].view(50, 3)[:, :2].all()
    assert not is_open[0].view(50, 3)[:, 2].any()
    labels, decided = made.assign()
    assert decided == 100
    assert torch.equal(labels[0].view(50, 3), torch.tensor([1, 1, 0], dtype=torch.int32, device=device).expand(50, 3))


@pytest.mark.parametrize("d", [5, 300, 1500])
def test_equal_centroids_leave_no_row_open(d: int, device: str) -> None:
    # The first of them wins every tie: the others need not be told apart from it.
    x = rows("blobs", 100, d).to(device)
    made = Pass(x, x[:1].repeat(1, 3, 1))
    labels, is_open = made.propose()
    assert not is_open.any()
    assert not labels.any()


@pytest.mark.parametrize(("kind", "most"), [("blobs", 0.35), ("noise", 0.06), ("relu", 0.04)])
def test_few_rows_are_left_open_by_float16(kind: str, most: float, device: str) -> None:
    x = rows(kind, 2000, 64).to(device)
    centroids = (x[:40] * 0.9 + x.mean(0) * 0.1)[None]
    made = Pass(x, centroids)
    share = made.propose()[1].float().mean().item()
    assert 0 < share < most, f"{kind}: float16 leaves {share:.1%} of the rows open"
    _, decided = made.assign()
    assert decided <= 0.01 * len(x)


@pytest.mark.parametrize("d", [16, 300])
def test_fast_takes_the_least_score(d: int, device: str) -> None:
    x = rows("noise", 500, d).to(device)
    made = Pass(x, starts(x, 25, 1))
    labels, decided = made.assign("fast")
    assert decided == 0
    dist2 = reference_dist2(x, made.centroids[0])
    excess = dist2[range(500), labels[0].cpu().numpy()] - dist2.min(1)
    assert excess.max() <= 2e-3 * dist2.max()
    assert (excess > 0).mean() < 0.02


# ---- fail closed


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("d", [5, 200, 1030])
@pytest.mark.parametrize(
    ("field", "value", "whose"),
    [(field, value, "row") for field in ("x", "norms") for value in (NAN, INFINITY, -INFINITY)]
    + [("matrix", NAN, "all"), ("low", NAN, "all"), ("low", -INFINITY, "all"), ("slope", NAN, "all")]
    # An upper end counts only for the centroid that is the nearest.
    + [("slope", INFINITY, "all"), ("high", NAN, "its own"), ("high", INFINITY, "its own")],
)
def test_what_is_not_a_number_is_not_certain(field: str, value: float, whose: str, d: int, device: str) -> None:
    x = rows("blobs", 70, d).to(device)
    made = Pass(x, x[None, :6])
    own = made.propose()[0][0] == 2
    if whose == "row":
        (x if field == "x" else made.norms)[3] = value
        spoiled = torch.arange(70, device=device) == 3
    else:
        tensor = getattr(made.operand, field).clone()
        tensor[2] = value
        made.operand = replace(made.operand, **{field: tensor})
        spoiled = own if whose == "its own" else torch.ones_like(own)
    assert spoiled.any()
    labels, is_open = made.propose()
    assert is_open[0][spoiled].all()
    assert ((labels >= 0) & (labels < 6)).all()
    decided = made.assign()[0]
    assert ((decided >= 0) & (decided < 6)).all()
    if field not in ("x", "norms"):
        assert made.wrong(decided) == 0


def test_centroids_beyond_float16_leave_every_row_to_float32(device: str) -> None:
    x = rows("blobs", 100, 4).to(device)
    centroids = starts(x, 7)
    centroids[0, 3] = 1e7
    made = require_exact(x, centroids)
    assert made.propose()[1][0].all()
    assert not made.propose()[1][1].all()


def test_outputs_are_written_whole_and_nothing_beside_them(device: str) -> None:
    from gpuclust.kernels.triton.assign import assign

    x = rows("blobs", 131, 3).to(device)
    made = Pass(x, starts(x, 5, 3))
    room = torch.full((4, 200), -7, dtype=torch.int32, device=device)
    flags = torch.full((3 * 131 + 50,), 77, dtype=torch.int8, device=device)
    labels, uncertain = room[:3, 20:151], flags[: 3 * 131].view(3, 131)
    assign(x, made.norms, made.operand, made.operand.unit, labels, uncertain)
    assert (labels >= 0).all()
    assert set(uncertain.unique().tolist()) <= {0, 1}
    assert (room[3] == -7).all()
    assert (room[:3, :20] == -7).all()
    assert (room[:3, 151:] == -7).all()
    assert (flags[3 * 131 :] == 77).all()


# ---- sums


def require_same_sums(x: torch.Tensor, labels: torch.Tensor, k: int = 9, weighted: bool = True) -> None:
    n, d = x.shape
    chance = torch.Generator().manual_seed(0)
    weights = torch.rand(n, dtype=torch.float64, generator=chance).to(x.device) if weighted else None
    if weights is not None:
        weights[::5] = 0
    moments = Moments.of(TensorSource(x), None if weights is None else weights[weights > 0].amin().item())
    later = torch.randint(k, labels.shape, dtype=torch.int32, generator=chance).to(x.device)
    later[:, ::3] = labels[:, ::3]
    found = []
    for backend in (TritonBackend(), TorchBackend()):
        sums = torch.zeros(moments.grid.levels, len(labels), k, d, dtype=torch.float64, device=x.device)
        counts = torch.zeros(len(labels), k, dtype=torch.float64, device=x.device)
        backend.accumulate(x, weights, moments.grid, labels, None, sums, counts)
        found += [sums.clone(), counts.clone()]
        backend.accumulate(x, weights, moments.grid, later, labels, sums, counts)
        found += [sums, counts]
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        assert torch.equal(ours, theirs)
    assert found[0].any() or not x.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["blobs", "subnormal", "huge", "unequal features"])
def test_sums_have_torchs_bits(kind: str, dtype: torch.dtype, weighted: bool, device: str) -> None:
    x = rows(kind, 150, 131, dtype).to(device)
    labels = torch.randint(9, (3, 150), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(device)
    require_same_sums(x, labels, weighted=weighted)


# ---- whole fits


@pytest.mark.parametrize(
    ("kind", "n", "d", "k", "dtype"),
    [
        ("blobs", 300, 8, 5, torch.float32),
        ("near ties", 300, 4, 12, torch.float32),
        ("duplicates", 200, 6, 15, torch.float64),
        ("relu", 140, 130, 7, torch.float16),
        ("heavy tails", 130, 5, 6, torch.bfloat16),
    ],
)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_fit_has_the_same_bits_as_torchs(kind: str, n: int, d: int, k: int, dtype: torch.dtype, device: str) -> None:
    x = rows(kind, n, d, dtype).to(device)
    weights = torch.arange(n, dtype=torch.float64, device=device) % 4 if k % 2 else None
    ours, theirs = (
        KMeans(k, n_init=3, random_state=0, max_iter=12, backend=backend).fit(x, sample_weight=weights)
        for backend in ("triton", "torch")
    )
    assert ours.fit_report_.backend == "triton"
    assert torch.equal(ours.labels_, theirs.labels_)
    assert torch.equal(ours.cluster_centers_, theirs.cluster_centers_)
    assert (ours.inertia_, ours.n_iter_) == (theirs.inertia_, theirs.n_iter_)
    assert mislabelled(ours.labels_.cpu(), x, ours.cluster_centers_) == 0
    other = rows(kind, 90, d, dtype, seed=1).to(device)
    assert torch.equal(ours.predict(other), theirs.predict(other))


def test_chunks_do_not_matter(device: str) -> None:
    x = rows("near ties", 300, 5).to(device)
    source = TensorSource(x)
    whole = nearest(source, x[:20], TritonBackend())
    source.chunks = lambda size: ((start, x[start : start + 37]) for start in range(0, 300, 37))  # type: ignore[method-assign]
    assert torch.equal(nearest(source, x[:20], TritonBackend()), whole)
    assert mislabelled(whole.cpu(), x, x[:20]) == 0


# ---- what can run where


def problem(device: str = "cpu") -> Problem:
    return Problem(100, 3, 2, torch.float32, torch.device(device))


def test_auto_leaves_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend, rejected = choose("auto", problem())
    assert backend.name == "torch"
    assert rejected["triton"]


def test_without_a_device_and_interpreter_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"triton.*TRITON_INTERPRET=1"):
        choose("triton", problem())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="triton is not installed"):
        choose("triton", problem())


def test_compiled_kernels_are_for_cuda_of_capability_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr("gpuclust.cluster.backends.triton.differs", lambda backend, problem: None)
    backend, rejected = choose("auto", problem("cuda"))
    assert backend.name == "triton"
    assert rejected.keys() == {"cupy", "torch", "cuml"}
    assert rejected["torch"] == "auto takes triton before it"
    monkeypatch.setattr("gpuclust.cluster.backends.triton.differs", lambda backend, problem: "its labels differ")
    assert choose("auto", problem("cuda"))[1]["triton"] == "its labels differ"
    assert choose("triton", problem("cuda"))[0].name == "triton"
    assert choose("auto", problem("cpu"))[0].name == "torch"
    with pytest.raises(UnavailableError, match="the rows are on cpu"):
        choose("triton", problem("cpu"))
    capability = (7, 5)
    backend, rejected = choose("auto", problem("cuda"))
    assert backend.name == "torch"
    assert "7.5" in rejected["triton"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    # By name: a torch that is said to be built for ROCm could not answer the other backends.
    with pytest.raises(UnavailableError, match="ROCm"):
        choose("triton", problem("cuda"))


# ---- compiled without a device


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the compiler makes of every kernel for devices that need not be here: `tests/ahead_of_time.py`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ahead_of_time.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(compiled: list[dict]) -> None:
    assert {kernel["capability"] for kernel in compiled} == {80, 90, 100}
    for kernel in compiled:
        # The least of the devices have 99 KiB; a spill of a few registers is no stack that is worth a smaller block.
        assert kernel["shared_bytes"] <= 99 * 1024, kernel
        assert kernel["stack_bytes"] <= 64, kernel
        if kernel.get("whole") and kernel["capability"] < 100:
            # Two programs of 256 threads share a processor's 65,536 registers.
            assert kernel["registers"] <= 128, kernel
            assert kernel["stack_bytes"] == 0, kernel


def test_compiled_kernels_are_what_the_bounds_count_on(compiled: list[dict]) -> None:
    for kernel in compiled:
        if kernel["kernel"] == "assign":
            assert kernel["tensor_core_products"] > 0, kernel
            assert kernel["minima_that_keep_nan"] > 0 or not kernel["whole"], kernel
        else:
            assert kernel["fused_doubles"] == 0, kernel
            assert kernel["atomic_adds"] > 0, kernel
        assert {"b", "r", "k"} <= set(kernel["any_value"]), "a new n, n_init or k must not compile anew"
