"""The figures: drawn with matplotlib's Figure alone, so that no global state of pyplot is touched."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gpuclust.report.legend import SCORES, colour, display_order, followed_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpuclust.report.report import Report

TILE, GAP = 56, 6  # pixels of an image in figure2.png, and between two
PER_ROW = 16
POINTS = 1000
_INK, _FAINT = "#1c1e21", "#8a8f98"


def draw_figures(report: Report) -> Iterator[tuple[str, bytes]]:
    """Name and PNG, one after the other: trend, heatmaps, projections, and figure2 where there are thumbnails."""
    yield "trend", _render(draw_trend(report), "png")
    yield "heatmaps", _render(draw_heatmaps(report), "png")
    yield "projections", _render(draw_projections(report), "png")
    if any(report.samples.thumbs):
        yield "figure2", _render(draw_figure2(report), "png")


def draw_trend(report: Report) -> Figure:
    """Every score over the layers, dashed where chance would put it."""
    names = [result.layer for result in report.results]
    figure, axes = _figure(max(7.0, 0.2 * len(names) + 3), 4.2)
    at = np.arange(len(names))
    for index, (key, (label, *_)) in enumerate(SCORES.items()):
        values = np.array([result.scores.get(key, math.nan) for result in report.results], float)
        if np.isnan(values).all():
            continue
        axes.plot(at, values, color=colour(index), marker="o", markersize=3.5, linewidth=1.6, label=label)
        if key in report.chance:
            axes.axhline(report.chance[key], color=colour(index), linestyle=(0, (2, 3)), linewidth=0.9)
    axes.set_xticks(at, [_short(name, 24) for name in names], rotation=90 if len(names) > 10 else 0, parse_math=False)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(min(0, axes.dataLim.ymin) - 0.03, 1.03)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_title("Dotted: chance", loc="left", fontsize=9, color=_FAINT)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5)
    return figure


def trend_svg(report: Report) -> bytes:
    """The trend as SVG; the same bytes for the same report."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gpuclust", "svg.fonttype": "none"}):
        return _render(draw_trend(report), "svg", Date=None)


def draw_heatmaps(report: Report) -> Figure:
    """The cluster x class table of every layer: share of each class (column) that lies in each cluster (row)."""
    most = 64
    panels = []
    for result in report.results:
        order = display_order(result)[:most]
        panels.append((result.table / np.maximum(result.table.sum(0), 1))[order, :most])
    rows, columns = panels[0].shape
    size = max(rows, columns)
    figure, axes, places = _grid(report)
    for panel, (x, y) in zip(panels, places, strict=True):
        extent = (x, x + columns / size, y + rows / size, y)
        axes.imshow(panel, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_title(
        "Clusters (rows) and classes (columns): share of the class in the cluster; white 0, blue 1",
        loc="left",
        fontsize=9,
        color=_INK,
    )
    _frame(axes, report, places, columns / size, rows / size)
    return figure


def draw_projections(report: Report) -> Figure:
    """The first two principal components of every layer, coloured by class."""
    n = len(report.samples.paths)
    count = min(POINTS, n)
    rows = np.argsort(report.samples.labels, kind="stable")[np.arange(count) * n // count]
    colours = np.array([colour(label) for label in report.samples.labels[rows]])
    figure, axes, places = _grid(report)
    for result, (x, y) in zip(report.results, places, strict=True):
        xy = result.projection[rows].astype(np.float64)
        low, high = xy.min(0), xy.max(0)
        xy = (xy - low) / np.where(high > low, high - low, 1) * 0.94 + 0.03
        axes.scatter(x + xy[:, 0], y + 1 - xy[:, 1], c=colours, s=3, linewidths=0)
    axes.set_title("First two principal components, coloured by class", loc="left", fontsize=9, color=_INK)
    _frame(axes, report, places, 1, 1)
    return figure


def draw_figure2(report: Report) -> Figure:
    """The paper's Figure 2: at each layer, the images of the cluster matched to one class, the nearest first.

    The class is the one that gains most from layer to layer; a layer without a cluster for it has an empty row.
    """
    samples, results = report.samples, report.results
    shown = followed_class(report)
    step = TILE + GAP
    width, height = PER_ROW * step, len(results) * step
    figure, axes = _figure(10.5, 0.55 * len(results) + 0.8)
    notes = []
    for row, result in enumerate(results):
        cluster = np.flatnonzero(result.match == shown)
        members = np.flatnonzero(result.labels == cluster[0]) if len(cluster) else np.empty(0, int)
        nearest = members[np.argsort(result.dist2[members], kind="stable")]
        notes.append(f"{int((samples.labels[members] == shown).sum())} of {len(members)}" if len(members) else "none")
        strip = np.full((step, width, 3), 255, np.uint8)
        for column, image in enumerate(nearest[:PER_ROW]):
            tile = _tile(samples.thumbs[image], colour(int(samples.labels[image])))
            strip[:TILE, column * step : column * step + TILE] = tile
        # Row by row: matplotlib takes a hundred bytes for each pixel that it scales.
        axes.imshow(strip, extent=(0, width, (row + 1) * step, row * step), interpolation="antialiased")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    at = np.arange(len(results)) * step + TILE / 2
    axes.set_yticks(at, [_short(result.layer, 24) for result in results], parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y, note in zip(at, notes, strict=True):
        axes.text(width + 8, y, note, va="center", fontsize=8.5, color=_INK)
    title = f"Images in the cluster matched to “{_short(samples.classes[shown], 40)}” (right: how many of it are)"
    axes.set_title(title, loc="left", fontsize=10, color=_INK, parse_math=False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=8.5)
    return figure, axes


def _grid(report: Report) -> tuple[Figure, Axes, list[tuple[float, float]]]:
    """One axes with a place per layer: a panel of unit size each, far quicker than an axes per layer."""
    count = len(report.results)
    columns = min(count, 4 if count <= 8 else 6 if count <= 24 else 10)
    rows = -(-count // columns)
    figure, axes = _figure(max(columns * 1.45, 5.2), rows * 1.65 + 0.4)
    return figure, axes, [(index % columns * 1.12, index // columns * 1.28) for index in range(count)]


def _frame(axes: Axes, report: Report, places: list[tuple[float, float]], width: float, height: float) -> None:
    """Name and outline every panel, and show the axes as the paper they are drawn on."""
    from matplotlib.collections import PolyCollection

    box = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    axes.add_collection(
        PolyCollection([box + place for place in places], facecolors="none", edgecolors="#c3c7cd", linewidths=0.7)
    )
    for result, (x, y) in zip(report.results, places, strict=True):
        axes.text(x, y - 0.05, _short(result.layer, 20), fontsize=7.5, color=_INK, va="bottom", parse_math=False)
    axes.set_xlim(-0.02, max(x for x, _ in places) + 1.02)
    axes.set_ylim(max(y for _, y in places) + 1.02, -0.24)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _tile(image: bytes, border: str) -> np.ndarray:
    """An image of TILE pixels a side within a border in the class's colour; a blank one where there is no image."""
    from PIL import Image, ImageOps

    inner = TILE - 8
    picture = Image.open(io.BytesIO(image)).convert("RGB") if image else Image.new("RGB", (1, 1), "#dddddd")
    return np.asarray(ImageOps.expand(picture.resize((inner, inner), Image.Resampling.BILINEAR), 4, border))


def _short(text: str, length: int) -> str:
    text = "".join(char if char.isprintable() else "�" for char in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _render(figure: Figure, form: str, **metadata: None) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks most scripts and draws a box for a missing glyph; the reader can't mend that.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format=form, metadata=metadata)
    return stream.getvalue()
