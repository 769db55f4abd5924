"""How benchmarks measure and what they leave: calls timed in turn, and a row for each that tells where it ran.

Timing, rows and their columns are those of `gpuclust.bench`; here they meet pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuclust.bench.case import Case
from gpuclust.bench.ceilings import Ceilings, limit_s, measure
from gpuclust.bench.ours import our_backends
from gpuclust.bench.peers import all_peers
from gpuclust.bench.rows import MEASURED, QUALITY, append, check_file, new_row
from gpuclust.bench.run import Bench
from gpuclust.bench.timing import Clock, spread, turn
from gpuclust.errors import InputError

# Of an operation that takes so long that no more fit ten seconds.
LEAST_ROUNDS = 5

_rows: list[dict[str, Any]] = []

Call = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="CSV file that a row per measurement is appended to")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--rows"):
        try:
            check_file(file)
        except InputError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for row in _rows:
        shown = [
            f"{name} {row[name]:.4g}"
            for name in (*MEASURED, *QUALITY)
            if name in row and not isinstance(row[name], str)
        ]
        told = ", ".join(shown) if "time_s" in row else row["missing"]
        terminalreporter.line(f"{row['case']}, {row['device']}: {row.get('op', '')} {row['what']}: {told}")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param, 0 if request.param == "cuda" else None)


@pytest.fixture
def in_turn(benchmark: Any, device: torch.device) -> Callable[..., tuple[list[float], list[float]]]:
    """``in_turn(ours, peer, rounds, warmup)``: seconds of each call of both, called peer, ours, peer, ours ...

    pytest-benchmark's own table has the time of a round, which is both together.
    """
    if benchmark.disabled:
        pytest.skip("--benchmark-disable: nothing would be measured")

    def measured(ours: Call, peer: Call, rounds: int, warmup: int = 0) -> tuple[list[float], list[float]]:
        clock, times = Clock(device), []
        benchmark.pedantic(lambda: times.append(turn(clock, [peer, ours])), rounds=rounds, warmup_rounds=warmup)
        peer_s, ours_s = zip(*times[warmup:], strict=True)
        return list(ours_s), list(peer_s)

    return measured


@pytest.fixture
def keep(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[dict[str, Any]], None]:
    """Keeps a row: for the summary, in pytest-benchmark's own record, and in the file of --rows."""

    def kept(row: dict[str, Any]) -> None:
        which = " ".join(filter(None, (row.get("op"), row["what"])))
        benchmark.extra_info.update({f"{which}: {name}": value for name, value in row.items()})
        _rows.append(row)
        if file := request.config.getoption("--rows"):
            append(file, [row])

    return kept


@pytest.fixture
def record(keep: Callable[[dict[str, Any]], None], device: torch.device) -> Callable[..., dict[str, Any]]:
    """``record(case, what, times_s, peer_s=None, **columns)``: the row, with its medians and the ratios to a peer."""

    def appended(
        case: str, what: str, times_s: Sequence[float], peer_s: Sequence[float] | None = None, **columns: Any
    ) -> dict[str, Any]:
        row = new_row(case, what, device, rounds=len(times_s), **spread("time{}_s", times_s), **columns)
        if peer_s is not None:
            row |= spread("ratio{}", np.divide(peer_s, times_s))
            row["ratio_of_medians"] = float(np.median(peer_s) / np.median(times_s))
        if "limit_s" in row:
            row["limit_share"] = row["limit_s"] / row["time_s"]
        keep(row)
        return row

    return appended


@pytest.fixture
def measure_case(
    keep: Callable[[dict[str, Any]], None], benchmark: Any, device: torch.device
) -> Callable[..., list[dict[str, Any]]]:
    """``measure_case(case, ops, title)``: rows of gpuclust and every peer; fails on a wrong label of gpuclust's."""
    if benchmark.disabled:
        pytest.skip("--benchmark-disable: nothing would be measured")

    def measured(case: Case, ops: Sequence[str], title: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []

        def tell(row: dict[str, Any]) -> None:
            rows.append(row)
            keep(row)

        peers = [*our_backends(device), *all_peers()]
        bench = Bench(device, peers, ceilings_of(device), tell, least_rounds=LEAST_ROUNDS)
        benchmark.pedantic(bench.run, args=(case, ops, title), rounds=1)
        assert not bench.failures, "; ".join(bench.failures)
        return rows

    return measured


@pytest.fixture
def limits(device: torch.device) -> Callable[[Case, int], dict[str, float]]:
    """``limits(case, n_iter)``: columns of the least time of a fit that takes so many iterations in each restart.

    Without the share: `record` adds it.
    """

    def found(case: Case, n_iter: int) -> dict[str, float]:
        passes = n_iter * case.n_init
        least = limit_s(ceilings_of(device), "fit", case.n, case.d, case.k, case.torch_dtype, passes)
        assert least is not None
        return dict(zip(("limit_s", "serial_limit_s"), least, strict=True))

    return found


@cache
def ceilings_of(device: torch.device) -> Ceilings:
    return measure(device)
