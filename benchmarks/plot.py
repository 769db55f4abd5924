"""Draw rows, and nothing but rows: the time of each operation of each case, by everybody, beside the limit.

    PYTHONPATH=. python benchmarks/plot.py ROWS.csv [ROWS.csv ...] --out FILE.png [--op fit] [--dtype float32]

Of several rows of one thing the latest counts; rows of a checkout with changes are left out unless --dirty is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl

from gpuclust.bench.peers import OPS
from gpuclust.bench.rows import read
from gpuclust.errors import InputError

Row = dict[str, str]


def choose(rows: list[Row], op: str, dtype: str, dirty: bool) -> dict[str, list[Row]]:
    """By device and shape the latest measured row of each peer; shapes in the order of their rows."""
    latest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row["op"] != op or row["dtype"] != dtype or not row["time_s"] or (row["dirty"] == "yes" and not dirty):
            continue
        key = (row["device"], row["case"], f"{row['what']} {row['x_at']}")
        if key not in latest or row["date"] >= latest[key]["date"]:
            latest[key] = row
    shapes: dict[str, list[Row]] = {}
    for (device, case, _), row in latest.items():
        shapes.setdefault(f"{case}\n{device}", []).append(row)
    return shapes


def draw(shapes: dict[str, list[Row]], op: str, out: Path) -> None:
    """A panel for each shape: bars of the median time, whiskers from the 20th to the 80th percentile, the limit."""
    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(shapes), 1, figsize=(9, 1.0 + sum(0.6 + 0.32 * len(rows) for rows in shapes.values())), squeeze=False
    )
    for axis, (title, rows) in zip(axes[:, 0], shapes.items(), strict=True):
        rows = sorted(rows, key=lambda row: -float(row["time_s"]))
        for place, row in enumerate(rows):
            middle, low, high = (float(row[name]) * 1e3 for name in ("time_s", "time_p20_s", "time_p80_s"))
            ours = row["what"].startswith("gpuclust")
            axis.barh(place, middle, color="#2b6cb0" if ours else "#a0aec0")
            axis.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=2, linewidth=0.8
            )
            wrong = f", {float(row['mislabel_rate']):.2%} wrong" if row["mislabel_rate"] else ""
            axis.text(high, place, f"  {middle:.3g} ms{wrong}", va="center", fontsize=8)
        limits = [float(row["limit_s"]) * 1e3 for row in rows if row["limit_s"]]
        if limits:
            axis.axvline(min(limits), color="#c53030", linewidth=1, label="limit of this run's ceilings")
            axis.legend(fontsize=7, loc="upper right")
        names = [f"{row['what']} {row['version']}".strip() + f" ({row['x_at']})" * bool(row["x_at"]) for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(x=0.25)
    axes[-1, 0].set_xlabel(f"{op}: milliseconds, median; whiskers: 20th to 80th percentile")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw rows, and nothing but rows.")
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--op", choices=OPS, default="fit")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dirty", action="store_true")
    given = parser.parse_args(words)
    try:
        rows = [row for file in given.rows for row in read(file)]
    except (InputError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    shapes = choose(rows, given.op, given.dtype, given.dirty)
    if not shapes:
        print(f"plot.py: no measured row of {given.op} in {given.dtype} in these files", file=sys.stderr)
        return 2
    draw(shapes, given.op, given.out)
    print(f"{sum(map(len, shapes.values()))} rows drawn: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
