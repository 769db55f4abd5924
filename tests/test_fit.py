"""A whole fit: the same bits whatever the chunks, threads, memory and layout; the best of its restarts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, blobs, mislabelled, reference_dist2, rows
from cases_rows import Changing, needs, reorder

from gpuclust.cluster import fit as fit_module
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.sources.base import ChunkSource, TensorSource
from gpuclust.errors import InputError, UnavailableError

SHAPES = [("relu", 1500, 24, torch.float32), ("offset", 900, 1500, torch.float16), ("noise", 1500, 10, torch.float64)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BEYOND_HALF = ("huge", "tiny", "subnormal")


class Uneven:
    """A source that is no tensor: its chunks are copies, and smaller than was asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x, self.shape, self.dtype, self.device, self.resident = x, tuple(x.shape), x.dtype, x.device, True

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(self._x), max(1, min(rows, 97))):
            yield start, self._x[start : start + max(1, min(rows, 97))].clone()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self._x[index]


def fit(x: torch.Tensor | ChunkSource, k: int = 6, **options: Any) -> Fit:
    source = TensorSource(x) if isinstance(x, torch.Tensor) else x
    return fit_kmeans(source, k, **{"n_init": 3, "seed": 1, "max_iter": 12, **options})


def require_same(one: Fit, other: Fit) -> None:
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.centroids, other.centroids)
    assert torch.equal(one.dist2, other.dist2)
    assert (one.inertia, one.n_iter, one.trace) == (other.inertia, other.n_iter, other.trace)


def weights_for(x: torch.Tensor, weighted: bool) -> torch.Tensor | None:
    return torch.from_numpy(np.random.RandomState(2).exponential(size=len(x))) if weighted else None


# ---- the same bits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize(("kind", "n", "d", "dtype"), SHAPES, ids=str)
def test_chunks_threads_memory_and_sources_do_not_change_a_bit(
    kind: str, n: int, d: int, dtype: torch.dtype, init: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(kind, n, d, dtype)
    weights = weights_for(x, weighted)
    first = fit(x, init=init, weights=weights)
    for size in ("1KiB", "100KiB", "1GiB"):
        monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", size)
        require_same(first, fit(x, init=init, weights=weights))
    monkeypatch.delenv("GPUCLUST_CHUNK_BYTES")
    least = needs(x, 6, 2.0**-20 if weighted else None).least
    for limit in (least, 4 * least, 1 << 30):
        require_same(first, fit(x, init=init, weights=weights, memory_limit=limit))
    require_same(first, fit(Uneven(x), init=init, weights=weights))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            require_same(first, fit(x, init=init, weights=weights))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["columns first", "every other row", "part of wider rows", "reversed rows copied"])
def test_the_layout_of_the_rows_does_not_change_a_bit(layout: str) -> None:
    x = rows("relu", 1000, 17)
    views = {
        "columns first": lambda: x.t().contiguous().t(),
        "every other row": lambda: x.repeat_interleave(2, dim=0)[::2],
        "part of wider rows": lambda: torch.cat([x, x, x], dim=1)[:, 17:34],
        "reversed rows copied": lambda: x.flip(0).flip(0),
    }
    require_same(fit(x), fit(views[layout]()))


def told_of_restarts(x: torch.Tensor, n_init: int, **options: Any) -> list[list[str]]:
    """What a fit tells of each restart: its iterations, its end, its result."""
    lines: list[str] = []
    fit(x, n_init=n_init, tell=lines.append, **options)
    return [[line for line in lines if re.search(rf"restart {i}\b", line)] for i in range(n_init)]


def test_a_restart_is_the_same_alone_and_among_others() -> None:
    x = rows("noise", 800, 5)
    for init in ("k-means++", "random"):
        lines = told_of_restarts(x, init=init, n_init=5)
        assert min(map(len, lines)) > 3
        for count in (1, 2, 4):
            assert told_of_restarts(x, init=init, n_init=count) == lines[:count]
        assert told_of_restarts(x, init=init, n_init=5, memory_limit=needs(x, 6).least) == lines


def test_given_restarts_are_the_same_alone_and_among_others() -> None:
    x = rows("noise", 800, 5)
    starts = [x[i::100][:6].clone() for i in range(4)]
    alone = [fit(x, init=[start], n_init=1) for start in starts]
    best = min(alone, key=lambda found: found.inertia)
    require_same(fit(x, init=starts, n_init=4), best)
    assert len({found.inertia for found in alone}) > 1


