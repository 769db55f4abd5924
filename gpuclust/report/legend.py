"""What the page and the figures share: the scores' names and meaning, the classes' colours, the clusters' order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuclust.compare.result import LayerResult

if TYPE_CHECKING:
    from gpuclust.report.report import Report

# Each score: name on the page, chance in one word, meaning in one line.
SCORES = {
    "accuracy": (
        "accuracy",
        "by permutation",
        "Share of images in the right cluster under the best one-to-one matching of clusters and classes (Hungarian).",
    ),
    "purity": (
        "purity",
        "by permutation",
        "Share of images that belong to the majority class of their cluster. Grows with the number of clusters.",
    ),
    "ari": (
        "ARI",
        "corrected: 0",
        "Adjusted Rand index: pairs of images that clusters and classes treat alike, less what chance gives.",
    ),
    "ami": (
        "AMI",
        "corrected: 0",
        "Adjusted mutual information: what the cluster tells about the class, less what chance gives.",
    ),
    "nmi": (
        "NMI",
        "not corrected",
        "Normalised mutual information. Above 0 for random clusters, the more so the more clusters there are.",
    ),
    "homogeneity": (
        "homogeneity",
        "not corrected",
        "1 if every cluster holds images of one class only.",
    ),
    "completeness": (
        "completeness",
        "not corrected",
        "1 if all images of a class lie in one cluster.",
    ),
    "silhouette": (
        "silhouette",
        "knows no classes",
        "How much nearer an image is to its own cluster than to the next one, from −1 to 1.",
    ),
    "error": (
        "error",
        "by permutation",
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
    """The class whose cluster is followed through the layers: the first that the last layer has a cluster for."""
    matched = report.results[-1].match
    return int(matched[matched >= 0].min(initial=len(report.samples.classes) - 1))
