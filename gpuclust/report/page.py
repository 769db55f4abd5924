"""The page: everything report.html shows, packed so that one file holds it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuclust.compare.result import LayerResult
from gpuclust.config import show_bytes
from gpuclust.report.answer import answer
from gpuclust.report.legend import DARK, LIGHT, SCORES, display_order, followed_class

if TYPE_CHECKING:
    from gpuclust.report.report import Report, Samples

# What one page can carry and a browser can move: the rest is in the files beside it, and the page says so.
THUMB_BYTES = 9_000_000
IMAGES = 10_000
POINTS = 4_000
CELLS = 128  # clusters and classes of a heat map
SKIPPED = 200
# What the choice of images says that the page shows by class or elsewhere.
_REPEATED = ("classes", "class_paths", "available", "delivered", "skipped_per_class")
SCRIPTS = ("data.js", "trend.js", "images.js", "panels.js", "report.js")


def render_page(report: Report) -> str:
    """report.html as one string: no request leaves it, and no script runs in it but its own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    templates = Path(__file__).parent / "templates"
    style = (templates / "report.css").read_text(encoding="utf-8")
    script = "".join((templates / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = Environment(
        loader=PackageLoader("gpuclust.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": _label, "quantity": _quantity}
    return environment.get_template("report.html.j2").render(
        **page_context(report),
        data=htmlsafe_json_dumps(page_data(report), dumps=json.dumps, separators=(",", ":"), allow_nan=False),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        palette=list(zip(LIGHT, DARK, strict=True)),
    )


def page_context(report: Report) -> dict[str, Any]:
    """What the template itself writes: all that can be read without JavaScript."""
    from gpuclust.report.figures import trend_svg

    run, samples = report.run, report.samples
    sizes = np.bincount(samples.labels, minlength=len(samples.classes))
    images = run.get("images") or {}
    skipped = images.get("skipped") or []
    network = run.get("network") or {}
    first = report.results[0]
    few, most = int(sizes.min()), int(sizes.max())
    name = str(network.get("name", "the network"))
    told = answer(report)
    return {
        "name": name,
        "answer": told,
        "facts": {
            "network": name,
            "weights": network.get("weights", "–"),
            "images": f"{len(sizes)} classes × {few}" if few == most else f"{first.n:,} in {len(sizes)} classes",
            **({} if few == most else {"per class": f"{few} to {most}"}),
            "clusters": f"{first.k} at each of {len(report.results)} layers",
            "device": (run.get("hardware") or {}).get("device", "–"),
            "seed": (run.get("options") or {}).get("seed", "–"),
        },
        "scores": SCORES,
        "chance": {name: _number(report.chance.get(name)) for name in SCORES},
        "rows": [_row(result) for result in report.results],
        "top": {name: _number(report.results[report.best(name)].scores[name]) for name in SCORES},
        "svg": base64.b64encode(trend_svg(report)).decode(),
        "skipped": skipped[:SKIPPED],
        "skipped_count": len(skipped),
        "skipped_classes": sorted(Counter(str(item.get("class", "–")) for item in skipped).items()),
        "images": {key: value for key, value in images.items() if key not in ("skipped", *_REPEATED)},
        "by_class": _by_class(samples, images),
        "run": {key: value for key, value in run.items() if key != "images" and value not in (None, {}, [])},
        "plan": _plan(run.get("plan")),
    }


def page_data(report: Report) -> dict[str, Any]:
    """What the script draws from, as JSON can hold it; numbers in bulk are base64 of little-endian integers."""
    samples, results = report.samples, report.results
    orders = [np.lexsort((result.dist2, result.labels)) for result in results]
    shown = _shown(samples, results, orders)
    points = _points(samples)
    rows = np.union1d(shown, points)
    position = np.full(len(samples.paths), -1, np.int64)
    position[rows] = np.arange(len(rows))
    with_thumb = np.isin(rows, shown)
    layers, before = [], None
    for result, order in zip(results, orders, strict=True):
        xy = _upright(result.projection, before)
        layers.append(_layer(result, position[order[position[order] >= 0]], xy[points], rows))
        before = xy
    return {
        "classes": samples.classes,
        "sizes": np.bincount(samples.labels, minlength=len(samples.classes)).tolist(),
        "images": len(samples.paths),
        "shown": len(shown),
        "best": answer(report).best,
        "follow": followed_class(report),
        "colours": len(LIGHT),
        "cells": CELLS,
        "scores": [
            {"key": key, "name": name, "chance": _number(report.chance.get(key))} for key, (name, *_) in SCORES.items()
        ],
        "paths": [samples.paths[row] for row in rows],
        "labels": _pack(samples.labels[rows]),
        "listed": _pack(with_thumb),
        "thumbs": [_uri(samples.thumbs[row]) if seen else "" for row, seen in zip(rows, with_thumb, strict=True)]
        if samples.thumbs
        else [],
        "points": _pack(position[points]),
        "wide": len(rows) > 0xFFFF,
        "layers": layers,
    }


def _shown(samples: Samples, results: list[LayerResult], orders: list[np.ndarray]) -> np.ndarray:
    """The images whose thumbnails the page holds, as rows in ascending order.

    The nearest image of every cluster of every layer comes first, then the second nearest of each, and so on, until
    IMAGES or THUMB_BYTES is reached.
    """
    n = len(samples.paths)
    nearest = np.full(n, n, np.int64)
    layer = np.zeros(n, np.int64)
    for index, (result, order) in enumerate(zip(results, orders, strict=True)):
        labels = result.labels[order]
        rank = np.empty(n, np.int64)
        rank[order] = np.arange(n) - np.searchsorted(labels, labels)
        layer[rank < nearest] = index
        nearest = np.minimum(nearest, rank)
    first = np.lexsort((layer, nearest))[:IMAGES]
    if samples.thumbs:
        filled = np.cumsum([len(samples.thumbs[row]) for row in first])
        first = first[: np.searchsorted(filled, THUMB_BYTES, side="right")]
    return np.sort(first)


def _points(samples: Samples) -> np.ndarray:
    """At most POINTS rows for the projection, evenly from all classes."""
    by_class = np.argsort(samples.labels, kind="stable")
    count = min(POINTS, len(by_class))
    return np.sort(by_class[np.arange(count) * len(by_class) // count])


def _upright(xy: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Turn each principal axis (whose sign means nothing) the way of the layer before, so that points move little."""
    if before is None:
        return xy
    sign = np.where((xy.astype(np.float64) * before).sum(0) < 0, -1, 1)
    return xy * sign


def _layer(result: LayerResult, order: np.ndarray, xy: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    majority, most = result.table.argmax(1), result.table.max(1)
    display = display_order(result)
    low, high = xy.min(0), xy.max(0)
    scale = np.where(high > low, high - low, 1).astype(np.float64)
    listed = np.bincount(result.labels[rows], minlength=result.k)
    return {
        "layer": result.layer,
        "module": result.module,
        "d": result.d,
        "k": result.k,
        "scores": {key: _number(result.scores.get(key)) for key in SCORES},
        "explained": [_number(share) for share in result.explained],
        "display": display.tolist(),
        "match": result.match.tolist(),
        "majority": majority.tolist(),
        "most": most.tolist(),
        "size": result.table.sum(1).tolist(),
        "listed": listed.tolist(),
        "order": _pack(order, "<u4" if len(rows) > 0xFFFF else "<u2"),
        "table": _pack(result.table[display[:CELLS], :CELLS], "<u4"),
        "xy": _pack(np.round((xy - low) / scale * 0xFFFF), "<u2"),
        "span": [float(value) for value in (low[0], high[0], low[1], high[1])],
    }


def _pack(values: np.ndarray, dtype: str = "<u4") -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _uri(image: bytes) -> str:
    if not image:
        return ""
    kind = {b"RIFF": "webp", b"\x89PNG": "png"}.get(image[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _number(value: float | None) -> float | None:
    """A number JSON can hold, short enough for a page: None for NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), 5)


def _row(result: LayerResult) -> dict[str, Any]:
    """A row of the table of layers: per column the value to sort by and the text to show."""
    cells: dict[str, tuple[Any, str]] = {}
    for key in SCORES:
        value = _number(result.scores.get(key))
        cells[key] = ("", "–") if value is None else (value, f"{value:.3f}")
    cells |= {
        "kind": (result.kind, result.kind),
        "shape": (result.d, " × ".join(str(size) for size in result.shape)),
        "values": (result.d, f"{result.d:,}"),
        "inertia": (result.inertia, _large(result.inertia)),
        "iterations": (result.n_iter, str(result.n_iter)),
        "backend": (result.backend, result.backend),
        "solver": (result.solver, result.solver),
        "precision": (result.precision, result.precision),
        "re-checked": (result.recheck_share, f"{result.recheck_share:.2%}"),
        "capture": (result.capture_s, f"{result.capture_s:.2f} s"),
        "clustering": (result.cluster_s, f"{result.cluster_s:.2f} s"),
        "peak memory": (result.peak_bytes, show_bytes(result.peak_bytes)),
    }
    notes = {**{f"{name} not used": reason for name, reason in result.rejected.items()}, **result.notes}
    return {"layer": result.layer, "module": result.module, "cells": cells, "notes": notes}


def _large(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"


def _by_class(samples: Samples, images: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per class of what the source says of each: everything in ``images`` that is a number by class."""
    columns = {
        key: value
        for key, value in images.items()
        if isinstance(value, dict) and value and set(value) <= set(samples.classes)
    }
    rows = [{"class": name, **{key: value.get(name) for key, value in columns.items()}} for name in samples.classes]
    return rows if columns else []


def _label(key: Any) -> str:
    """A name of run.json as the page writes it: its unit moves to the number."""
    text = str(key)
    for unit in ("_bytes", "_s"):
        text = text.removesuffix(unit)
    return text.replace("_", " ")


def _quantity(value: float, key: Any) -> str:
    """A number as a person reads it, with the unit that its name gives."""
    if str(key) == "bytes" or str(key).endswith("_bytes"):
        return show_bytes(value)
    if str(key).endswith("_s"):
        return f"{value:,.2f} s"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}"


def _plan(plan: Any) -> dict[str, Any]:
    """The memory plan as a table (a list of rows) and whatever else it says."""
    if isinstance(plan, list):
        return {"rows": plan, "rest": {}}
    if not isinstance(plan, dict):
        return {"rows": [], "rest": {} if plan is None else {"plan": plan}}
    rows = next((value for value in plan.values() if isinstance(value, list) and value), [])
    return {"rows": rows, "rest": {key: value for key, value in plan.items() if value is not rows}}
