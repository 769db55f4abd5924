"""Colours that can be told apart, and clusters in the order of their classes."""

from __future__ import annotations

from dataclasses import replace

import cases_report as cases
import numpy as np
import pytest

from gpuclust.report import Report
from gpuclust.report.legend import DARK, LIGHT, colour, display_order, followed_class

# Linear sRGB as seen without long- or middle-wave cones: Machado, Oliveira & Fernandes 2009, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def linear(code: str) -> np.ndarray:
    value = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]])
    lab = np.array([[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return lab @ np.cbrt(cones @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_ten_colours_stay_apart(palette: tuple[str, ...], sight: str) -> None:
    seen = [oklab(np.array(SIGHT[sight]) @ linear(code)) for code in palette[:10]]
    nearest = min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])
    assert nearest > 0.05  # a just noticeable difference is about 0.02


@pytest.mark.parametrize(("palette", "ground"), [(LIGHT, "#ffffff"), (DARK, "#1a1d22")], ids=["light", "dark"])
def test_every_colour_stands_out_from_the_ground(palette: tuple[str, ...], ground: str) -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    behind = weights @ linear(ground) + 0.05
    for code in palette:
        ratio = (weights @ linear(code) + 0.05) / behind
        assert max(ratio, 1 / ratio) >= 3, code
    assert len(set(palette)) == len(palette) == len(LIGHT)


def test_colours_repeat() -> None:
    assert colour(3) == colour(3 + len(LIGHT)) == LIGHT[3]


def test_clusters_stand_in_the_order_of_their_classes() -> None:
    base = cases.report(layers=1, classes=3, per_class=6, pictures=False).results[0]
    table = np.array([[0, 5, 1], [1, 0, 4], [0, 1, 0], [5, 0, 1]])
    result = replace(base, k=4, table=table, match=np.array([1, 2, -1, 0]))
    assert display_order(result).tolist() == [3, 0, 1, 2]


def test_the_class_that_is_followed_gains_most_and_has_a_cluster_at_the_last_layer() -> None:
    report = cases.report(layers=1, classes=3, per_class=6, pictures=False)

    def layer(table: list[list[int]], match: list[int]):
        return replace(report.results[0], table=np.array(table), match=np.array(match))

    mixed = layer([[4, 1, 3], [1, 4, 2], [1, 1, 1]], [0, 1, 2])
    apart = layer([[0, 0, 6], [0, 5, 0], [6, 1, 0]], [2, 1, 0])
    without = layer([[0, 0, 6], [0, 5, 0], [6, 1, 0]], [-1, 1, 0])
    for results, wanted in (([mixed, apart], 2), ([mixed, apart, without], 0), ([mixed], 0), ([without], 0)):
        assert followed_class(Report(results, report.samples, {})) == wanted
