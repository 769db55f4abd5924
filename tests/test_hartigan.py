"""Moves of single rows after Lloyd's: never worse, often better, the same bits for any chunks, labels that belong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import mislabelled, reference_dist2, rows

from gpuclust import KMeans
from gpuclust.cluster import hartigan as hartigan_module
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.errors import UnavailableError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def fit(x: torch.Tensor, k: int, algorithm: str = "hartigan-wong", **options: Any) -> Fit:
    return fit_kmeans(TensorSource(x), k, algorithm=algorithm, **{"n_init": 2, "seed": 1, **options})


def gains(x: torch.Tensor, found: Fit, weights: np.ndarray | None = None) -> np.ndarray:
    """What each row would gain by its best move, in NumPy: (n,)."""
    labels, w = found.labels.numpy(), np.ones(len(x)) if weights is None else weights
    dist2 = reference_dist2(x, found.centroids)
    mass = np.bincount(labels, w, minlength=len(found.centroids))
    alone = np.bincount(labels[w > 0], minlength=len(mass))[labels] <= 1
    own = np.arange(len(x)), labels
    with np.errstate(divide="ignore", invalid="ignore"):
        saved = np.where(alone, 0, dist2[own] * mass[labels] * w / (mass[labels] - w))
        cost = np.nan_to_num(dist2 * (mass * w[:, None] / (mass + w[:, None])))
    cost[own] = np.inf
    return saved - cost.min(1)


def test_a_partition_where_lloyd_is_stuck() -> None:
    x = torch.tensor([[0.0], [4.0], [7.0]])
    start = [torch.tensor([[2.0], [7.0]])]
    stuck, moved = (fit(x, 2, algorithm, init=start, n_init=1) for algorithm in ("lloyd", "hartigan-wong"))
    assert (stuck.labels.tolist(), stuck.inertia) == ([0, 0, 1], 8.0)
    assert (moved.labels.tolist(), moved.inertia, moved.moves) == ([0, 1, 1], 4.5, 1)
    assert moved.centroids.tolist() == [[0.0], [5.5]]
    assert moved.n_iter == stuck.n_iter


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["blobs", "noise", "relu", "offset", "heavy tails", "duplicates", "near ties"])
def test_the_inertia_is_never_above_lloyds_and_no_move_helps_after(
    kind: str, dtype: torch.dtype, weighted: bool
) -> None:
    better = 0
    for n, d, k in ((60, 2, 8), (200, 9, 12)):
        x = rows(kind, n, d, dtype)
        weights = np.random.RandomState(2).exponential(size=n) if weighted else None
        given = {"weights": None if weights is None else torch.from_numpy(weights)}
        lloyd, found = (fit(x, k, algorithm, **given) for algorithm in ("lloyd", "hartigan-wong"))
        assert found.inertia <= lloyd.inertia
        assert (found.moves > 0) == (found.inertia < lloyd.inertia)
        assert found.n_iter == lloyd.n_iter
        assert mislabelled(found.labels, x, found.centroids) == 0
        dist2 = reference_dist2(x, found.centroids)[np.arange(n), found.labels.numpy()]
        w = np.ones(n) if weights is None else weights
        assert found.inertia == pytest.approx((dist2 * w).sum(), rel=1e-13)
        # The returned centroids are rounded, so a gain of that size is none.
        unit = 2.0**-20 if dtype != torch.float64 else 2.0**-40
        assert gains(x, found, weights).max() <= unit * np.square(x.double().numpy()).sum(1).max() * w.max()
        better += found.moves > 0
    assert better or kind in ("blobs", "offset", "duplicates")


@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_do_not_change_a_bit(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("noise", 400, 40)
    weights = torch.from_numpy(np.random.RandomState(2).exponential(size=400)) if weighted else None
    first = fit(x, 20, weights=weights)
    assert first.moves > 5
    for size, fetched, tile in (("1KiB", 1, 7), ("1GiB", 1000, 1000), ("10KiB", 3, 64)):
        monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", size)
        monkeypatch.setattr(hartigan_module, "_FETCHED", fetched)
        monkeypatch.setattr(hartigan_module, "tile_rows", lambda d, device, tile=tile: tile)
        for solver in ("primal", "dual"):
            other = fit(x, 20, weights=weights, solver=solver)
            assert torch.equal(first.labels, other.labels)
            assert torch.equal(first.centroids, other.centroids)
            assert (first.inertia, first.moves) == (other.inertia, other.moves)


def test_max_iter_bounds_the_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps: list[int] = []
    plain = hartigan_module._Partition._sweep

    def sweep(self: Any) -> int:
        sweeps.append(plain(self))
        return sweeps[-1]

    monkeypatch.setattr(hartigan_module._Partition, "_sweep", sweep)
    x = rows("noise", 300, 6)
    short = fit(x, 20, max_iter=2)
    assert len(sweeps) == 2
    assert short.moves == sum(sweeps) > 0
    sweeps.clear()
    found = fit(x, 20)
    assert sweeps[-1] == 0
    assert found.moves == sum(sweeps)
    assert found.inertia < short.inertia


@pytest.mark.parametrize("max_iter", [1, 2, 3, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_returned_belongs_together_however_early_the_sweeps_end(dtype: torch.dtype, max_iter: int) -> None:
    for seed in range(4):
        x = rows("noise", 150, 2 + seed, dtype)
        start = x[seed : seed + 12].clone()
        lloyd, found = (
            KMeans(12, init=start, n_init=1, max_iter=max_iter, algorithm=algorithm).fit(x)
            for algorithm in ("lloyd", "hartigan-wong")
        )
        assert mislabelled(found.labels_, x, found.cluster_centers_) == 0
        dist2 = reference_dist2(x, found.cluster_centers_)[np.arange(len(x)), found.labels_.numpy()]
        assert found.inertia_ == pytest.approx(dist2.sum(), rel=1e-13)
        assert found.inertia_ == -found.score(x)
        assert found.inertia_ <= lloyd.inertia_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_cluster_and_as_many_as_rows(dtype: torch.dtype) -> None:
    x = rows("noise", 30, 4, dtype)
    for k in (1, 30):
        lloyd, found = (fit(x, k, algorithm) for algorithm in ("lloyd", "hartigan-wong"))
        assert (found.moves, found.inertia) == (0, lloyd.inertia)
        assert torch.equal(found.labels, lloyd.labels)


def test_fewer_distinct_rows_than_clusters() -> None:
    x = rows("noise", 3, 5)[torch.arange(20) % 3]
    found = fit(x, 6)
    assert (found.inertia, found.moves) == (0.0, 0)
    same = fit(torch.full((20, 3), 3.7), 4)
    assert (same.inertia, same.moves) == (0.0, 0)


def test_rows_without_weight_do_not_move_by_themselves() -> None:
    x = rows("noise", 200, 2, torch.float64)
    weights = torch.ones(200, dtype=torch.float64)
    weights[::4] = 0
    start = [x[1:8].clone()]
    found = fit(x, 7, init=start, n_init=1, weights=weights)
    kept = fit(x[weights > 0], 7, init=start, n_init=1)
    assert torch.equal(found.labels[weights > 0], kept.labels)
    np.testing.assert_allclose(found.centroids, kept.centroids, rtol=1e-12)
    assert found.inertia == pytest.approx(kept.inertia, rel=1e-12)
    assert mislabelled(found.labels, x, found.centroids) == 0


def test_whole_weights_are_repeated_rows() -> None:
    x = rows("noise", 80, 3, torch.float64)
    weights = torch.from_numpy(np.random.RandomState(3).randint(1, 4, size=80)).double()
    found = fit(x, 9, weights=weights)
    lloyd = fit(x, 9, "lloyd", weights=weights)
    assert found.moves > 0
    repeated = x.repeat_interleave(weights.long(), 0)
    dist2 = reference_dist2(repeated, found.centroids).min(1).sum()
    assert found.inertia == pytest.approx(dist2, rel=1e-12)
    assert found.inertia < lloyd.inertia


@pytest.mark.parametrize("scale", [1e-160, 1e-120, 1e140])
def test_the_scale_changes_nothing_but_the_inertia(scale: float) -> None:
    x = rows("noise", 100, 3, torch.float64)
    found, lloyd = (fit(x * scale, 9, algorithm) for algorithm in ("hartigan-wong", "lloyd"))
    assert found.inertia <= lloyd.inertia
    assert (found.moves > 0) == (scale > 1e-150)


def test_only_rows_that_gain_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    plain = TensorSource.take

    def take(self: TensorSource, index: torch.Tensor) -> torch.Tensor:
        taken.append(len(index))
        return plain(self, index)

    x = rows("noise", 20_000, 3)
    lloyd = fit(x, 5, "lloyd", n_init=1, tol=1e-8)
    monkeypatch.setattr(TensorSource, "take", take)
    found = fit(x, 5, init=[lloyd.centroids], n_init=1, tol=1e-8)
    assert sum(taken[1:-1]) < 400  # between the samples that must not change
    assert found.inertia <= lloyd.inertia


def test_the_estimator_offers_it_and_streams() -> None:
    x = rows("noise", 300, 4, torch.float64).numpy()
    lloyd, found, streamed = (
        KMeans(20, random_state=0, algorithm=algorithm).fit(given)
        for algorithm, given in (("lloyd", x), ("hartigan-wong", x), ("hartigan-wong", [x[:100], x[100:]]))
    )
    assert found.inertia_ < lloyd.inertia_
    assert found.fit_report_.moves > 0
    np.testing.assert_array_equal(found.labels_, streamed.labels_)
    np.testing.assert_array_equal(found.cluster_centers_, streamed.cluster_centers_)


def test_rows_that_processes_share_are_refused() -> None:
    class Two:
        rank, size = 0, 2

        def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
            return tensor

        def gather(self, item: Any) -> list[Any]:
            return [item, item]

    with pytest.raises(UnavailableError, match="algorithm='hartigan-wong'"):
        fit(rows("noise", 30, 3), 3, group=Two())
