"""What ``gpuclust bench`` does: ceilings, then a row for every backend and every peer, and who is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpuclust.bench.case import DATA, Case
from gpuclust.bench.ceilings import measure
from gpuclust.bench.ours import our_backends
from gpuclust.bench.peers import choose_ops, choose_peers
from gpuclust.bench.rows import append, check_file
from gpuclust.bench.run import Bench
from gpuclust.bench.show import lines
from gpuclust.cluster.sources.inputs import find_device
from gpuclust.config import environment
from gpuclust.doctor import hardware
from gpuclust.errors import GpuclustError


def bench(
    case: Case, *, device: str, ops: str, peers: str, rows: Path | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure a case on a device and tell every line of what was found; the rows.

    Parameters
    ----------
    ops, peers : str
        As `gpuclust.bench.peers.choose_ops` and `choose_peers` take them.
    rows : path or None
        A CSV file that each row is appended to as soon as it is there.
    say : Callable
        Takes a line.

    Raises
    ------
    InputError
        For operations, peers, a device or a file that cannot be used.
    GpuclustError
        If a label of gpuclust's is wrong, or one of its backends fails, after all else was measured.
    """
    operations, others, place = choose_ops(ops), choose_peers(peers), _device(device)
    if rows:
        check_file(rows)
    say(f"{case}, seed {case.seed}, {DATA}; {hardware(str(place))['device']}, {torch.get_num_threads()} threads")
    ceilings = measure(place)
    say(f"ceilings: {ceilings}")
    measured: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        measured.append(row)
        if rows:
            append(rows, [row])

    run = Bench(place, [*our_backends(place), *others], ceilings, tell)
    run.run(case, operations)
    for line in lines(measured):
        say(line)
    if rows:
        say(f"rows: {rows}")
    if run.failures:
        raise GpuclustError("; ".join(run.failures))
    return measured


def _device(name: str) -> torch.device:
    if name == "auto":
        name = environment().device or "auto"
    place = find_device(name)
    # With a number, so that what is asked of it is asked of this one.
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place
