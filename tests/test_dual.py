"""The dual solver: the primal's bits, from the products of the rows alone; its bounds; and when it is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, blobs, mislabelled, rows

from gpuclust import KMeans
from gpuclust.cluster import dual as dual_module
from gpuclust.cluster import gram as gram_module
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.dual import Dual
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.gram import Gram
from gpuclust.cluster.lloyd import Lloyd, Weights
from gpuclust.cluster.memory import dual_needs, primal_needs
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.solver import Plan, plan
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.errors import MemoryLimitError, UnavailableError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def fit(x: torch.Tensor, k: int, solver: str, **options: Any) -> Fit:
    return fit_kmeans(TensorSource(x), k, solver=solver, **{"n_init": 3, "seed": 1, **options})


def require_same(x: torch.Tensor, k: int, **options: Any) -> Fit:
    """Fit with both solvers: the dual one's fit."""
    primal, dual = (fit(x, k, solver, **options) for solver in ("primal", "dual"))
    assert (primal.solver, dual.solver) == ("primal", "dual")
    for name in ("labels", "centroids", "dist2"):
        assert torch.equal(getattr(primal, name), getattr(dual, name)), name
    assert (primal.inertia, primal.n_iter) == (dual.inertia, dual.n_iter)
    assert primal.centroids.dtype == dual.centroids.dtype
    assert len(primal.trace) == len(dual.trace)
    return dual


def some_weights(n: int, zeros: bool = False) -> torch.Tensor:
    values = np.random.RandomState(2).exponential(size=n)
    values[::3] *= not zeros
    return torch.from_numpy(values)


def lloyd_of(x: torch.Tensor, weights: torch.Tensor | None = None, **options: Any) -> Lloyd:
    source = TensorSource(x)
    shares = None if weights is None else Weights(weights)
    moments = Moments.of(source, None if shares is None else shares.lightest)
    given = {"max_iter": 300, "tol": 0.0, "precision": "exact", **options}
    return Lloyd(TorchBackend(), source, moments, moments.block.group, shares, lambda restarts: 64, 1 << 30, **given)


# ---- the primal's bits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_primal_solver(kind: str, dtype: torch.dtype, weighted: bool) -> None:
    for (n, d), init in itertools.product([(90, 400), (150, 5)], ["k-means++", "random"]):
        x = rows(kind, n, d, dtype)
        require_same(x, 5, init=init, weights=some_weights(n) if weighted else None)


@pytest.mark.parametrize("tol", [0.0, 1e-4, 0.05, 10.0])
@pytest.mark.parametrize("max_iter", [1, 2, 7, 300])
@pytest.mark.parametrize("kind", ["noise", "relu", "offset"])
def test_restarts_end_where_the_primals_end(kind: str, max_iter: int, tol: float) -> None:
    for dtype, n_init in ((torch.float32, 4), (torch.float16, 1)):
        require_same(rows(kind, 200, 90, dtype), 7, tol=tol, max_iter=max_iter, n_init=n_init)


def test_a_tolerance_within_the_bound_is_decided_by_true_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    plain = Dual._step
    monkeypatch.setattr(Dual, "_step", lambda *given: steps.append(0) or plain(*given))
    x = rows("noise", 300, 40)
    moments = Moments.of(TensorSource(x))
    for shift in fit(x, 5, "primal", n_init=1, tol=0.0).trace[1:4]:
        for tol in (np.nextafter(shift, 0), shift, np.nextafter(shift, 1)):
            before = len(steps)
            require_same(x, 5, n_init=1, tol=float(tol) * x.numel() / moments.spread)
            assert len(steps) > before


@pytest.mark.parametrize("weighted", [False, True])
def test_given_centroids_and_empty_clusters(weighted: bool) -> None:
    x = rows("blobs", 120, 300)
    weights = some_weights(120, zeros=True) if weighted else None
    far = x.abs().amax() * 50
    for seed in range(4):
        rng = np.random.RandomState(seed)
        start = torch.from_numpy(blobs(rng, 6, 300)).float()
        start[:seed] += far
        require_same(x, 6, init=[start, start.flip(0)], n_init=2, weights=weights)
        require_same(x, 6, init=[start[:1].expand(6, -1).clone()], n_init=1, weights=weights)