# ---- the best of the restarts


def test_inertia_is_the_sum_of_reference_distances() -> None:
    for weighted in (False, True):
        x = rows("offset", 700, 9)
        weights = weights_for(x, weighted)
        found = fit(x, weights=weights)
        dist2 = reference_dist2(x, found.centroids)[np.arange(700), found.labels.numpy()]
        np.testing.assert_array_equal(found.dist2.numpy(), dist2)
        assert found.inertia == pytest.approx((dist2 if weights is None else dist2 * weights.numpy()).sum(), rel=1e-13)


@pytest.mark.parametrize("kind", ["noise", "offset"])
def test_the_restart_of_least_inertia_wins(kind: str) -> None:
    x = rows(kind, 500, 4, torch.float64)
    lines: list[str] = []
    found = fit(x, 9, n_init=12, tell=lines.append, max_iter=300)
    lines = [line for line in lines if line.startswith("restart")]
    values = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(set(values)) > 3
    assert found.inertia == pytest.approx(min(values), rel=1e-8)
    assert found.n_iter == int(lines[int(np.argmin(values))].split()[2])


def test_of_equal_solutions_the_first_is_returned() -> None:
    x = torch.from_numpy(blobs(np.random.RandomState(0), 300, 3, k=4, apart=50.0))
    start = fit(x, 4, n_init=1).centroids
    orders = [torch.tensor(order) for order in ([2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0])]
    together = fit(x, 4, init=[start[order] for order in orders], n_init=3)
    require_same(together, fit(x, 4, init=[start[orders[0]]], n_init=1))


def test_mirrored_solutions_of_one_inertia_go_to_the_first() -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    starts = [x[[0, 2]], x[[2, 0]], x[[1, 3]]]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        given = [starts[i] for i in order]
        require_same(fit(x, 2, init=given, n_init=3), fit(x, 2, init=given[:1], n_init=1))


# ---- weights, reports, refusals


def test_rows_without_weight_get_labels_and_take_part_in_nothing_else() -> None:
    x = rows("blobs", 400, 3, torch.float64)
    weights = torch.ones(400, dtype=torch.float64)
    weights[::4] = 0
    other = x.clone()
    other[::4] = other[::4].flip(0) + 0.5
    start = [x[1:4].clone()]
    one, two = (fit(rows_, 3, init=start, n_init=1, weights=weights, tol=0.0) for rows_ in (x, other))
    kept = fit(x[weights > 0], 3, init=start, n_init=1, tol=0.0)
    for found in (one, two):
        np.testing.assert_allclose(found.centroids, kept.centroids, rtol=1e-12)
        assert torch.equal(found.labels[weights > 0], kept.labels)
        assert found.inertia == pytest.approx(kept.inertia, rel=1e-12)
    assert mislabelled(two.labels, other, two.centroids) == 0


def test_scaled_weights_scale_the_inertia_alone() -> None:
    x = rows("blobs", 400, 3, torch.float64)
    weights = weights_for(x, True)
    one, two = fit(x, weights=weights), fit(x, weights=weights * 2.0**20)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.centroids, two.centroids)
    assert two.inertia == one.inertia * 2.0**20


def test_the_fit_says_what_ran_and_what_did_not() -> None:
    found = fit(rows("near ties", 300, 4))
    assert (found.backend, found.solver, found.precision) == ("torch", "primal", "exact")
    assert set(found.rejected) == {"cupy", "triton", "cuml"}
    assert found.rejected["cuml"] == "auto never takes it: its labels are not exact"
    asked = fit(rows("noise", 30, 2), backend="torch")
    assert asked.rejected == dict.fromkeys(("cupy", "triton", "cuml"), "backend='torch' was asked for")
    assert 0 < found.recheck_share <= 1
    assert set(found.times) == {"moments_s", "seed_s", "iterate_s", "select_s"}
    assert min(found.times.values()) >= 0


