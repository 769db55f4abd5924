"""What the page and the figures share: the scores' names and meaning, the classes' colours, the clusters' order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuclust.compare.result import LayerResult

if TYPE_CHECKING:
    from gpuclust.report.report import Report

# Each score: name on the page, what its chance level is, meaning in one line.
SCORES = {
    "accuracy": (
        "accuracy",
        "the mean of random clusterings",
        "Share of images in the right cluster under the best one-to-one matching of clusters and classes (Hungarian).",
    ),
    "purity": (
        "purity",
        "the mean of random clusterings",
        "Share of images that belong to the majority class of their cluster. Grows with the number of clusters.",
    ),
    "ari": (
        "ARI",
        "by construction",
        "Adjusted Rand index: pairs of images that clusters and classes treat alike, less what chance gives.",
    ),
    "ami": (
        "AMI",
        "by construction",
        "Adjusted mutual information: what the cluster tells about the class, less what chance gives.",
    ),
    "nmi": (
        "NMI",
        "not corrected for",
        "Normalised mutual information. Above 0 for random clusters, the more so the more clusters there are.",
    ),
    "homogeneity": (
        "homogeneity",
        "not corrected for",
        "1 if every cluster holds images of one class only.",
    ),
    "completeness": (
        "completeness",
        "not corrected for",
        "1 if all images of a class lie in one cluster.",
    ),
    "silhouette": (
        "silhouette",
        "none, as it knows nothing of the classes",
        "How much nearer an image is to its own cluster than to the next one, from −1 to 1.",
    ),
    "error": (
        "error",
        "the mean of random clusterings",
        "1 − accuracy: the misclassification of the paper.",
    ),
}

# Colours of the classes on a light and on a dark ground. The first ten were optimised so that every pair stays apart
# (in OKLab) for normal sight, protanopia and deuteranopia, at a contrast of 3 and more to the ground. Colours repeat
# after twenty; a class's number, shown beside its colour, never does.
LIGHT = (
    *("#1561a4", "#f45a18", "#1d5946", "#d34e87", "#b28c57", "#3d2291", "#51859d", "#ab4f28", "#565d6f", "#4e9e01"),
    *("#0a8f8f", "#7a1f5c", "#c98500", "#5a7dde", "#6b6a1f", "#d3443f", "#0d3b66", "#9a6fc0", "#3f7f3f", "#8a5a44"),
)
DARK = (
    *("#5f77b2", "#fe6416", "#27ae70", "#d38ac4", "#fcb60b", "#9e6dfc", "#d3f2fe", "#ab513a", "#c7bfb0", "#fcf216"),
    *("#5fd4d4", "#e05fae", "#ffd98a", "#7f8cff", "#b5b35a", "#ff8f8a", "#4f9bd6", "#c9a6ea", "#8fcf8f", "#c49a84"),
)


def colour(index: int) -> str:
    """Colour of class ``index`` on a light ground, as ``#rrggbb``."""
    return LIGHT[index % len(LIGHT)]


def display_order(result: LayerResult) -> np.ndarray:
    """Clusters in the order to show them, int64 (k,): by matched class, which is the diagonal, then the rest."""
    matched = np.where(result.match < 0, result.table.shape[1], result.match)
    return np.lexsort((np.arange(result.k), result.table.argmax(1), matched))


def followed_class(report: Report) -> int:
    """The class whose cluster is followed through the layers: the one that gains most from the first layer to its best.

    Gain is in the F1 score of the class and the cluster matched to it. Among equals it is the first class that the last
    layer has a cluster for.
    """
    found = np.array([_f1(result) for result in report.results])
    gain = (found.max(0) - found[0]).round(9)
    matched = np.isin(np.arange(gain.size), report.results[-1].match)
    return int(np.argmax(np.where(matched, gain, -1.0)))


def _f1(result: LayerResult) -> np.ndarray:
    """F1 score of each class and the cluster matched to it, float64 (n_classes,); 0 where none is."""
    clusters = np.flatnonzero(result.match >= 0)
    classes = result.match[clusters]
    of_both = result.table.sum(1)[clusters] + result.table.sum(0)[classes]
    scores = np.zeros(result.table.shape[1])
    scores[classes] = 2 * result.table[clusters, classes] / np.maximum(of_both, 1)
    return scores
