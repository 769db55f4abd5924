"""Seeds: drawn with the right probabilities, the same for any chunks and memory, and never where nothing is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import blobs, reference_dist2, rows
from cases_seeding import BUDGET, check_draws
from scipy.stats import chisquare

from gpuclust.cluster.distributed import Block
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus, choose_random
from gpuclust.cluster.sources.base import TensorSource


def plus_plus(
    x: torch.Tensor, k: int, restarts: range, *, seed: int = 0, weights: Any = None, budget: int = BUDGET
) -> list[list[int]]:
    source = TensorSource(x)
    weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    bits = [RandomBits(seed, restart) for restart in restarts]
    return choose_plus_plus(source, Moments.of(source), k, bits, weights, budget)


def fits(counts: np.ndarray, shares: np.ndarray) -> bool:
    """Whether the counts are a likely draw with these probabilities; what cannot be drawn must not be."""
    drawn = shares > 0
    assert counts[~drawn].sum() == 0
    return bool(chisquare(counts[drawn], counts.sum() * shares[drawn] / shares.sum()).pvalue > 1e-3)


# ---- random numbers


def test_random_bits_are_a_fixed_sequence_of_seed_and_restart() -> None:
    assert RandomBits(0, 0).below(10**9, 3) == [
        int(raw) * 10**9 >> 64 for raw in np.random.Philox(key=[0, 0]).random_raw(3)
    ]
    seen = {tuple(RandomBits(seed, restart).below(2**62, 2)) for seed in range(20) for restart in range(20)}
    assert len(seen) == 400
    values = RandomBits(1, 2).below(6, 6000)
    assert fits(np.bincount(values, minlength=6), np.ones(6))
    assert RandomBits(1, 2).below(0, 2) == [0, 0]
    assert RandomBits(2**64 + 5, 0).below(100, 5) == RandomBits(5, 0).below(100, 5)


# ---- random rows


def test_random_rows_are_distinct_and_uniform() -> None:
    chosen = choose_random(Block.alone(7), 3, 0, range(4000), None)
    assert all(len(set(rows_)) == 3 for rows_ in chosen)
    assert fits(np.bincount(np.ravel(chosen), minlength=7), np.ones(7))
    assert fits(np.bincount([rows_[0] for rows_ in chosen], minlength=7), np.ones(7))
    assert sorted(choose_random(Block.alone(7), 7, 3, range(1), None)[0]) == list(range(7))


def test_random_rows_follow_the_weights_and_leave_out_zero() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 5.0, 0.5], dtype=torch.float64)
    firsts = np.bincount([rows_[0] for rows_ in choose_random(Block.alone(5), 3, 0, range(4000), weights)], minlength=5)
    assert fits(firsts, weights.numpy())
    assert not any(1 in rows_ for rows_ in choose_random(Block.alone(5), 4, 1, range(200), weights))


# ---- k-means++


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0, 0.5, 2.0, 1.0]])
def test_draws_have_the_probabilities_of_greedy_k_means_plus_plus(weights: list[float] | None) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.5], [4.0, -1.0], [4.5, 2.0], [-3.0, 1.0], [0.25, 6.0]])
    share = np.ones(6) if weights is None else np.array(weights)
    dist2 = reference_dist2(x, x)
    chosen = np.array(plus_plus(x, 2, range(3000), weights=weights))
    assert fits(np.bincount(chosen[:, 0], minlength=6), share)
    # The second is the best of two draws, 2 + log 2 rounded down, each with probability share * dist2.
    expected = np.zeros((6, 6))
    for first in range(6):
        draw = share * dist2[first]
        draw /= draw.sum()
        left = (share * np.minimum(dist2[first], dist2)).sum(1)
        for tried in itertools.product(range(6), repeat=2):
            expected[first, min(tried, key=lambda row: left[row])] += share[first] / share.sum() * draw[[*tried]].prod()
    counts = np.bincount(chosen[:, 0] * 6 + chosen[:, 1], minlength=36)
    likely = expected.ravel() > 2e-3
    assert counts[expected.ravel() == 0].sum() == 0
    rest = [counts[~likely].sum()] if expected.ravel()[~likely].sum() > 2e-3 else []
    shares = np.append(expected.ravel()[likely], [expected.ravel()[~likely].sum()] if rest else [])
    assert fits(np.append(counts[likely], rest).astype(int), shares)


@pytest.mark.parametrize("kind", ["duplicates", "near ties", "subnormal", "huge", "one far row"])
def test_rows_are_distinct_where_there_are_enough(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = rows(kind, 60, 3, dtype)
        distinct = len(torch.unique(x, dim=0))
        k = min(distinct, 25)
        for chosen in plus_plus(x, k, range(5)):
            assert len(torch.unique(x[chosen], dim=0)) == k


def test_every_distinct_row_is_drawn_before_any_repeats() -> None:
    x = torch.arange(6.0)[:, None].repeat_interleave(4, 0)
    for chosen in plus_plus(x, 8, range(10)):
        assert len(set(x[chosen[:6], 0].tolist())) == 6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["blobs", "one far row", "unequal features"])
def test_draws_do_not_depend_on_chunks_memory_threads_or_the_other_restarts(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_draws(plus_plus, kind, weighted, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outliers", [1, 3])
def test_tight_groups_beside_a_far_outlier_are_all_covered(dtype: torch.dtype, outliers: int) -> None:
    rng = np.random.RandomState(0)
    centres = 10 * rng.randn(8, 3)
    groups = np.repeat(np.arange(8), 40)
    far = 1e9 * np.arange(1, outliers + 1)[:, None] * np.ones(3)
    x = torch.from_numpy(np.concatenate([centres[groups] + 0.01 * rng.randn(320, 3), far])).to(dtype)
    named = np.append(groups, 8 + np.arange(outliers))
    for chosen in plus_plus(x, 8 + outliers, range(20)):
        assert sorted(named[chosen]) == list(range(8 + outliers))


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_an_outlier_without_weight_does_not_hide_the_groups(weight: float) -> None:
    rng = np.random.RandomState(0)
    groups = np.repeat(np.arange(6), 30)
    x = torch.from_numpy(np.concatenate([10 * rng.randn(6, 2)[groups] + 0.01 * rng.randn(180, 2), [[1e9, 0]]]))
    for chosen in plus_plus(x, 6, range(20), weights=np.append(np.ones(180), weight)):
        assert sorted(groups[np.minimum(chosen, 179)]) == list(range(6))
        assert 180 not in chosen


def test_rows_without_weight_are_never_drawn() -> None:
    x = torch.from_numpy(blobs(np.random.RandomState(0), 100, 2))
    weights = np.tile([0.0, 1.0], 50)
    for chosen in plus_plus(x, 30, range(20), weights=weights):
        assert all(row % 2 == 1 for row in chosen)
    same = torch.zeros(4, 2)
    same[0] = 5.0
    for chosen in plus_plus(same, 3, range(5), weights=[0.0, 0.0, 1.0, 1.0]):
        assert 0 not in chosen


def test_weights_of_very_unequal_size_still_draw_by_weight() -> None:
    x = torch.tensor([[0.0], [100.0], [101.0], [-100.0]])
    weights = np.array([1.0, 1e-25, 1e-25, 1e-25])
    seconds = np.array(plus_plus(x, 2, range(2000), weights=weights))
    assert (seconds[:, 0] == 0).all()
    counts = np.bincount(seconds[:, 1], minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 8  # the row at -100 is the best of its four draws only where all four are that row


def test_one_row_and_equal_rows_need_no_special_case() -> None:
    assert plus_plus(torch.ones(1, 3), 1, range(3)) == [[0]] * 3
    assert all(set(chosen) <= set(range(5)) for chosen in plus_plus(torch.full((5, 2), 1e-300).double(), 3, range(3)))


def test_potential_falls_as_with_scikit_learns_seeding() -> None:
    from sklearn.cluster import kmeans_plusplus

    x = blobs(np.random.RandomState(5), 600, 5, k=15)
    ours = [
        reference_dist2(x, x[chosen]).min(1).sum() for chosen in plus_plus(torch.from_numpy(x), 15, range(40), seed=9)
    ]
    theirs = [reference_dist2(x, kmeans_plusplus(x, 15, random_state=seed)[0]).min(1).sum() for seed in range(40)]
    assert np.mean(ours) <= np.mean(theirs) * 1.05
