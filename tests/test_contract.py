"""The contract of a backend, over one covering set of problems: every backend that this machine can run keeps it.

No label but the nearest by the reference distance; counts exact; sums the same bits as any other order of adding, and
within the grid's bound of the true sums.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases_cluster import mislabelled, reference_dist2
from cases_contract import Case, covering

from gpuclust import KMeans
from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends import choose
from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource

CASES = covering()
# What an interpreter can do in a second or two; the widest take it many steps, however few their rows.
SMALL = [case for case in covering(300_000) if case.d < 70_001]
SMALL += [case for case in covering(300_000) if case.d == 70_001 and case.restarts == 1][:1]
ON_A_GPU = [pytest.mark.gpu]
# Triton's interpreter computes in NumPy, which warns of what is not a number where a device does not.
IN_NUMPY = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
RUNS = [
    *(pytest.param("torch", "cpu", case, id=f"torch-{case.name}") for case in CASES),
    *(pytest.param("triton", "cpu", case, id=f"triton-{case.name}", marks=pytest.mark.interpreter) for case in SMALL),
    *(
        pytest.param(name, "cuda", case, id=f"{name}-cuda-{case.name}", marks=ON_A_GPU)
        for name in ("torch", "triton", "cupy")
        for case in CASES
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
    for found, given in zip(labels.cpu(), centroids.cpu(), strict=True):
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
    for plus, minus in ((first, None), (second, first)):
        for part in (slice(half, case.n), slice(0, half)):  # in any order
            some = None if values is None else values[part]
            old = None if minus is None else minus[:, part]
            if x[part].shape[0]:
                backend.accumulate(x[part], some, grid, plus[:, part], old, sums, counts)
        check_sums(case, x, values, grid, plus, sums, counts)


def check_sums(case, x, values, grid, labels, sums, counts) -> None:  # type: ignore[no-untyped-def]
    """Counts and sums of rows with these labels: bit for bit, and close to the sums in extended precision."""
    terms = x.cpu().double() * (1.0 if values is None else values.cpu()[:, None])
    magic = [level.cpu() for level in grid.magic]
    step = magic[-1].numpy() / 1.5 / 2.0**52
    for restart, label in enumerate(labels.cpu().numpy()):
        np.testing.assert_array_equal(counts[restart].cpu(), np.bincount(label, minlength=case.k))
        rest = terms.numpy().copy()
        for level, constant in enumerate(magic):
            part = (rest + constant.numpy()) - constant.numpy()
            rest -= part
            expected = np.zeros((case.k, case.d))
            np.add.at(expected, label, part)
            np.testing.assert_array_equal(sums[level, restart].cpu().numpy(), expected)
        for column in range(min(case.d, 4)):
            for cluster in set(label[:3].tolist()):
                some = terms[label == cluster, column].tolist()
                true = math.fsum(some)
                got = sum(sums[:, restart, cluster, column].tolist())
                assert abs(got - true) <= len(some) * step[column] / 2 + 2.0**-52 * abs(true)


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
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["torch", "triton", "cupy"])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_fit_on_a_gpu_has_the_bits_of_the_cpu(backend: str, case: Case) -> None:
    x, weight = case.rows(), case.weight()
    model = KMeans(case.k, n_init=case.restarts, random_state=0, max_iter=5)
    ours = model.fit(x, sample_weight=weight)
    theirs = KMeans(case.k, n_init=case.restarts, random_state=0, max_iter=5, backend=backend).fit(
        x.cuda(), sample_weight=None if weight is None else weight.cuda()
    )
    assert torch.equal(ours.labels_, theirs.labels_.cpu())
    assert torch.equal(ours.cluster_centers_, theirs.cluster_centers_.cpu())
    assert ours.inertia_ == theirs.inertia_


# ---- the set itself


def test_the_set_covers_every_value_and_stays_small() -> None:
    assert 100 <= len(CASES) <= 200
    for name, values in (
        ("n", {1, 127, 256, 257, 1009}),
        ("d", {1, 3, 127, 1000, 70_001}),
        ("k", {1, 2, 5, 100, 1000}),
        ("dtype", {torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    ):
        assert values <= {getattr(case, name) for case in CASES}
    assert any(case.k == case.n > 2 for case in CASES)


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

        def accumulate(self, x, weights, grid, plus, minus, sums, counts):  # type: ignore[no-untyped-def]
            self.right.accumulate(x, weights, grid, plus, minus, sums, counts)
            sums[0, 0, 0, 0] += grid.magic[0][0] / 2**52

    with pytest.raises(AssertionError):
        check_assign(Wrong(), case, "cpu")  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        check_accumulate(Wrong(), case, "cpu")  # type: ignore[arg-type]


# ---- more than 2**31 values


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torch", pytest.param("triton", marks=ON_A_GPU), pytest.param("cupy", marks=ON_A_GPU)]
)
def test_offsets_beyond_32_bits(name: str) -> None:
    """The last rows of a tensor of more than 2**31 values, of which the CPU's are all in one place."""
    device = "cpu" if name == "torch" else "cuda"
    d, n = 4096, 2**31 // 4096 + 300
    if device == "cpu":
        x = torch.randn(n + d, generator=torch.Generator().manual_seed(0)).half().as_strided((n, d), (1, 1))
    else:
        x = torch.randn(n, d, device=device, dtype=torch.float16)
    centroids = x[[0, 5, n // 2, n - 2, n - 1]].float()[None]
    some = slice(n - 2000, n)
    part = Moments.of(TensorSource(x[some]))
    problem = Problem(n, d, 5, x.dtype, torch.device(device))
    backend = choose(name, problem)[0]
    operand = backend.prepare(part.frame, centroids, x.dtype)
    labels = torch.full((1, n), -7, dtype=torch.int32, device=device)
    norms = torch.full((n,), part.frame.norms(part.dist2).amax().item() * 2, device=device)
    with full_precision(torch.device(device)):
        if device == "cpu":
            backend.assign(x[some], norms[some], operand, labels[:, some], "exact")
        else:
            backend.assign(x, norms, operand, labels, "exact")
    assert mislabelled(labels[0, some].cpu(), x[some], centroids[0].cpu()) == 0
