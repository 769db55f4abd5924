"""The row that every measurement leaves, and the CSV files that rows are appended to."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpuclust.doctor import hardware, versions
from gpuclust.errors import GpuclustError, InputError

ROOT = Path(__file__).parents[2]
VERSIONS = ("gpuclust", "torch", "torchvision", "scikit-learn", "numpy", "python", "cuda", "triton", "cupy")
CASE = ("op", "n", "d", "k", "batch", "dtype", "data", "x_at", "iterations", "n_init")
MEASURED = (
    "time_s",
    "time_p20_s",
    "time_p80_s",
    "first_s",
    "images_per_s",
    "beside",
    "ratio",
    "ratio_p20",
    "ratio_p80",
    "ratio_of_medians",
    "limit_s",
    "serial_limit_s",
    "limit_share",
)
QUALITY = ("inertia", "n_iter", "wrong_labels", "checked_rows", "mislabel_rate", "recheck_share", "peak_bytes")
COLUMNS = (
    "date",
    "commit",
    "dirty",
    "case",
    *CASE,
    "what",
    "version",
    "device",
    "threads",
    "driver",
    "rounds",
    *MEASURED,
    *QUALITY,
    "missing",
    "note",
    *VERSIONS,
)


def new_row(case: str, what: str, device: torch.device, **values: Any) -> dict[str, Any]:
    """A row with when, where and by which versions; ``values`` are the columns that the measurement fills.

    Raises
    ------
    ValueError
        For a column that there is not.
    """
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise ValueError(f"there are no columns {sorted(unknown)}")
    commit, dirty = checkout()
    place = _hardware(str(device))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "case": case,
        "what": what,
        "device": place["device"],
        "threads": torch.get_num_threads(),
        "driver": place.get("driver"),
        **{name: value for name, value in _versions().items() if name in VERSIONS},
        **{name: value for name, value in values.items() if value is not None},
    }


def check_file(file: Path) -> None:
    """Raise `InputError` if rows cannot be appended to ``file``."""
    try:
        head = file.read_text(encoding="utf-8").partition("\n")[0] if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--rows: cannot read {str(file)!r}: {error}") from error
    if head and head != ",".join(COLUMNS):
        raise InputError(f"--rows: {str(file)!r} has other columns ({head[:60]}...); give another file")
    if not file.parent.is_dir() and file.parent.exists():
        raise InputError(f"--rows: {str(file.parent)!r} is no folder")


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, which is made where there is none.

    Raises
    ------
    InputError
        If the file has other columns.
    GpuclustError
        If it cannot be written.
    """
    check_file(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists() or file.stat().st_size == 0
        with open(file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise GpuclustError(f"cannot write {str(file)!r}: {error.strerror or error}") from error


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file, as text; an empty field is what was not measured."""
    check_file(file)
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@cache
def checkout(root: Path = ROOT) -> tuple[str, str]:
    """The commit of the checkout, and "yes" if files other than rows differ from it, else "no"; empty without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "", ""  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD"), "yes" if changed else "no"
    except (OSError, subprocess.CalledProcessError):
        return "", ""


@cache
def _hardware(device: str) -> dict[str, Any]:
    return hardware(device)


@cache
def _versions() -> dict[str, str]:
    return versions()
