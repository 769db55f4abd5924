"""Scores against scikit-learn's on random and degenerate clusterings, and the chance levels against simulation."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from sklearn import metrics

from gpuclust.compare import scores as scores_module
from gpuclust.compare.scores import chance_levels, compare
from gpuclust.errors import InputError

SKLEARN = {
    "ari": metrics.adjusted_rand_score,
    "ami": metrics.adjusted_mutual_info_score,
    "nmi": metrics.normalized_mutual_info_score,
    "homogeneity": metrics.homogeneity_score,
    "completeness": metrics.completeness_score,
}


def _cases():
    generator = np.random.default_rng(7)
    for _ in range(60):
        n, k, c = (int(v) for v in generator.integers((2, 1, 1), (400, 12, 12)))
        classes = generator.integers(0, c, n)
        noise = generator.random(n) < generator.random()
        yield np.where(noise, generator.integers(0, k, n), classes % k), classes, k, c
    n = 30
    thirds, ones, each = np.arange(n) % 3, np.zeros(n, dtype=np.int64), np.arange(n)
    for clusters, classes in itertools.product((thirds, ones, each, each[::-1], thirds[::-1] // 2), repeat=2):
        yield clusters, classes, int(clusters.max()) + 1, int(classes.max()) + 1
    yield np.array([0]), np.array([0]), 1, 1
    yield np.array([3]), np.array([2]), 4, 5
    yield np.array([1, 1, 4, 4], dtype=np.int32), np.array([2, 2, 0, 0], dtype=np.uint8), 6, 3
    yield np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), 2, 2


def test_scores_are_those_of_sklearn():
    for clusters, classes, k, c in _cases():
        _, _, got = compare(clusters, classes, k, c)
        assert {name: got[name] for name in SKLEARN} == {
            name: function(classes, clusters) for name, function in SKLEARN.items()
        }
        assert all(type(value) is float for value in got.values())


def test_matching_is_the_best_of_all_permutations():
    for clusters, classes, k, c in _cases():
        table, match, got = compare(clusters, classes, k, c)
        n = len(clusters)
        assert table.dtype == match.dtype == np.int64
        assert table.shape == (k, c)
        assert match.shape == (k,)
        for cluster, label in itertools.product(range(k), range(c)):
            assert table[cluster, label] == np.sum((clusters == cluster) & (classes == label))
        taken = match[match >= 0]
        assert len(taken) == min(k, c) == len(set(taken.tolist()))
        assert got["accuracy"] == np.mean(match[clusters] == classes)
        assert got["error"] == 1 - got["accuracy"]
        assert got["purity"] == pytest.approx(sum(np.bincount(classes[clusters == j]).max() for j in set(clusters)) / n)
        if max(k, c) <= 6:
            wide = np.zeros((6, 6), dtype=np.int64)
            wide[:k, :c] = table
            best = max(wide[range(6), order].sum() for order in itertools.permutations(range(6)))
            assert got["accuracy"] == best / n


def test_left_over_clusters_have_no_class():
    clusters, classes = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    _, match, got = compare(clusters, classes, 3, 2)
    assert match.tolist() == [0, 1, -1]
    assert got["accuracy"] == 5 / 6
    assert got["purity"] == 1.0


@pytest.mark.parametrize("equal", [True, False])
def test_grouped_expectation_agrees_with_sklearn(monkeypatch, equal):
    generator = np.random.default_rng(3)
    classes = np.repeat(np.arange(20), 50) if equal else generator.integers(0, 20, 1000) ** 2 // 20
    clusters = np.where(generator.random(1000) < 0.6, classes, generator.integers(0, 30, 1000))
    expected = metrics.adjusted_mutual_info_score(classes, clusters)
    scores_module._expected_information.cache_clear()
    monkeypatch.setattr(scores_module, "_SUM_TERMS", 0)
    monkeypatch.setattr(scores_module, "_BLOCK", 512)
    got = compare(clusters, classes, 30, 20)[2]["ami"]
    scores_module._expected_information.cache_clear()
    assert got == pytest.approx(expected, abs=1e-10)
    assert 0.2 < got < 0.9


def test_expectation_is_computed_once_per_margins():
    classes = np.repeat(np.arange(4), 25)
    clusters = np.random.default_rng(0).permutation(classes)
    scores_module._expected_information.cache_clear()
    for shift in range(5):
        compare(np.roll(clusters, shift), classes, 4, 4)
    info = scores_module._expected_information.cache_info()
    assert (info.misses, info.hits) == (1, 4)


def test_a_thousand_clusters_in_seconds():
    generator = np.random.default_rng(1)
    classes = np.repeat(np.arange(1000), 100)
    start = time.perf_counter()
    _, _, got = compare(generator.integers(0, 1000, len(classes)), classes, 1000, 1000)
    assert time.perf_counter() - start < 10
    assert abs(got["ami"]) < 0.01


@pytest.mark.parametrize(
    ("clusters", "classes", "words"),
    [
        ([0, 1], [0], "one length"),
        ([], [], "one length|whole numbers"),
        ([0, 2], [0, 1], "clusters holds numbers from 0 to 1; got 0 to 2"),
        ([0, 1], [0, -1], "classes holds numbers from 0 to 1; got -1 to 0"),
        ([0.0, 1.0], [0, 1], "whole numbers"),
    ],
)
def test_wrong_input_is_named(clusters, classes, words):
    with pytest.raises(InputError, match=words):
        compare(np.array(clusters), np.array(classes), 2, 2)


@pytest.mark.parametrize(("classes", "accuracy"), [(5, 0.244), (10, 0.145)])
def test_chance_of_equal_classes(classes, accuracy):
    levels = chance_levels([100] * classes, classes)
    assert levels["accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert levels["error"] == 1 - levels["accuracy"]
    assert levels["ari"] == levels["ami"] == 0
    assert "silhouette" not in levels


@pytest.mark.parametrize(("sizes", "k"), [([100] * 5, 5), ([10, 50, 200], 7), ([40, 0, 3], 2)])
def test_chance_is_the_mean_over_random_labels(sizes, k):
    generator = np.random.default_rng(11)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    runs = [compare(generator.integers(0, k, len(classes)), classes, k, len(sizes))[2] for _ in range(200)]
    levels = chance_levels(sizes, k, seed=5)
    assert set(levels) == set(runs[0])
    for name, level in levels.items():
        values = np.array([run[name] for run in runs])
        # Five standard errors of both means.
        assert level == pytest.approx(values.mean(), abs=5 * values.std() * np.sqrt(1 / 200 + 1 / 1000) + 1e-12), name


def test_chance_depends_on_its_arguments_alone():
    assert chance_levels([30, 40], 3, seed=2) == chance_levels(np.array([30, 40]), 3, seed=2)
    assert chance_levels([30, 40], 3, seed=2) != chance_levels([30, 40], 3, seed=3)


def test_chance_of_one_class_or_cluster():
    assert chance_levels([10], 1)["nmi"] == 1
    one = chance_levels([10, 10], 1)
    assert one["accuracy"] == one["purity"] == 0.5
    assert (one["homogeneity"], one["completeness"], one["nmi"]) == (0, 1, 0)


def test_chance_is_fast_for_a_thousand_classes():
    chance_levels([100] * 10, 10)
    start = time.perf_counter()
    chance_levels([100] * 10, 10)
    assert time.perf_counter() - start < 0.5
    assert chance_levels([1300] * 1000, 1000)["accuracy"] == pytest.approx(0.0047, abs=0.0005)


@pytest.mark.parametrize(("sizes", "k", "draws"), [([], 2, 1), ([0], 2, 1), ([3, -1], 2, 1), ([3], 0, 1), ([3], 2, 0)])
def test_chance_refuses_nonsense(sizes, k, draws):
    with pytest.raises(InputError, match="at least"):
        chance_levels(sizes, k, draws=draws)
