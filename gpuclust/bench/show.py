"""Rows as a person reads them: a table for each operation, and who was not measured and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpuclust.config import show_bytes

_HEAD = ("op", "what", "X", "time", "p20 to p80", "rows/s", "ratio", "of limit", "wrong", "inertia", "iter", "memory")


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a table of measured rows, then one line for each reason why a row has no time."""
    compared = {str(row["beside"]) for row in rows if row.get("beside")}
    table = [_HEAD, *(_cells(row, compared) for row in rows if "time_s" in row)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEAD))]
    op = None
    for cells in table:
        if op not in (None, "op", cells[0]):
            yield ""
        op = cells[0]
        shown = (
            text.ljust(width) if column < 3 else text.rjust(width)
            for column, (text, width) in enumerate(zip(cells, widths, strict=True))
        )
        yield "  ".join(shown).rstrip()
    if compared:
        yield f"ratio: time over that of {' or '.join(sorted(compared))} in the same round (above 1: it takes longer)"
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("missing"):
            reasons.setdefault((str(row.get("op") or ""), str(row["missing"])), []).append(_who(row))
    for (op, reason), names in reasons.items():
        yield f"not measured: {', '.join(names)}{f' ({op})' if op else ''}: {reason}"


def _who(row: Mapping[str, Any]) -> str:
    return f"{row['what']} {row['version']}" if row.get("version") else str(row["what"])


def _cells(row: Mapping[str, Any], compared: set[str]) -> tuple[str, ...]:
    wrong = ""
    if row.get("checked_rows"):
        wrong = f"{row['wrong_labels']:,} of {row['checked_rows']:,}"
    passed = row["n"]  # rows that were labelled, updated or looked at
    if row["op"] == "fit":
        passed *= row["batch"] * row["n_init"] * (row.get("n_iter") or 1)
    return (
        str(row["op"]),
        _who(row),
        str(row["x_at"]),
        _time(row["time_s"]),
        f"{_time(row['time_p20_s'])} to {_time(row['time_p80_s'])}",
        f"{passed / row['time_s']:.3g}",
        f"{row['ratio']:.2f}" if "ratio" in row else "1" if row["what"] in compared else "",
        f"{row['limit_share']:.1%}" if "limit_share" in row else "",
        wrong,
        f"{row['inertia']:.7g}" if "inertia" in row else "",
        str(row.get("n_iter", "")),
        show_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
    )


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
