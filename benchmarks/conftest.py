"""How benchmarks measure and what they leave: two calls timed in turn, and a row for each that tells where it ran."""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuclust.doctor import hardware, versions

ROOT = Path(__file__).parent.parent
VERSIONS = ("gpuclust", "torch", "torchvision", "scikit-learn", "numpy", "python", "cuda")
MEASURED = ("time_s", "time_p20_s", "time_p80_s", "images_per_s", "ratio", "ratio_p20", "ratio_p80", "ratio_of_medians")
QUALITY = ("inertia", "n_iter", "wrong_labels", "recheck_share")
COLUMNS = ("date", "commit", "case", "what", "device", "threads", "rounds", *MEASURED, *QUALITY, *VERSIONS)

_rows: list[dict[str, Any]] = []

Call = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="CSV file that a row per measurement is appended to")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--rows")
    if file and file.exists() and (head := file.read_text().partition("\n")[0]) != ",".join(COLUMNS):
        raise pytest.UsageError(f"--rows: {file} has other columns ({head}); give another file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for row in _rows:
        shown = (f"{name} {row[name]:.4g}" for name in (*MEASURED, *QUALITY) if name in row)
        terminalreporter.line(f"{row['case']}, {row['device']}: {row['what']}: {', '.join(shown)}")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def in_turn(benchmark: Any, device: torch.device) -> Callable[..., tuple[list[float], list[float]]]:
    """``in_turn(ours, peer, rounds, warmup)``: seconds of each call of both, called peer, ours, peer, ours ..."""
    if benchmark.disabled:
        pytest.skip("--benchmark-disable: nothing would be measured")

    def finish(call: Call) -> None:
        call()  # what it returns is freed at once: no call pays for another's memory
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(ours: Call, peer: Call, rounds: int, warmup: int = 0) -> tuple[list[float], list[float]]:
        peer_s = []

        def before() -> tuple[tuple[Call], dict[str, Any]]:
            started = time.perf_counter()
            finish(peer)
            peer_s.append(time.perf_counter() - started)
            return (ours,), {}

        benchmark.pedantic(finish, setup=before, rounds=rounds, warmup_rounds=warmup)
        return benchmark.stats.stats.data, peer_s[warmup:]

    return measure


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: Any, device: torch.device, commit: str
) -> Callable[..., dict[str, Any]]:
    """``record(case, what, times_s, peer_s=None, **measured)``: the row, with its medians and the ratios to a peer."""

    def append(
        case: str, what: str, times_s: Sequence[float], peer_s: Sequence[float] | None = None, **measured: float
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "case": case,
            "what": what,
            "device": hardware(device.type)["device"],
            "threads": torch.get_num_threads(),
            "rounds": len(times_s),
            **spread("time{}_s", times_s),
            **measured,
            **{name: value for name, value in versions().items() if name in VERSIONS},
        }
        if peer_s is not None:
            row |= spread("ratio{}", np.divide(peer_s, times_s))
            row["ratio_of_medians"] = float(np.median(peer_s) / np.median(times_s))
        benchmark.extra_info.update({f"{what}: {name}": value for name, value in row.items()})
        _rows.append(row)
        if file := request.config.getoption("--rows"):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = not file.exists()
            with open(file, "a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
        return row

    return append


def spread(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {name.format(""): middle, name.format("_p20"): low, name.format("_p80"): high}


@pytest.fixture(scope="session")
def commit() -> str:
    """The commit of this checkout, with -dirty if files other than results differ from it; empty without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
