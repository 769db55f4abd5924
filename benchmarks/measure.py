"""Rows of the shapes of `shapes.py`, each shape in a process of its own: a crash costs the rows of one.

    PYTHONPATH=. python benchmarks/measure.py --rows FILE [--device cuda] [--seconds 200] [--peers all] [--ours all]

On a GPU the next process imports what it needs while one measures. What does not fit the seconds is named, a shape's
operation too. Exit code 1 if it was not all measured, a label of gpuclust's was wrong, or a backend failed.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shapes import Shape

DTYPES = ("float32", "float16")
# Seconds that a process needs before it can measure: less is not worth beginning with; and those that one shape may
# take at most. What a call that nobody interrupts adds to a shape's seconds is a third of them at most.
START_S, SHAPE_S, LATE = 8.0, 60.0, 1.33


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rows of the shapes, each in a process of its own.")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--peers", default="all")
    parser.add_argument("--ours", default="all", metavar="A,B", help="only these of gpuclust's backends")
    parser.add_argument("--small", action="store_true", help="small shapes, for a test of this command")
    parser.add_argument("--only", type=int, help="the shape of this number, in this process")
    parser.add_argument("--wait", action="store_true", help="with --only: the seconds come in a line of standard input")
    given = parser.parse_args(words)
    deadline_s = monotonic() + given.seconds
    from shapes import BY_DEVICE, SMALL

    shapes = SMALL if given.small else BY_DEVICE[given.device]
    if given.only is not None:
        return measure(shapes[given.only], given, deadline_s)
    command = [
        sys.executable,
        __file__,
        "--wait",
        "--rows",
        str(given.rows),
        "--peers",
        given.peers,
        "--ours",
        given.ours,
    ]
    command += ["--device", given.device] + ["--small"] * given.small
    started: dict[int, subprocess.Popen[str]] = {}

    def start(number: int) -> None:
        if number < len(shapes) and number not in started:
            words = [*command, "--only", str(number)]
            started[number] = subprocess.Popen(words, stdin=subprocess.PIPE, text=True)

    done = 0
    try:
        for number, shape in enumerate(shapes):
            left_s = deadline_s - monotonic()
            if left_s < START_S:
                print(f"skipped, no time left: {shape.name}", flush=True)
                continue
            # What is left is shared, but a shape may be late: the ones after it are then skipped by name.
            seconds = min(SHAPE_S, max(left_s / (len(shapes) - number), START_S))
            start(number)
            try:
                started[number].stdin.write(f"{seconds}\n")  # type: ignore[union-attr]
                started[number].stdin.flush()  # type: ignore[union-attr]
            except BrokenPipeError:
                pass  # it ended already: its exit code says so
            if given.device == "cuda" or given.small:  # else what it imports would take the time of what is measured
                start(number + 1)
            try:
                code = started[number].wait(min(left_s, LATE * seconds + START_S))
            except subprocess.TimeoutExpired:
                print(f"stopped, it took more than {LATE * seconds + START_S:.0f} s: {shape.name}", flush=True)
                started[number].kill()
                continue
            if code:
                print(f"failed with exit code {code}: {shape.name}", flush=True)
            done += not code
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    print(f"{done} of {len(shapes)} shapes measured without a fault: {given.rows}")
    return 0 if done == len(shapes) else 1


def measure(shape: Shape, given: argparse.Namespace, deadline_s: float) -> int:
    """One shape, in float32 and float16, every operation, by gpuclust and every peer."""
    import torch
    from shapes import fitting, with_dtype

    from gpuclust.bench.ceilings import measure as ceilings_of
    from gpuclust.bench.ours import our_backends
    from gpuclust.bench.peers import OPS, choose_peers
    from gpuclust.bench.rows import append
    from gpuclust.bench.run import Bench
    from gpuclust.bench.show import lines

    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    others = choose_peers(given.peers)
    if given.wait:
        for peer in others:
            with suppress(Exception):  # the row of who does not import says why
                importlib.import_module(peer.module or "gpuclust")
        deadline_s = monotonic() + float(sys.stdin.readline() or 0)
    ours = [peer for peer in our_backends(device) if given.ours == "all" or peer.backend in given.ours.split(",")]
    peers = [*ours, *others]
    ceilings = ceilings_of(device)
    print(f"{shape.name}: {shape.source}\nceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        append(given.rows, [row])

    failures: list[str] = []
    for number, dtype in enumerate(DTYPES):
        left_s = deadline_s - monotonic()
        if number and left_s < 2:
            print(f"skipped, no time left: {shape.name} in {dtype}", flush=True)
            continue
        case = with_dtype(shape, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            case = fitting(case, torch.cuda.mem_get_info(device)[0])
        until_s = monotonic() + left_s / (len(DTYPES) - number)
        bench = Bench(device, peers, ceilings, tell, budget_s=left_s / 12, deadline_s=until_s, failures=failures)
        bench.run(case.case, OPS, case.title())
        print("\n".join([case.title(), *lines(rows), ""]), flush=True)
        rows.clear()
    for failure in failures:
        print(f"failure: {failure}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
