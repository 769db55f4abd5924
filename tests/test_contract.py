"""The contract of a backend, over one covering set of problems: every backend that this machine can run keeps it.

No label but the nearest by the reference distance; counts exact; sums the same bits as any other order of adding, and
within the grid's bound of the true sums.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from cases_cluster import mislabelled, reference_dist2
from cases_contract import PROPERTIES, Case, all_pairs, covered, covering, interpreted, kernel_products, products

from gpuclust import KMeans
from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends import choose, survey
from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Pairs do not bring together what the kernels are written for: wide rows of several slices, many clusters, restarts.
WIDE = [
    Case(1009, 1025, 1000, F16, "plain", "relu", 1, None),
    Case(257, 2049, 255, BF16, "part of the columns", "offset", 3, "unequal"),
    Case(300, 4097, 300, F32, "every other row", "near ties", 1, "some zero"),
]
CASES = [*covering(products, (16e6, 100e6, 2e9)), *WIDE]
# Of float16 rows all that a chunk of streamed ones holds and more (`gpuclust.cluster.backends.tile`).
ON_CUDA = [
    *covering(kernel_products, (200e6, 800e6, 2e9, 8e9)),
    *WIDE,
    Case(3500, 4096, 1000, F16, "plain", "duplicates", 2, None),
    Case(13_000, 1025, 300, F32, "columns first", "offset", 1, None),
    Case(20_000, 128, 1000, F32, "plain", "near ties", 3, "unequal"),
]
INTERPRETED = [
    *covering(interpreted, (64, 600, 1200)),
    Case(1009, 1000, 1000, F32, "plain", "relu", 1, None),
    # The widest take it many steps, however few their rows.
    Case(2, 70_001, 2, F64, "part of the columns", "relu", 1, "unequal"),
    Case(130, 1025, 129, F16, "plain", "near ties", 2, None),
    Case(65, 2049, 130, BF16, "every other row", "relu", 1, "some zero"),
]
# Offsets beyond 2**31 values and beyond 2**32: of rows, and of features. On a GPU they take 9 GB.
FAR = [
    Case(1040, 8, 5, F16, "far rows", "noise", 2, "unequal"),
    Case(520, 130, 40, BF16, "far rows", "noise", 1, None),
    Case(70, 1040, 33, F16, "far columns", "noise", 1, "some zero"),
]
ON_A_GPU = [pytest.mark.gpu]
# Triton's interpreter computes in NumPy, which warns of what is not a number where a device does not.
IN_NUMPY = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
RUNS = [
    *(pytest.param("torch", "cpu", case, id=f"torch-{case.name}") for case in [*CASES, *FAR]),
    *(
        pytest.param("triton", "cpu", case, id=f"triton-{case.name}", marks=pytest.mark.interpreter)
        for case in [*INTERPRETED, *FAR]
    ),
    *(
        pytest.param(name, "cuda", case, id=f"{name}-cuda-{case.name}", marks=ON_A_GPU)
        for case in [*ON_CUDA, *FAR]
        for name in ("torch", "triton", "cupy")
    ),
]


def backend_for(name: str, case: Case, device: str) -> Backend:
    """The backend, which must be able to solve the case: there is nothing in it that a backend may leave out."""
    problem = Problem(case.n, case.d, case.k, case.dtype, torch.device(device), case.weights is not None, case.restarts)
    return choose(name, problem)[0]


def check_assign(backend: Backend, case: Case, device: str) -> None:
    x = case.rows(device)
    centroids = case.centroids(x)
    moments = Moments.of(TensorSource(x))
    operand = backend.prepare(moments.frame, centroids, x.dtype)
    labels = torch.full((case.restarts, case.n), -7, dtype=torch.int32, device=device)
    rechecked = backend.assign(x, moments.frame.norms(moments.dist2), operand, labels, "exact")
    assert 0 <= int(rechecked) <= labels.numel()
    for found, given in zip(labels.cpu(), centroids, strict=True):
        assert mislabelled(found, x, given) == 0
    fast = torch.full_like(labels, -7)
    assert int(backend.assign(x, moments.frame.norms(moments.dist2), operand, fast, "fast")) == 0
    assert bool(((fast >= 0) & (fast < case.k)).all())


def check_accumulate(backend: Backend, case: Case, device: str) -> None:
    x, weight = case.rows(device), case.weight(device)
    weights = None if weight is None else Weights(weight)
    moments = Moments.of(TensorSource(x), None if weights is None else weights.lightest)
    values = None if weights is None else weights.values
    rng = np.random.RandomState(case.n)
    first, second = torch.from_numpy(rng.randint(case.k, size=(2, case.restarts, case.n)).astype(np.int32)).to(device)
    second = torch.where(torch.from_numpy(rng.rand(case.restarts, case.n) < 0.7).to(device), first, second)
    r, k, grid = case.restarts, case.k, moments.grid
    sums = torch.zeros(grid.levels, r, k, case.d, dtype=torch.float64, device=device)
    counts = torch.zeros(r, k, dtype=torch.float64, device=device)
    half = case.n // 2
    changed = torch.full((r,), 5, dtype=torch.int64, device=device)
    for plus, minus in ((first, None), (second, first)):
        for part in (slice(half, case.n), slice(0, half)):  # in any order
            some = None if values is None else values[part]
            old = None if minus is None else minus[:, part]
            if x[part].shape[0]:
                backend.accumulate(x[part], some, grid, plus[:, part], old, sums, counts, changed)
        check_sums(case, x, values, grid, plus, sums, counts)
    assert changed.tolist() == (5 + case.n + (first != second).sum(1)).tolist()


def check_sums(case, x, values, grid, labels, sums, counts) -> None:  # type: ignore[no-untyped-def]
    """Counts and sums of rows with these labels: bit for bit, and close to the sums in extended precision."""
    terms = x.cpu().double() * (1.0 if values is None else values.cpu()[:, None])
    magic = np.stack([level.cpu().numpy() for level in grid.magic])
    step = magic[-1] / 1.5 / 2.0**52
    for restart, label in enumerate(labels.cpu().numpy()):
        np.testing.assert_array_equal(counts[restart].cpu(), np.bincount(label, minlength=case.k))
        for first in range(0, case.d, 1024):  # of the widest rows no more than a cache holds
            span = slice(first, first + 1024)
            rest = terms[:, span].numpy().copy()
            for level, constant in enumerate(magic[:, span]):
                part = (rest + constant) - constant
                rest -= part
                expected = np.zeros((case.k, part.shape[1]))
                np.add.at(expected, label, part)
                np.testing.assert_array_equal(sums[level, restart, :, span].cpu().numpy(), expected)
        for column in range(min(case.d, 4)):
            for cluster in set(label[:3].tolist()):
                some = terms[label == cluster, column].tolist()
                true = math.fsum(some)
                got = sum(sums[:, restart, cluster, column].tolist())
                assert abs(got - true) <= len(some) * step[column] / 2 + 2.0**-52 * abs(true)


def promised_by_cuml(case: Case) -> bool:
    """Whether cuML takes the rows, and its float32 distances tell them apart."""
    kinds = ("blobs", "noise", "relu", "heavy tails", "near ties", "constant", "duplicates")
    return case.dtype in (F32, F64) and case.kind in kinds


def check_whole_fit(model: KMeans, case: Case, x: torch.Tensor, start: torch.Tensor) -> None:
    """What a fit of a rounding and a convergence of its own is: shapes, and labels that are as good as the best.

    The inertia is that of labels and centroids, and but for rounding no larger than with the nearest centroids or with
    the start's.
    """
    labels, weight = torch.as_tensor(model.labels_).cpu().long(), case.weight()
    assert labels.shape == (case.n,)
    assert model.cluster_centers_.shape == start.shape
    assert bool(((labels >= 0) & (labels < case.k)).all())
    assert 1 <= model.n_iter_ <= model.max_iter
    weights = np.ones(case.n) if weight is None else weight.numpy()
    dist2, values = reference_dist2(x, model.cluster_centers_), x.cpu().double()
    inertia = weights @ dist2[np.arange(case.n), labels]
    rounding = 1e-4 * (weights @ (values - values.mean(0)).square().sum(1).numpy()) + 1e-6 * case.n
    assert model.inertia_ == pytest.approx(inertia, rel=1e-9, abs=1e-300)
    assert inertia <= weights @ dist2.min(1) + rounding
    assert inertia <= weights @ reference_dist2(x, start).min(1) + rounding


@IN_NUMPY
@pytest.mark.parametrize(("name", "device", "case"), RUNS)
def test_labels_are_exact(name: str, device: str, case: Case) -> None:
    with full_precision(torch.device(device)):
        check_assign(backend_for(name, case, device), case, device)


@IN_NUMPY
@pytest.mark.parametrize(("name", "device", "case"), RUNS)
def test_sums_are_free_of_order(name: str, device: str, case: Case) -> None:
    with full_precision(torch.device(device)):
        check_accumulate(backend_for(name, case, device), case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "cupy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_fit_on_a_gpu_has_the_bits_of_the_cpu(backend: str, case: Case) -> None:
    x, ours = fit_on_the_cpu(case)
    weight = case.weight("cuda")
    theirs = KMeans(case.k, n_init=case.restarts, random_state=0, max_iter=5, backend=backend).fit(
        x.cuda(), sample_weight=weight
    )
    assert torch.equal(ours.labels_, theirs.labels_.cpu())
    assert torch.equal(ours.cluster_centers_, theirs.cluster_centers_.cpu())
    assert ours.inertia_ == theirs.inertia_


@lru_cache(maxsize=1)
def fit_on_the_cpu(case: Case) -> tuple[torch.Tensor, KMeans]:
    x = case.rows()
    model = KMeans(case.k, n_init=case.restarts, random_state=0, max_iter=5)
    return x, model.fit(x, sample_weight=case.weight())


# ---- cuML, which promises less


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if promised_by_cuml(case)], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")  # of cuML's own
def test_cuml_keeps_what_it_promises(case: Case) -> None:
    if reason := survey()["cuml"]:
        pytest.skip(reason)
    x, start = fit_from(case, "cuda")
    model = KMeans(case.k, init=start, max_iter=20, backend="cuml").fit(x, sample_weight=case.weight("cuda"))
    check_whole_fit(model, case, x, start)


def fit_from(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and centroids of their type to start from."""
    x = case.rows(device)
    return x, case.centroids(x)[0].to(x.dtype)