@pytest.mark.parametrize("kind", ["duplicates", "near ties", "noise"])
def test_few_rows_many_clusters_and_repeated_rows(kind: str) -> None:
    for n, d in ((1, 1), (2, 9), (40, 3), (37, 130)):
        x = rows(kind, max(n, 2), d)[:n]
        for k in sorted({1, 2, n // 2, n} & set(range(1, n + 1))):
            for init in ("k-means++", "random"):
                require_same(x, k, init=init)
    same = torch.full((30, 50), 3.7)
    for k in (1, 3, 30):
        require_same(same, k)
    few = rows("noise", 3, 80)[torch.arange(45) % 3]
    require_same(few, 5)
    require_same(few.double(), 5, weights=some_weights(45))


@pytest.mark.parametrize("scale", [1e-160, 1e-120, 1e140])
def test_scales_where_squares_leave_the_range_of_float64(scale: float) -> None:
    require_same(rows("noise", 60, 30, torch.float64) * scale, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes_and_beginnings(dtype: torch.dtype) -> None:
    rng = np.random.RandomState(5)
    for _ in range(12):
        n, d, k = rng.randint(8, 120), int(10 ** rng.uniform(0, 3)), rng.randint(1, 8)
        kind = list(KINDS)[rng.randint(6)]
        weights = some_weights(n, zeros=bool(rng.randint(2))) if rng.randint(2) else None
        require_same(rows(kind, n, d, dtype, seed=rng.randint(99)), k, seed=int(rng.randint(99)), weights=weights)


def test_chunks_and_memory_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("relu", 200, 1500)
    first = fit(x, 5, "dual", n_init=6)
    for size in ("1KiB", "100KiB"):
        monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", size)
        found = require_same(x, 5, n_init=6)
        assert torch.equal(found.centroids, first.centroids)
    monkeypatch.delenv("GPUCLUST_CHUNK_BYTES")
    found = require_same(x, 5, n_init=6, memory_limit=6_000_000)
    assert torch.equal(found.labels, first.labels)
    monkeypatch.setattr(dual_module, "_PIECE_VALUES", {"cpu": 1})
    require_same(x, 5, n_init=6)


def test_a_source_of_many_chunks_has_the_bits_of_a_tensor() -> None:
    class Pieces(TensorSource):
        def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
            for start, x in super().chunks(min(rows, 37)):
                kept = x.clone()
                yield start, kept
                kept.fill_(torch.nan)  # its memory may be used again

    x = rows("relu", 150, 200)
    first, other = (fit_kmeans(source, 5, solver="dual", n_init=3, seed=1) for source in (TensorSource(x), Pieces(x)))
    assert torch.equal(first.labels, other.labels)
    assert torch.equal(first.centroids, other.centroids)
    assert first.inertia == other.inertia


def test_a_strided_view_has_the_bits_of_its_copy() -> None:
    x = torch.cat([rows("noise", 150, 200)] * 2, 1)[::2, 100:290]
    assert torch.equal(fit(x, 4, "dual").centroids, fit(x.contiguous(), 4, "primal").centroids)


def test_fast_labels_belong_to_centroids_within_float32() -> None:
    x = rows("blobs", 200, 50)
    found = fit(x, 5, "dual", precision="fast")
    assert found.recheck_share == 0
    assert mislabelled(found.labels, x, found.centroids) == 0


# ---- the bounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["noise", "relu", "offset", "heavy tails", "unequal features", "one far row"])
def test_scores_are_within_their_bounds_of_the_true_distances(
    kind: str, weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(kind, 80, 200, dtype)
    dual = Dual(lloyd_of(x, some_weights(80) if weighted else None))
    checked = []
    plain = Dual._label

    def label(self: Dual, centres: Any) -> torch.Tensor:
        scores, bound = self._scores(centres, slice(None))
        for i in range(len(scores)):
            centroids = self._true(centres, i, list(range(4))).numpy().astype(np.longdouble)
            values = x.double().numpy().astype(np.longdouble)
            dist2 = np.square(values[:, None] - centroids).sum(2).T * np.longdouble(self.gram.scale) ** 2
            score = scores[i].numpy() + self.gram.dist2.numpy().astype(np.longdouble)
            least = self.gram.dist2.numpy() * 2.0**-40  # of the row itself, the same for all centroids
            once = ~centres.repeated[i].numpy()
            assert (np.abs(score - dist2) <= bound[i].numpy() + least)[once].all()
            checked.append(i)
            centres.known[i] = centres.known[i] if centres.home[i, 0] < 0 else {}
        return plain(self, centres)

    monkeypatch.setattr(Dual, "_label", label)
    dual.run([[0, 1, 2, 3], [10, 20, 30, 40], x[4:8].to(dual.means.dtype) * 1.5])
    assert len(checked) >= 6


def test_sums_that_follow_the_rows_stay_within_their_bounds() -> None:
    x = rows("noise", 300, 60)
    dual = Dual(lloyd_of(x))
    rng = np.random.RandomState(0)
    labels = torch.from_numpy(rng.randint(5, size=(2, 300))).int()
    centres = dual_module.Centres.empty(2, 5, 300, x.device)
    for _ in range(30):
        counts = torch.stack([torch.bincount(row, minlength=5) for row in labels]).double()
        centres.move(dual.gram, dual.rounding, labels, counts, counts)
        member = torch.nn.functional.one_hot(labels.long(), 5).mT.double()
        exact = member.numpy().astype(np.longdouble) @ dual.gram.values.numpy().astype(np.longdouble)
        assert (np.abs(centres.inner.numpy() - exact) <= (centres.error[..., None] * dual.gram.norms).numpy()).all()
        moved = torch.from_numpy(rng.randint(300, size=20))
        labels[:, moved] = torch.from_numpy(rng.randint(5, size=(2, 20))).int()
    assert (centres.error < 1e-9).all()


@pytest.mark.parametrize("n", [1, 2, 7, 65, 150])
def test_the_triangle_of_blocks_is_the_whole_product(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("relu", max(2, n), 333)[:n]
    moments = Moments.of(TensorSource(x))
    for size in (None, "1KiB"):
        if size:
            monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", size)
        gram = Gram(TensorSource(x), moments)
        moved = (x.double() - moments.mean) * gram.scale
        exact = moved.numpy().astype(np.longdouble) @ moved.numpy().astype(np.longdouble).T
        allowed = gram.error * torch.outer(gram.norms, gram.norms).numpy()
        assert (np.abs(gram.values.numpy() - exact) <= allowed).all()
        products, square = gram.products(x[:1])
        np.testing.assert_allclose(products[0], gram.values[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(square, gram.dist2[:1], rtol=1e-9, atol=1e-12)


def test_only_the_triangle_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    plain = torch.Tensor.addmm_

    def counted(self: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        return plain(self, a, b, **options)

    x = rows("noise", 160, 100)
    moments = Moments.of(TensorSource(x))
    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    Gram(TensorSource(x), moments)
    assert sum(done) == 160 * 160 * 100 * (1 + 1 / gram_module.BLOCKS) / 2


@pytest.mark.parametrize("kind", ["blobs", "noise", "relu"])
def test_hardly_a_row_is_read_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    plain = TensorSource.take

    def take(self: TensorSource, index: torch.Tensor) -> torch.Tensor:
        taken.append(len(index))
        return plain(self, index)

    x = rows(kind, 400, 2000)
    monkeypatch.setattr(TensorSource, "take", take)
    found = fit(x, 5, "dual", n_init=8)
    assert found.recheck_share < 1e-3
    # The seeds, one restart's true centroids, and little else.
    assert sum(taken) < 8 * 5 * 3 + 3 * 400


# ---- the choice


def problem(n: int, d: int, k: int, restarts: int, ranks: int = 1) -> Problem:
    return Problem(n, d, k, torch.float32, torch.device("cpu"), restarts=restarts, ranks=ranks)


def test_the_choice_is_by_predicted_time() -> None:
    wide, many, large = (
        plan(problem(*sizes)) for sizes in ((1000, 65_000, 50, 10), (70_000, 784, 10, 10), (9000, 200_000, 100, 10))
    )
    assert wide.choose("auto") == ("dual", wide.dual)
    assert wide.dual_s < wide.primal_s
    assert many.choose("auto")[0] == "primal"
    assert large.choose("auto")[0] == "primal"  # its matrix takes more than is used without a limit
    assert "beside the rows, of 988 MB" in str(large.refused)
    near = plan(problem(2000, 6000, 40, 10))  # its matrix is two thirds of the rows
    assert near.dual_s < near.primal_s
    assert near.choose("auto")[0] == "primal"
    assert plan(problem(2000, 6000, 40, 10), asked=True).choose("dual")[0] == "dual"
    roomy = plan(problem(9000, 200_000, 100, 10), 8 << 30)
    assert roomy.choose("auto")[0] == "dual"
    assert roomy.choose("primal")[0] == "primal"


def test_the_solver_that_the_limit_allows_is_taken() -> None:
    wide = problem(300, 100_000, 50, 4)
    primal, dual = primal_needs(wide, wide.n), dual_needs(wide, wide.n)
    assert plan(wide, primal.least).choose("primal")[0] == "primal"
    costs = plan(wide, (primal.least + dual.least) // 2)
    assert costs.choose("auto") == ("dual", costs.dual)
    with pytest.raises(MemoryLimitError):
        costs.choose("primal")
    short = plan(problem(70_000, 784, 10, 10), 3_000_000)
    for solver in ("auto", "primal"):
        with pytest.raises(MemoryLimitError, match=r"leaves 3 MB beside X, and this fit takes at least 7.\d+ MB"):
            short.choose(solver)


def test_near_the_break_even_both_predictions_are_close() -> None:
    costs = plan(problem(1000, 64_896, 5, 10))
    assert 0.5 < costs.primal_s / costs.dual_s < 2
    assert costs.dual_s == pytest.approx(1.1, rel=0.3)  # 0.9 to 1.0 s was measured for the matrix alone


def test_the_plan_is_one_line_with_both_solvers() -> None:
    lines: list[str] = []
    x = rows("noise", 60, 9000)
    found = fit_kmeans(TensorSource(x), 12, n_init=10, seed=1, tell=lines.append)
    assert found.solver == "dual"
    assert lines[0] == found.plan
    assert found.plan == str(plan(problem(60, 9000, 12, 10)))
    assert found.plan.startswith("dual: ")
    assert "; primal: " in found.plan
    assert sum(line.startswith("restart ") for line in lines) == 10
    other = fit(x, 12, "primal", n_init=10)
    assert torch.equal(other.labels, found.labels)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"memory_limit": 10_000_000}, "beside the rows, of 10 MB"),
        ({"ranks": 3}, "3 processes"),
    ],
)
def test_where_it_cannot_run_it_is_refused(given: dict[str, Any], reason: str) -> None:
    costs = plan(problem(1000, 65_000, 5, 10, given.pop("ranks", 1)), asked=True, **given)
    assert isinstance(costs, Plan)
    assert costs.limited or costs.choose("auto")[0] == "primal"
    assert reason in str(costs)
    with pytest.raises(UnavailableError, match=f"solver='dual' cannot run here: .*{reason}"):
        costs.choose("dual")


def test_the_estimator_takes_it_for_any_data_and_for_chunks() -> None:
    x = blobs(np.random.RandomState(0), 300, 4)
    one, other = (KMeans(5, solver=solver, random_state=0, n_init=2).fit(x) for solver in ("dual", "primal"))
    np.testing.assert_array_equal(one.labels_, other.labels_)
    np.testing.assert_array_equal(one.cluster_centers_, other.cluster_centers_)
    assert (one.inertia_, one.n_iter_) == (other.inertia_, other.n_iter_)
    assert one.fit_report_.solver == "dual"
    chunked = KMeans(5, solver="dual", random_state=0, n_init=2).fit([x[:100], x[100:]])
    np.testing.assert_array_equal(chunked.labels_, one.labels_)
    with pytest.raises(UnavailableError, match="beside the rows"):
        KMeans(5, solver="dual", memory_limit=100_000).fit(x)


def test_a_matrix_that_no_memory_holds_is_refused_beforehand() -> None:
    x = torch.zeros(1, 4).expand(3_000_000, 4)  # of which the matrix would have 72 TB
    with pytest.raises(UnavailableError, match="solver='dual' cannot run here: it takes"):
        fit_kmeans(TensorSource(x), 2, solver="dual")
