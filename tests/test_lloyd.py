"""The Lloyd loop beside scikit-learn's: when a restart ends, what becomes of empty clusters, and fits shared by two."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, blobs, mislabelled, reference_dist2, rows
from sklearn.cluster import KMeans as Peer

from gpuclust.cluster import step
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.distributed import Group, OneProcess
from gpuclust.cluster.lloyd import Lloyd, Solution, Weights
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource


def lloyd(
    x: torch.Tensor,
    centroids: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    max_iter: int = 300,
    tol: float = 0.0,
    group: Group | None = None,
    moments: Moments | None = None,
    chunk: int = 64,
    late: int = 0,
) -> tuple[list[Solution], Lloyd]:
    """Solutions from centroids (r, k, d); ``tol`` relative, as in the estimator."""
    source = TensorSource(x)
    shares = None if weights is None else Weights(weights)
    known = moments or Moments.of(source, None if shares is None else shares.lightest)
    loop = Lloyd(
        TorchBackend(),
        source,
        known,
        group or OneProcess(),
        shares,
        lambda restarts: chunk,
        1 << 30,
        max_iter=max_iter,
        tol=tol * known.spread / x.numel(),
        precision="exact",
    )
    loop.late = late
    unit = 1.0 if shares is None else shares.unit
    return [replace(found, inertia=found.inertia * unit) for found in loop.run(centroids.clone())], loop


# ---- when it ends


@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("kind", ["blobs", "noise", "relu"])
@pytest.mark.parametrize("max_iter", [1, 4, 300])
def test_iterations_are_counted_as_in_scikit_learn(kind: str, tol: float, max_iter: int) -> None:
    for seed in range(4):
        x = KINDS[kind](np.random.RandomState(seed), 400, 4)
        start = x[seed::40][:7]
        peer = Peer(7, init=start, n_init=1, tol=tol, max_iter=max_iter).fit(x)
        (found,), _ = lloyd(torch.from_numpy(x), torch.from_numpy(start)[None], tol=tol, max_iter=max_iter)
        assert found.n_iter == peer.n_iter_
        np.testing.assert_array_equal(found.labels, peer.labels_)
        np.testing.assert_allclose(found.centroids, peer.cluster_centers_, rtol=1e-10, atol=1e-12)
        assert found.inertia == pytest.approx(peer.inertia_, rel=1e-9)


def test_restarts_that_end_early_leave_the_others_as_they_are() -> None:
    x = rows("noise", 600, 3)
    starts = torch.stack([x[i::60][:8] for i in range(6)])
    together, loop = lloyd(x, starts)
    assert len({found.n_iter for found in together}) > 2
    for start, found in zip(starts, together, strict=True):
        (alone,), _ = lloyd(x, start[None], chunk=600)
        assert torch.equal(found.labels, alone.labels)
        assert torch.equal(found.centroids, alone.centroids)
        assert (found.inertia, found.n_iter, found.shifts) == (alone.inertia, alone.n_iter, alone.shifts)
    # Without a tolerance every pass is an iteration, and none is made for a restart that has ended.
    assert loop.work.assigned == 600 * sum(found.n_iter for found in together)


def test_labels_and_inertia_belong_to_the_returned_centroids_when_it_is_cut_short() -> None:
    x = rows("relu", 500, 12)
    for limit in range(1, 6):
        (found,), _ = lloyd(x, x[None, :20], max_iter=limit)
        assert mislabelled(found.labels, x, found.centroids) == 0
        dist2 = reference_dist2(x, found.centroids).min(1)
        assert found.inertia == pytest.approx(dist2.sum(), rel=1e-9)
        assert len(found.shifts) == found.n_iter == limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_centroids_are_the_means_of_their_rows_rounded_once(dtype: torch.dtype) -> None:
    x = rows("blobs", 500, 6, dtype)
    (found,), _ = lloyd(x, x[None, :7])
    for j in range(7):
        mean = x[found.labels == j].double().mean(0)
        assert torch.allclose(found.centroids[j].double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-13)


@pytest.mark.parametrize("at_a_time", [1, 3, 16, 40])
def test_centroids_move_the_same_some_at_a_time(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("noise", 600, 3)
    starts = torch.stack([x[i::60][:8] for i in range(6)])
    whole, _ = lloyd(x, starts, tol=1e-3)
    monkeypatch.setattr(step, "block_rows", lambda d, device: max(1, at_a_time * 3 // d))
    parts, _ = lloyd(x, starts, tol=1e-3)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.centroids, other.centroids)
        assert (one.inertia, one.n_iter, one.shifts) == (other.inertia, other.n_iter, other.shifts)


# ---- decisions that are read late


@pytest.mark.parametrize("late", [1, 2, 7])
@pytest.mark.parametrize(("max_iter", "tol"), [(300, 0.0), (300, 1e-3), (3, 0.0), (1, 0.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_when_decisions_are_read_changes_nothing(weighted: bool, max_iter: int, tol: float, late: int) -> None:
    x = rows("blobs", 400, 5)
    weights = torch.from_numpy(np.random.RandomState(0).exponential(size=400)) if weighted else None
    far = x.amax() * torch.arange(50.0, 53.0)[:, None] * torch.ones(5)  # clusters that stay empty at first
    starts = torch.stack([torch.cat([x[i : i + 6], far + i]) for i in range(4)] + [x[i::40][:9] for i in range(4)])
    known: dict[str, Any] = {"weights": weights, "max_iter": max_iter, "tol": tol}
    at_once, _ = lloyd(x, starts, **known)
    later, loop = lloyd(x, starts, late=late, **known)
    for one, other in zip(at_once, later, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.centroids, other.centroids)
        assert (one.inertia, one.n_iter, one.shifts) == (other.inertia, other.n_iter, other.shifts)
    assert loop.work.assigned > 400 * sum(found.n_iter for found in later)  # passes more were made


def test_passes_are_asked_for_ahead_only_where_nothing_waits() -> None:
    class Patient(TorchBackend):
        waits = False

    class Streamed(TensorSource):
        resident = False

    x = rows("blobs", 100, 3)
    for backend, source, late in (
        (TorchBackend(), TensorSource(x), 0),
        (Patient(), TensorSource(x), 1),
        (Patient(), Streamed(x), 0),
    ):
        known = Moments.of(source)
        loop = Lloyd(
            *(backend, source, known, OneProcess(), None, lambda restarts: 64, 1 << 20),
            **{"max_iter": 9, "tol": 0.0, "precision": "exact"},
        )
        assert loop.late == late


# ---- empty clusters


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("empties", [1, 3])
def test_an_empty_cluster_takes_the_farthest_row_as_in_scikit_learn(empties: int, weighted: bool) -> None:
    rng = np.random.RandomState(empties)
    x = blobs(rng, 200, 4)
    weight = rng.exponential(size=200) + 0.1 if weighted else np.ones(200)
    start = np.concatenate([x[:3], 1e3 + np.arange(empties)[:, None] * np.ones(4)])
    for limit in (1, 300):
        peer = Peer(3 + empties, init=start, n_init=1, max_iter=limit, tol=0).fit(x, sample_weight=weight)
        weights = torch.from_numpy(weight) if weighted else None
        (found,), _ = lloyd(torch.from_numpy(x), torch.from_numpy(start)[None], weights=weights, max_iter=limit)
        order, theirs = np.lexsort(found.centroids.numpy().T), np.lexsort(peer.cluster_centers_.T)
        np.testing.assert_allclose(found.centroids[order], peer.cluster_centers_[theirs], rtol=1e-9)
        assert found.inertia == pytest.approx(peer.inertia_, rel=1e-9)


def test_of_equally_far_rows_the_lowest_goes_to_the_first_empty_cluster() -> None:
    x = torch.tensor([[0.0], [5.0], [-5.0], [5.0], [-5.0]])
    start = torch.tensor([[0.0], [100.0], [200.0]])
    (found,), _ = lloyd(x, start[None], max_iter=1)
    assert found.centroids[:, 0].tolist() == [0.0, 5.0, -5.0]


def test_rows_without_weight_are_not_taken_for_empty_clusters() -> None:
    x = torch.tensor([[0.0], [1.0], [50.0], [60.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    start = torch.tensor([[0.4], [1000.0]], dtype=torch.float64)
    (found,), _ = lloyd(x, start[None], weights=weights)
    assert sorted(found.centroids[:, 0].tolist()) == [0.0, 1.0]
    assert found.inertia == 0


def test_where_no_row_is_left_to_take_it_ends() -> None:
    x = torch.tensor([[1.0], [1.0], [2.0]])
    (found,), _ = lloyd(x, torch.tensor([[[1.0], [2.0], [9.0], [8.0]]]))
    assert found.labels.tolist() == [0, 0, 1]
    assert found.inertia == 0
    assert found.n_iter == 1


def test_a_cluster_that_gives_its_only_row_away_stays_where_it_is() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    start = torch.tensor([[0.5], [30.0], [5.0], [31.0]], dtype=torch.float64)
    # Row 2 is the farthest and alone in its cluster; it goes to cluster 1, and row 0 to cluster 3.
    (found,), _ = lloyd(x, start[None], max_iter=1)
    assert found.centroids[:, 0].tolist() == [1.0, 10.0, 5.0, 0.0]
    assert found.labels.tolist() == [3, 0, 1]


# ---- two processes


class Two:
    """A group of two threads; each adds up in its own order."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.barrier, self.board = rank, barrier, board

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.board[self.rank] = tensor.clone()
        self.barrier.wait(30)
        total = self.board[self.rank] + self.board[1 - self.rank]
        self.barrier.wait(30)
        return total