# ---- the set itself


MORE_CLUSTERS_THAN_ROWS = {
    frozenset([("n", n), ("k", k)]) for n in PROPERTIES["n"] for k in PROPERTIES["k"] if k != "n" and k > n
}
# Not in NumPy: 7e10 differences, several minutes, and 7e7 values whose sums take half a minute. A GPU has both.
TOO_LARGE = {frozenset([("d", 70_001), other]) for other in (("k", 1000), ("n", 1009))}
# In the interpreter 35 s and, of the widest rows, 20 s for each case: one stands for all.
TOO_MANY_STEPS = {frozenset([("d", 1025), ("k", 1000)])} | {pair for pair in all_pairs() if ("d", 70_001) in pair}


@pytest.mark.parametrize(
    ("cases", "left_out"),
    [(CASES, TOO_LARGE), (ON_CUDA, set()), (INTERPRETED, TOO_MANY_STEPS)],
    ids=["torch on the CPU", "CUDA", "Triton's interpreter"],
)
def test_every_pair_of_properties_stands_in_a_small_set(cases: list[Case], left_out: set) -> None:
    assert len(set(cases)) == len(cases) <= 200
    missing = all_pairs() - set().union(*map(covered, cases))
    assert missing - left_out == MORE_CLUSTERS_THAN_ROWS


