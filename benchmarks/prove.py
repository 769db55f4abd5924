"""Everything that a GPU machine should prove, in one command and under nine minutes:

    PYTHONPATH=. python benchmarks/prove.py OUT [--device cuda|cpu] [--seconds 520]

from a bare checkout, without installation and without a network. The parts run one after another as processes of
their own, so that a crash of one stops no other; each has a time limit, and a part that does not fit in the time left
is named as skipped. OUT gets a log for each part, rows.csv and summary.txt. ``--device cpu`` runs the same parts at
small shapes: a test of this command, of which nothing is claimed.

Exit codes: 0 all parts passed, 1 one failed or was skipped, 2 the command cannot run here.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parents[1]
# Less than this is not worth starting a part with.
LEAST_S = 10.0
FIVE = 5  # pytest's exit code where no test was chosen


@dataclass(frozen=True)
class Part:
    """A process: name (of its log, too), words after the interpreter, seconds, and what it adds to the environment.

    Where ``keep_s`` is given, the limit is all the time that is left, less these seconds for the parts that follow.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    keep_s: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path, device: str) -> Iterator[Part]:
    """The parts in their order. Limits add up to less than the default of --seconds."""
    pytest = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    gpu = {"GPUCLUST_REQUIRE_GPU": "1"} if device == "cuda" else {}
    contract = ROOT / "tests" / "test_contract.py"
    if device == "cuda":
        yield Part("gpu-tests", (*pytest, "-m", "gpu", "--ignore", str(contract), "tests"), 110, None, gpu)
    else:
        yield Part("gpu-tests", (*pytest, "tests/test_ceilings.py", "tests/test_timing.py"), 110)
    if contract.exists():
        # What needs no GPU is proved where there is none.
        chosen = ("-m", "gpu") if device == "cuda" else ("-k", "torch", "-m", "not slow and not gpu")
        yield Part("contract", (*pytest, *chosen, str(contract)), 110, None, gpu)
    rows = ("--rows", str(out / "rows.csv"), "--device", device)
    small = ("--small",) if device == "cpu" else ()
    # Peers of the CPU would take minutes at these shapes.
    peers = ("--peers", "torch,faiss-gpu,flash-kmeans,flashlib,fastkmeans,cuml") if device == "cuda" else ()
    yield Part("rows", ("benchmarks/measure.py", *rows, *small, *peers), 205, 95 if device == "cuda" else 120)
    yield Part(
        "demo",
        ("-m", "gpuclust", "demo", "--device", device, "--force", "--out", str(out / "demo")),
        45 if device == "cuda" else 120,
    )
    if device == "cuda":
        suites = ("benchmarks/bench_fit.py", "benchmarks/bench_pipeline.py", "-k", "cuda")
        yield Part("benchmarks", (*pytest, *suites, "--rows", str(out / "rows.csv")), 50)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that a GPU machine should prove.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs, rows.csv and summary.txt")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts together")
    parser.add_argument("--parts", default="", metavar="A,B", help="only these; all by default")
    given = parser.parse_args(words)
    started_s = monotonic()
    if given.device == "cuda" and (problem := missing_cuda()):
        print(f"prove.py: {problem}; --device cpu tries the command at small shapes", file=sys.stderr)
        return 2
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "summary.txt", "w", encoding="utf-8") as summary:

        def say(line: str) -> None:
            print(line, flush=True)
            summary.write(line + "\n")
            summary.flush()

        for line in machine(given.device):
            say(line)
        good = True
        chosen = list(parts(out, given.device))
        if given.parts:
            chosen = [part for part in chosen if part.name in given.parts.split(",")]
        for part in chosen:
            left_s = given.seconds - (monotonic() - started_s)
            if left_s < LEAST_S:
                say(f"skipped  {part.name}: {left_s:.0f} s were left")
                good = False
                continue
            limit_s = part.limit_s if part.keep_s is None else max(part.limit_s, left_s - part.keep_s)
            told, passed = run(part, out, min(limit_s, left_s))
            say(told)
            good &= passed
        say(f"{'all parts passed' if good else 'not all parts passed'} in {monotonic() - started_s:.0f} s")
    return 0 if good else 1


def run(part: Part, out: Path, limit_s: float) -> tuple[str, bool]:
    """Run a part to its end or its limit: a line that tells what became of it, and whether it passed."""
    log = out / f"{part.name}.log"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **part.environment, "PYTHONPATH": os.pathsep.join(paths)}
    words = list(part.words)
    if words[0] == "benchmarks/measure.py":
        words += ["--seconds", str(limit_s - 8)]
    started_s = monotonic()
    with open(log, "w", encoding="utf-8") as stream:
        stream.write(f"{' '.join(words)}\n")
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped  {part.name}: its limit of {limit_s:.0f} s was over; {last_line(log)}", False
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = monotonic() - started_s
    told = {0: "passed ", FIVE: "empty  "}.get(code, "FAILED ")
    reason = "" if code == 0 else f" with exit code {code}"
    return f"{told}  {part.name}{reason}: {seconds:.0f} s; {last_line(log)}", code == 0


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if len(lines) > 1 else "it printed nothing"


def missing_cuda() -> str | None:
    """Why nothing can be proved on a GPU here, in one line."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch does not import: {error}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def machine(device: str) -> Iterator[str]:
    """What ran it: hardware, versions, commit."""
    sys.path.insert(0, str(ROOT))
    from gpuclust.bench.rows import checkout
    from gpuclust.doctor import hardware, versions

    facts = hardware(device)
    commit, dirty = checkout()
    yield f"{facts['device']}, driver {facts.get('driver', 'none')}, {facts['cores']} cores, {platform.platform()}"
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"commit {commit or 'unknown (no git)'}{', and files that differ from it' if dirty == 'yes' else ''}"


if __name__ == "__main__":
    sys.exit(main())
