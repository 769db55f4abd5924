"""The figures: drawn for any run, the same each time, without a trace in the user's matplotlib."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import cases_report as cases
import matplotlib
import numpy as np
import pytest
from PIL import Image

from gpuclust.report import Report
from gpuclust.report.figures import draw_figures, trend_svg


def sizes(report: Report) -> dict[str, tuple[int, int]]:
    return {name: Image.open(io.BytesIO(image)).size for name, image in draw_figures(report)}


def test_figures_are_the_same_each_time_and_leave_matplotlib_alone() -> None:
    report = cases.report(layers=3, classes=3, per_class=8)
    before = dict(matplotlib.rcParams)
    first = dict(draw_figures(report))
    assert dict(draw_figures(report)) == first
    assert trend_svg(report) == trend_svg(report)
    assert dict(matplotlib.rcParams) == before
    assert list(first) == ["trend", "heatmaps", "projections", "figure2"]


def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import cases_report, gpuclust.report.figures as f;"
        "list(f.draw_figures(cases_report.report(layers=2, classes=2, per_class=6)));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = __file__.rsplit("tests", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_sixty_layers_stay_legible() -> None:
    base = cases.report(layers=1, classes=2, per_class=8)
    results = [replace(base.results[0], layer=f"layer{index // 8}.{index % 8}") for index in range(60)]
    size = sizes(Report(results, base.samples, base.chance))
    assert size["trend"][0] / 60 > 20  # pixels per layer name
    assert max(max(pair) for pair in size.values()) < 4500


def test_hostile_names_and_missing_scores_and_images() -> None:
    report = cases.report(layers=2, classes=5, per_class=6, names=cases.HOSTILE)
    report.results[0] = replace(report.results[0], layer=r"$\frac{$ 層 </svg>")
    report.results[0].scores["silhouette"] = float("nan")
    report.results[1].scores["silhouette"] = float("nan")
    assert set(sizes(report)) == {"trend", "heatmaps", "projections", "figure2"}
    assert b"</svg>" not in trend_svg(report).strip()[:-6]
    blank = replace(report.samples, thumbs=(b"", *report.samples.thumbs[1:]))
    assert "figure2" in sizes(Report(report.results, blank, report.chance))
    none = replace(report.samples, thumbs=())
    assert "figure2" not in sizes(Report(report.results, none, report.chance))


def test_figure2_shows_the_images_of_the_cluster_by_their_class() -> None:
    report = cases.report(layers=1, classes=2, per_class=10, strength=[3.0])
    assert report.results[0].scores["accuracy"] == 1
    image = Image.open(io.BytesIO(dict(draw_figures(report))["figure2"])).convert("RGB")
    colours = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)}
    from gpuclust.report.legend import colour

    assert tuple(bytes.fromhex(colour(0)[1:])) in colours
    assert tuple(bytes.fromhex(colour(1)[1:])) not in colours


@pytest.mark.parametrize("n", [1, 2])
def test_very_few_images(n: int) -> None:
    base = cases.report(layers=1, classes=1, per_class=4)
    table = np.array([[n]])
    result = replace(
        base.results[0], n=n, labels=np.zeros(n, np.int32), dist2=np.zeros(n), table=table,
        projection=np.zeros((n, 2), np.float32),
    )  # fmt: skip
    samples = replace(
        base.samples, paths=base.samples.paths[:n], labels=np.zeros(n, np.int64), thumbs=base.samples.thumbs[:n]
    )
    assert len(sizes(Report([result], samples, base.chance))) == 4