def test_far_rows_and_columns_lie_beyond_32_bits_and_hold_the_same_values() -> None:
    for case in FAR:
        x = case.rows()
        assert max(x.stride(0) * (case.n - 1), x.stride(1) * (case.d - 1)) > (2**32 if 1040 in x.shape else 2**31)
        assert torch.equal(x, replace(case, layout="plain").rows())


def test_the_checks_find_a_wrong_label_and_a_wrong_sum() -> None:
    case = Case(65, 8, 5, torch.float32, "plain", "noise", 1, None)

    class Wrong:
        def __init__(self) -> None:
            self.right = backend_for("torch", case, "cpu")

        def prepare(self, *given):  # type: ignore[no-untyped-def]
            return self.right.prepare(*given)

        def assign(self, x, norms, operand, labels, precision):  # type: ignore[no-untyped-def]
            count = self.right.assign(x, norms, operand, labels, precision)
            dist2 = reference_dist2(x, operand.centroids[0])
            labels[0, 3] = int(dist2[3].argmax())
            return count

        def accumulate(self, x, weights, grid, plus, minus, sums, counts, changed):  # type: ignore[no-untyped-def]
            self.right.accumulate(x, weights, grid, plus, minus, sums, counts, changed)
            sums[0, 0, 0, 0] += grid.magic[0][0] / 2**52

    with pytest.raises(AssertionError):
        check_assign(Wrong(), case, "cpu")  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        check_accumulate(Wrong(), case, "cpu")  # type: ignore[arg-type]


