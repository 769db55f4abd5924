"""Everything that a GPU machine should prove, in one command and under nine minutes:

    PYTHONPATH=. python benchmarks/prove.py OUT [--device cuda|cpu] [--seconds 520]

from a bare checkout, without installation and without a network. The parts run one after another as processes of
their own, so that a crash of one stops no other; each has a time limit, and a part that does not fit in the time left
is named as skipped. OUT gets a log for each process, rows.csv and summary.txt. ``--device cpu`` runs the same parts at
small shapes: a test of this command, of which nothing is claimed.

The time of tests of kernels goes into compiling them for hundreds of types, widths and strides, and into their
references on the CPU: some processes side by side take a share of these tests each. What needs the GPU or its memory
for itself runs before, alone.

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
from contextlib import ExitStack
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
    Of several ``shares`` each is a process, at the same time.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    keep_s: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    shares: int = 1


def parts(out: Path, device: str) -> Iterator[Part]:
    """The parts in their order. Limits add up to less than the default of --seconds."""
    pytest = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    if device == "cuda":
        gpu = {"GPUCLUST_REQUIRE_GPU": "1"}
        names = "cupy", "cupy_bounds", "cupy_rows", "cupy_sums", "cupy_wide", "prepare", "step", "triton", "contract"
        kernels = tuple(f"tests/test_{name}.py" for name in names)
        apart = tuple(word for file in kernels for word in ("--ignore", file))
        yield Part("gpu-tests", (*pytest, "-m", "gpu", *apart, "tests"), 60, None, gpu)
        shares, threads = processes()
        environment = {**gpu, "OMP_NUM_THREADS": str(threads)}
        yield Part("kernels", (*pytest, "-m", "gpu", *kernels), 165, None, environment, shares)
    else:
        # What needs no GPU is proved where there is none.
        yield Part("gpu-tests", (*pytest, "tests/test_ceilings.py", "tests/test_timing.py"), 60)
        chosen = ("-k", "torch- and x8- and not cuda", "-m", "not slow and not gpu")
        yield Part("kernels", (*pytest, *chosen, "tests/test_contract.py"), 60, shares=2)
    rows = ("--rows", str(out / "rows.csv"), "--device", device)
    small = ("--small",) if device == "cpu" else ()
    # Peers of the CPU would take minutes at these shapes.
    peers = ("--peers", "torch,faiss-gpu,flash-kmeans,flashlib,fastkmeans,cuml") if device == "cuda" else ()
    yield Part("rows", ("benchmarks/measure.py", *rows, *small, *peers), 145, 145 if device == "cuda" else 120)
    if device == "cuda":  # whether the kernel for compute capability 9.0 gains what would make it be taken there
        alone = ("--peers", "torch", "--ours", "cupy")
        yield Part("hopper", ("benchmarks/measure.py", *rows, *alone), 50, None, {"GPUCLUST_HOPPER": "1"})
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
            for told, passed in run(part, out, min(limit_s, left_s)):
                say(told)
                good &= passed
        say(f"{'all parts passed' if good else 'not all parts passed'} in {monotonic() - started_s:.0f} s")
    return 0 if good else 1


def processes() -> tuple[int, int]:
    """How many run side by side, and the threads of each: they keep 500 MB of the GPU and a GB of the host apiece."""
    cores = os.cpu_count() or 1
    count = max(1, min(10, cores - 2))
    return count, max(1, cores // count)


def run(part: Part, out: Path, limit_s: float) -> Iterator[tuple[str, bool]]:
    """Run a part to its end or its limit: for each of its processes what became of it, and whether it passed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **part.environment, "PYTHONPATH": os.pathsep.join(paths)}
    words = list(part.words)
    if words[0] == "benchmarks/measure.py":
        words += ["--seconds", str(limit_s - 8)]
    names = [part.name] if part.shares == 1 else [f"{part.name}-{number + 1}" for number in range(part.shares)]
    started_s = monotonic()
    with ExitStack() as running:
        processes = []
        for number, name in enumerate(names):
            own = [*words, "--share", f"{number + 1}/{part.shares}"] if part.shares > 1 else words
            stream = running.enter_context(open(out / f"{name}.log", "w", encoding="utf-8"))
            stream.write(f"{' '.join(own)}\n")
            stream.flush()
            process = subprocess.Popen(
                [sys.executable, *own],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            running.callback(end, process)
            processes.append(process)
        for name, process in zip(names, processes, strict=True):
            log = out / f"{name}.log"
            try:
                code = process.wait(max(0.0, limit_s - (monotonic() - started_s)))
            except subprocess.TimeoutExpired:
                end(process)
                yield f"stopped  {name}: its limit of {limit_s:.0f} s was over; {last_line(log)}", False
                continue
            told = {0: "passed ", FIVE: "empty  "}.get(code, "FAILED ")
            reason = "" if code == 0 else f" with exit code {code}"
            yield f"{told}  {name}{reason}: {monotonic() - started_s:.0f} s; {last_line(log)}", code == 0


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that has not ended, and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
