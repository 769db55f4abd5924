"""How well the clusters of a layer agree with the classes, and what chance alone would give."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpuclust.errors import InputError

# Up to this many terms the expected mutual information is scikit-learn's own sum, bit for bit (about a second). Above,
# equal margins share their terms: with classes of one size that is a thousand times less work at k = 1000.
_SUM_TERMS = 20_000_000
# Values held at a time while terms are summed, and random table cells drawn for the chance levels.
_BLOCK = 1 << 20
_CHANCE_CELLS = 4_000_000


def compare(
    clusters: np.ndarray, classes: np.ndarray, n_clusters: int, n_classes: int
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Compare a clustering with the classes.

    Parameters
    ----------
    clusters : integer array (n,)
        Cluster of each image, 0 to ``n_clusters - 1``.
    classes : integer array (n,)
        Class of each image, 0 to ``n_classes - 1``.
    n_clusters, n_classes : int
        Clusters and classes may be empty.

    Returns
    -------
    table : int64 array (n_clusters, n_classes)
        Images of each class in each cluster.
    match : int64 array (n_clusters,)
        Class matched to each cluster by the one-to-one matching that puts most images right (Hungarian method,
        `scipy.optimize.linear_sum_assignment`); -1 for a cluster that is left over because there are fewer classes.
    scores : dict
        ``purity`` (share of images in the majority class of their cluster), ``accuracy`` (share in the cluster matched
        to their class), ``error`` (1 - accuracy), and scikit-learn's ``ari``, ``ami``, ``nmi``, ``homogeneity`` and
        ``completeness``. They are scikit-learn's numbers to the last bit, except that the ``ami`` of large
        problems (where scikit-learn takes more than a second) is within its rounding error of 1e-9.

    Raises
    ------
    InputError
        If the two arrays differ in length, are empty, are not whole numbers, or hold a number out of range.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    clusters = _indices(clusters, n_clusters, "clusters")
    classes = _indices(classes, n_classes, "classes")
    n = len(clusters)
    if len(classes) != n or n == 0:
        raise InputError(f"clusters and classes are of one length of at least 1; got {n} and {len(classes)}")
    cells = np.bincount(clusters * n_classes + classes, minlength=n_clusters * n_classes)
    table = cells.reshape(n_clusters, n_classes).astype(np.int64, copy=False)
    match = np.full(n_clusters, -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(table, maximize=True)
    match[rows] = columns
    accuracy = int(table[rows, columns].sum()) / n
    scores = {
        "purity": int(table.max(axis=1).sum()) / n,
        "accuracy": accuracy,
        "error": 1.0 - accuracy,
        "ari": float(metrics.adjusted_rand_score(classes, clusters)),
        "ami": _adjusted_mutual_information(classes, clusters),
        "nmi": float(metrics.normalized_mutual_info_score(classes, clusters)),
        "homogeneity": float(metrics.homogeneity_score(classes, clusters)),
        "completeness": float(metrics.completeness_score(classes, clusters)),
    }
    return table, match, scores


def chance_levels(sizes: list[int] | np.ndarray, n_clusters: int, seed: int = 0, draws: int = 1000) -> dict[str, float]:
    """The mean of each score over random clusterings: every image falls into a cluster by a fair die.

    Only the tables of clusters and classes are drawn (from the multinomial distribution that such labels have), so the
    time does not depend on the number of images.

    Parameters
    ----------
    sizes : sequence of int (n_classes,)
        Images of each class.
    n_clusters : int
    seed : int
    draws : int
        Random clusterings at most. With many clusters and classes fewer are drawn, so that they have 4 million table
        cells in all, and at least 3: 4 at 1000 x 1000, where each is an average over a million cells already.

    Returns
    -------
    dict
        ``purity accuracy error ari ami nmi homogeneity completeness``; ``ari`` and ``ami`` are 0 by construction. The
        silhouette compares nothing with the classes and has no chance level.

    Raises
    ------
    InputError
        If there is no image, a size is negative, or ``n_clusters`` or ``draws`` is less than 1.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.asarray(sizes, dtype=np.int64)
    n = int(counts.sum())
    if counts.ndim != 1 or n < 1 or counts.min() < 0:
        raise InputError(f"sizes are the numbers of images of the classes, at least one image; got {sizes!r}")
    if n_clusters < 1 or draws < 1:
        raise InputError(f"n_clusters and draws are at least 1; got {n_clusters} and {draws}")
    counts = counts[counts > 0]
    draws = min(draws, max(3, _CHANCE_CELLS // (n_clusters * len(counts))))
    generator = np.random.Generator(np.random.PCG64(seed))
    class_entropy = _entropy(counts)
    totals = dict.fromkeys(("purity", "accuracy", "nmi", "homogeneity", "completeness"), 0.0)
    for _ in range(draws):
        table = generator.multinomial(counts, np.full(n_clusters, 1.0 / n_clusters))
        information = _mutual_information(table)
        cluster_entropy = _entropy(table.sum(axis=0))
        mean = (class_entropy + cluster_entropy) / 2
        totals["purity"] += table.max(axis=0).sum() / n
        totals["accuracy"] += table[linear_sum_assignment(table, maximize=True)].sum() / n
        totals["nmi"] += information / mean if mean else 1.0
        totals["homogeneity"] += information / class_entropy if class_entropy else 1.0
        totals["completeness"] += information / cluster_entropy if cluster_entropy else 1.0
    levels = {name: float(total / draws) for name, total in totals.items()}
    return {**levels, "error": 1.0 - levels["accuracy"], "ari": 0.0, "ami": 0.0}


def _indices(values: Any, count: int, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{name} is an array (n,) of whole numbers; got {values.dtype} {values.shape}")
    if len(values) and (values.min() < 0 or values.max() >= count):
        raise InputError(f"{name} holds numbers from 0 to {count - 1}; got {values.min()} to {values.max()}")
    return values.astype(np.int64, copy=False)


def _adjusted_mutual_information(classes: np.ndarray, clusters: np.ndarray) -> float:
    """scikit-learn's adjusted_mutual_info_score, its expected information looked up by the margins."""
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    sizes = np.bincount(classes), np.bincount(clusters)
    a, b = (size[size > 0] for size in sizes)
    if len(a) == len(b) == 1:
        return 1.0
    if len(a) == 1 or len(b) == 1:
        return 0.0
    information = mutual_info_score(None, None, contingency=contingency_matrix(classes, clusters, sparse=True))
    expected = _expected_information(tuple(a.tolist()), tuple(b.tolist()))
    # 0 / 0 at a perfect match of singletons, and rounding across zero: scikit-learn keeps the sign and eps.
    below, above = information - expected, (_entropy(a) + _entropy(b)) / 2 - expected
    return float(_away_from_zero(below) / _away_from_zero(above))


def _away_from_zero(value: float) -> float:
    eps = float(np.finfo(np.float64).eps)
    return min(value, -eps) if value < 0 else max(value, eps)


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the shares ``counts / counts.sum()``, in the order of operations of scikit-learn."""
    counts = counts[counts > 0].astype(np.float64)
    if len(counts) <= 1:
        return 0.0
    total = np.sum(counts)
    return float(-np.sum((counts / total) * (np.log(counts) - math.log(total))))


def _mutual_information(table: np.ndarray) -> float:
    n = table.sum()
    if 1 in (np.count_nonzero(table.sum(axis=1)), np.count_nonzero(table.sum(axis=0))):
        return 0.0  # Rounding would leave 1e-15.
    rows, columns = np.nonzero(table)
    held = table[rows, columns].astype(np.float64)
    outer = table.sum(axis=1)[rows].astype(np.float64) * table.sum(axis=0)[columns]
    return max(0.0, float(np.sum(held / n * (np.log(held) + math.log(n) - np.log(outer)))))


@lru_cache(maxsize=64)
def _expected_information(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Expected mutual information of two labelings with margins ``a`` and ``b``, in nats (Vinh et al. 2010)."""
    from sklearn.metrics.cluster import expected_mutual_information

    rows, columns = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
    if sum(int(np.minimum(row, columns).sum()) for row in rows) <= _SUM_TERMS:
        return float(expected_mutual_information(_Margins(rows, columns), int(rows.sum())))
    return _grouped_information(rows, columns)


class _Margins:
    """All that scikit-learn's expected_mutual_information reads of a contingency table: its shape and margins."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray) -> None:
        self.shape = len(rows), len(columns)
        self._sums = {1: rows, 0: columns}

    def sum(self, axis: int) -> np.ndarray:
        return self._sums[axis]


def _grouped_information(a: np.ndarray, b: np.ndarray) -> float:
    """The same expectation, each pair of distinct margins computed once and counted as often as it occurs."""
    from scipy.special import gammaln

    n = int(a.sum())
    a, times_a = np.unique(a, return_counts=True)
    b, times_b = np.unique(b, return_counts=True)
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    total = 0.0
    for row, times_row in zip(a.tolist(), times_a.tolist(), strict=True):
        width = int(min(row, b[-1]))
        step = max(1, _BLOCK // width)
        held = np.arange(1, width + 1)
        for start in range(0, len(b), step):
            column = b[start : start + step, None]
            possible = (held >= row + column - n) & (held <= column)
            which, place = np.nonzero(possible)
            c, m = column[which, 0], held[place]
            # Probability that a cell holds m: the hypergeometric distribution.
            log_probability = (
                log_factorial[row]
                + log_factorial[c]
                + log_factorial[n - row]
                + log_factorial[n - c]
                - log_factorial[n]
                - log_factorial[m]
                - log_factorial[row - m]
                - log_factorial[c - m]
                - log_factorial[n - row - c + m]
            )
            terms = m / n * (math.log(n) + np.log(m) - math.log(row) - np.log(c)) * np.exp(log_probability)
            total += times_row * float(np.dot(terms, times_b[start : start + step][which]))
    return total
