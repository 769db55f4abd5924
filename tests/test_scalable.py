"""k-means||: as good a beginning as k-means++ in a few passes, the same for any chunks and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import blobs, reference_dist2, rows
from cases_seeding import BUDGET, check_draws

from gpuclust.cluster import KMeans
from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding import scalable
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus
from gpuclust.cluster.seeding.scalable import OVERSAMPLING, ROUNDS, choose_scalable
from gpuclust.cluster.sources.base import TensorSource


class Counting(TensorSource):
    """Counts how often the rows are read from the first to the last."""

    passes = 0

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.passes += 1
        return super().chunks(rows)


def choose(
    x: torch.Tensor | TensorSource, k: int, restarts: range, *, seed: int = 0, weights: Any = None, budget: int = BUDGET
) -> list[list[int]]:
    source = TensorSource(x) if isinstance(x, torch.Tensor) else x
    shares = None if weights is None else Weights(torch.as_tensor(weights, dtype=torch.float64))
    bits = [RandomBits(seed, restart) for restart in restarts]
    return choose_scalable(source, Moments.of(source), k, bits, shares, budget)


# ---- how good, in how many passes


@pytest.mark.parametrize("kind", ["blobs", "noise", "relu"])
def test_restarts_end_where_those_of_k_means_plus_plus_end(kind: str) -> None:
    rng = np.random.RandomState(0)
    x = rows(kind, 3000, 6) if kind != "blobs" else torch.from_numpy(blobs(rng, 3000, 6, k=100, apart=3.0)).float()
    one, two = (
        np.mean([KMeans(100, init=init, random_state=seed).fit(x).inertia_ for seed in range(4)])
        for init in ("k-means||", "k-means++")
    )
    assert one <= two * 1.03


def test_passes_are_few_and_shared_by_all_restarts() -> None:
    x = rows("noise", 2000, 5)
    counts = []
    for restarts in (1, 4):
        source = Counting(x)
        choose(source, 100, range(restarts))
        counts.append(source.passes)
    # Three for the moments, one for the image, one for the first row, one for each round.
    assert counts == [5 + ROUNDS] * 2
    source = Counting(x)
    choose_plus_plus(source, Moments.of(source), 100, [RandomBits(0, 0)], None, BUDGET)
    assert source.passes > 100


@pytest.mark.parametrize("weighted", [False, True])
def test_drawn_rows_weigh_what_is_nearest_to_them(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    plain = choose_plus_plus

    def spy(source: TensorSource, moments: Moments, k: int, bits: Any, mass: torch.Tensor, budget: int) -> Any:
        seen.append((source.x.numpy(), mass.numpy()))
        return plain(source, moments, k, bits, mass, budget)

    monkeypatch.setattr(scalable, "choose_plus_plus", spy)
    x, k = rows("blobs", 1500, 4), 12
    weights = np.random.RandomState(0).randint(0, 5, size=1500).astype(float) if weighted else None
    choose(x, k, range(3), weights=weights)
    assert len(seen) == 3
    for drawn, mass in seen:
        assert k < len(drawn) <= 1 + ROUNDS * OVERSAMPLING * k
        unit = 1.0 if weights is None else Weights(torch.from_numpy(weights)).unit
        nearest = reference_dist2(x, drawn).argmin(1)
        np.testing.assert_allclose(mass * unit, np.bincount(nearest, weights, minlength=len(drawn)), atol=5)
        assert mass.sum() * unit == (1500 if weights is None else weights.sum())


# ---- the same for any chunks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["blobs", "one far row", "unequal features"])
def test_draws_do_not_depend_on_chunks_memory_threads_or_the_other_restarts(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_draws(choose, kind, weighted, monkeypatch)


def test_no_bit_of_a_fit_depends_on_the_chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("offset", 800, 20, torch.float16)
    found = []
    for size in ("1KiB", "100KiB", "1GiB"):
        monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", size)
        model = KMeans(30, init="k-means||", n_init=2, random_state=0, max_iter=5).fit(x)
        found.append((model.labels_.tolist(), model.cluster_centers_.numpy().tobytes(), model.inertia_))
    assert found[0] == found[1] == found[2]


# ---- rows that leave little to draw


@pytest.mark.parametrize("kind", ["duplicates", "near ties", "subnormal", "huge", "one far row", "heavy tails"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_distinct_where_there_are_enough(kind: str, dtype: torch.dtype) -> None:
    x = rows(kind, 60, 3, dtype)
    k = min(len(torch.unique(x, dim=0)), 25)
    for chosen in choose(x, k, range(5)):
        assert len(torch.unique(x[chosen], dim=0)) == k


def test_every_distinct_row_is_chosen_before_any_repeats() -> None:
    x = torch.arange(6.0)[:, None].repeat_interleave(4, 0)
    for chosen in choose(x, 8, range(10)):
        assert len(chosen) == 8
        assert len(set(x[chosen[:6], 0].tolist())) == 6


def test_one_row_and_equal_rows_need_no_special_case() -> None:
    assert choose(torch.ones(1, 3), 1, range(3)) == [[0]] * 3
    assert all(set(chosen) <= set(range(5)) for chosen in choose(torch.full((5, 2), 1e-300).double(), 3, range(3)))


@pytest.mark.parametrize("outliers", [1, 3])
def test_tight_groups_beside_a_far_outlier_are_all_covered(outliers: int) -> None:
    rng = np.random.RandomState(0)
    groups = np.repeat(np.arange(8), 40)
    far = 1e9 * np.arange(1, outliers + 1)[:, None] * np.ones(3)
    x = torch.from_numpy(np.concatenate([10 * rng.randn(8, 3)[groups] + 0.01 * rng.randn(320, 3), far]))
    named = np.append(groups, 8 + np.arange(outliers))
    for chosen in choose(x, 8 + outliers, range(10)):
        assert sorted(named[chosen]) == list(range(8 + outliers))


def test_more_rounds_follow_where_the_first_draw_one_row_again_and_again() -> None:
    # Each row is so much farther than the one before that it takes nearly all draws of a round.
    x = torch.tensor([0.0] + [10.0 ** (3 * i) for i in range(12)], dtype=torch.float64)[:, None].repeat(3, 1)
    k = 13
    for chosen in choose(x, k, range(3)):
        assert len(torch.unique(x[chosen])) == k
    assert k > 1 + ROUNDS  # else one row a round would be enough


# ---- weights


def test_rows_without_weight_are_never_chosen() -> None:
    x = torch.from_numpy(blobs(np.random.RandomState(0), 100, 2))
    for chosen in choose(x, 30, range(10), weights=np.tile([0.0, 1.0], 50)):
        assert all(row % 2 == 1 for row in chosen)
    same = torch.zeros(4, 2)
    same[0] = 5.0
    for chosen in choose(same, 3, range(5), weights=[0.0, 0.0, 1.0, 1.0]):
        assert 0 not in chosen


def test_rows_of_very_little_weight_are_chosen_where_they_are_all_that_is_left() -> None:
    x = torch.tensor([[0.0], [100.0], [101.0], [-100.0]])
    for chosen in choose(x, 4, range(20), weights=[1.0, 1e-25, 1e-25, 1e-25]):
        assert sorted(chosen) == [0, 1, 2, 3]


def test_heavy_rows_attract_the_clusters() -> None:
    rng = np.random.RandomState(0)
    x = torch.from_numpy(rng.randn(2000, 2))
    weights = np.where(x[:, 0] > 0, 1000.0, 1.0)
    light, plain = (
        np.mean([(x[chosen, 0] <= 0).sum() for chosen in choose(x, 40, range(10), weights=given)])
        for given in (weights, None)
    )
    assert light < plain / 3


# ---- in the estimator


def test_the_estimator_takes_it_and_restarts_once() -> None:
    x = rows("blobs", 300, 3)
    model = KMeans(10, init="k-means||", random_state=0)
    assert model.fit(x).labels_.shape == (300,)
    assert math.isfinite(model.inertia_)
    best = KMeans(10, init="k-means||", n_init=5, random_state=0).fit(x)
    assert best.inertia_ <= model.inertia_
    assert KMeans(10, init="k-means||", n_init=1, random_state=0).fit(x).inertia_ == model.inertia_
    with pytest.raises(ValueError, match=r"'k-means\+\+', 'k-means\|\|', 'random'\}, a callable or an array"):
        KMeans(10, init="k-means|").fit(x)