def in_two(
    x: torch.Tensor, cut: int, work: Callable[[torch.Tensor, Moments, Group, slice], Any], whole: Moments
) -> list[Any]:
    """What ``work`` gives in each of two threads that hold the rows before and after ``cut``."""
    barrier, board, answers = threading.Barrier(2), [None, None], [None, None]

    def run(rank: int, part: slice) -> None:
        try:
            moments = replace(whole, dist2=whole.dist2[part])
            answers[rank] = work(x[part], moments, Two(rank, barrier, board), part)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=a) for a in ((0, slice(0, cut)), (1, slice(cut, None)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("kind", ["relu", "offset", "heavy tails"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cut", [150, 3])
@pytest.mark.parametrize("empties", [0, 4])
@pytest.mark.parametrize("late", [0, 1])
def test_two_processes_find_what_one_finds(kind: str, dtype: torch.dtype, cut: int, empties: int, late: int) -> None:
    x = rows(kind, 300, 7, dtype)
    far = x.amax() * 100 + torch.arange(empties, dtype=dtype)[:, None] * torch.ones(7, dtype=dtype)
    starts = torch.stack([torch.cat([x[i : i + 5], far]) for i in (0, 60, 200)])
    whole = Moments.of(TensorSource(x))
    alone, _ = lloyd(x, starts, moments=whole)
    halves = in_two(
        *(x, cut),
        lambda part, moments, group, _: lloyd(part, starts, group=group, moments=moments, late=late)[0],
        whole,
    )
    for found, left, right in zip(alone, *halves, strict=True):
        assert torch.equal(torch.cat([left.labels, right.labels]), found.labels)
        for half in (left, right):
            assert torch.equal(half.centroids, found.centroids)
            assert (half.inertia, half.n_iter, half.shifts) == (found.inertia, found.n_iter, found.shifts)