def test_a_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="'cuml' cannot run here"):
        fit(rows("noise", 30, 2), backend="cuml")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_first_bad_value_is_named(value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("noise", 500, 6, dtype)
    x[321, 4] = value
    x[400, 1] = float("nan")
    for name in ("sources.base.block_rows", "moments.chunk_rows", "backends.plain.block_rows"):
        monkeypatch.setattr(f"gpuclust.cluster.{name}", lambda d, device, *_: 50)
    kind = str(dtype).removeprefix("torch.")
    what = "NaN" if np.isnan(value) else f"infinity or a value too large for dtype('{kind}')"
    with pytest.raises(InputError) as told:
        fit(x)
    assert str(told.value) == f"Input X contains {what}. It is {value} in row 321, column 4 (counted from 0)"


def test_values_whose_squares_overflow_are_refused() -> None:
    with pytest.raises(InputError, match="too large"):
        fit(rows("noise", 50, 3, torch.float64) * 1e153 * 1e2)
    x = rows("noise", 50, 3, torch.float64) * 1e150
    assert np.isfinite(fit(x).inertia)


def test_the_budget_groups_the_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = fit_module.Lloyd.run

    def run(self: Any, centroids: torch.Tensor, *others: Any) -> Any:
        sizes.append(len(centroids))
        return plain(self, centroids, *others)

    monkeypatch.setattr(fit_module.Lloyd, "run", run)
    x = rows("noise", 300, 5)
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "1KiB")
    takes = needs(x, 6)
    fit(x, n_init=5, memory_limit=takes.fixed + takes.work + 5 * takes.restart // 2)
    assert sizes == [2, 2, 1]


# ---- rows that change


def one_value(value: float) -> Callable[[torch.Tensor], Any]:
    return lambda x: x[len(x) // 2, :1].fill_(value)


CHANGES = {
    "NaN": one_value(float("nan")),
    "infinity": one_value(float("inf")),
    "NaN everywhere": lambda x: x.fill_(float("nan")),
    "one value": one_value(3.0),
    "a shift": lambda x: x.add_(1),
    "another order": reorder,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("solver", "init", "algorithm"),
    [("primal", "k-means++", "lloyd"), ("primal", "k-means||", "hartigan-wong"), ("dual", "random", "lloyd")],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, where rows are infinite
def test_rows_that_change_are_noticed(solver: str, init: str, algorithm: str, weighted: bool, change: str) -> None:
    x = rows("blobs", 160, 20)
    options = {"solver": solver, "init": init, "algorithm": algorithm, "weights": weights_for(x, weighted)}
    source = Changing(x.clone(), 0, CHANGES[change])
    fit(source, **options)
    for at in (2, 3, 4, 6, source.times // 2, source.times - 1, source.times):
        with pytest.raises(InputError, match=r"X changed between two passes|Input X contains"):
            fit(Changing(x.clone(), at, CHANGES[change]), **options)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_sums_and_distances_notice_it_without_a_sample(
    solver: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module.Sample, "require_unchanged", lambda self: None)
    x = rows("blobs", 160, 20)
    options = {"solver": solver, "init": [x[:6].clone()], "n_init": 1, "tol": 0.0}
    source = Changing(x.clone(), 0, CHANGES[change])
    fit(source, **options)
    # After the sample and the three passes of the moments, which everything else is compared with; an order counts from
    # the pass after that.
    for at in range(5 + (change == "another order"), source.times + 1):
        with pytest.raises(InputError, match=r"X changed between two passes"):
            fit(Changing(x.clone(), at, CHANGES[change]), **options)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS for dtype in DTYPES if dtype != torch.float16 or kind not in BEYOND_HALF],
    ids=str,
)
def test_rows_that_stay_are_not_changed(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = fit_module.Lloyd.doubt, []

    def doubt(self: Any, centroids: torch.Tensor, inertia: float) -> float:
        found = plain(self, centroids, inertia)
        asked.append(found)
        # So little that a row cannot hide in it, and yet eight times what it needs to be.
        assert found < 1e-3 * self.moments.spread or self.moments.frame.vanishing
        return found / 8

    monkeypatch.setattr(fit_module.Lloyd, "doubt", doubt)
    for n, d in ((400, 5), (60, 300)):
        x = rows(kind, n, d, dtype)
        heavy = torch.from_numpy(np.where(np.random.RandomState(0).rand(n) < 0.5, 1.0, 1e-9))
        for weights in (None, weights_for(x, True), heavy, heavy * 1e-300):
            for solver in ("primal", "dual"):
                fit(x, weights=weights, solver=solver, max_iter=4)
    assert len(asked) >= 16