def test_the_check_of_a_whole_fit_takes_an_exact_one_and_finds_what_is_wrong() -> None:
    case = Case(257, 8, 5, F32, "plain", "blobs", 1, "unequal")
    x, start = fit_from(case, "cpu")
    model = KMeans(case.k, init=start, max_iter=20).fit(x, sample_weight=case.weight())
    check_whole_fit(model, case, x, start)
    dist2, weights = reference_dist2(x, model.cluster_centers_), case.weight().numpy()  # type: ignore[union-attr]
    farthest = dist2.argmax(1).astype(np.int32)
    far = start + 30
    from_far = reference_dist2(x, far)
    for changes in (
        {"labels_": farthest},
        {"labels_": farthest, "inertia_": weights @ dist2.max(1)},
        {"labels_": from_far.argmin(1), "cluster_centers_": far, "inertia_": weights @ from_far.min(1)},
        {"inertia_": model.inertia_ + 1.0},
        {"cluster_centers_": model.cluster_centers_[:, :7]},
        {"labels_": model.labels_[1:]},
        {"labels_": model.labels_ - case.k},
        {"n_iter_": 21},
    ):
        wrong = copy(model)
        vars(wrong).update(changes)
        with pytest.raises(AssertionError):
            check_whole_fit(wrong, case, x, start)


# ---- more than 2**31 values


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton", "cupy"])
def test_more_than_2_to_the_31_values(name: str) -> None:
    """The last rows of as many, and all sums, which are the same bits in two parts."""
    d, n, k = 4096, 2**31 // 4096 + 300, 5
    x = torch.randn(n, d, device="cuda", dtype=F16)
    moments = Moments.of(TensorSource(x))
    backend = choose(name, Problem(n, d, k, x.dtype, x.device))[0]
    centroids = x[[0, 5, n // 2, n - 2, n - 1]].float()[None]
    labels = torch.full((1, n), -7, dtype=torch.int32, device=x.device)
    with full_precision(x.device):
        operand = backend.prepare(moments.frame, centroids, x.dtype)
        backend.assign(x, moments.frame.norms(moments.dist2), operand, labels, "exact")
        some = slice(n - 2000, n)
        assert mislabelled(labels[0, some].cpu(), x[some], centroids[0]) == 0
        levels = moments.grid.levels
        sums, parts = torch.zeros(2, levels, 1, k, d, dtype=F64, device=x.device)
        counts, numbers = torch.zeros(2, 1, k, dtype=F64, device=x.device)
        backend.accumulate(x, None, moments.grid, labels, None, sums, counts)
        for part in (slice(0, n // 2), slice(n // 2, n)):
            backend.accumulate(x[part], None, moments.grid, labels[:, part], None, parts, numbers)
    assert torch.equal(sums, parts)
    assert torch.equal(counts, numbers)
    assert counts[0].tolist() == labels[0].bincount(minlength=k).tolist()
