"""Which solver: what the primal and the dual one would take, in seconds, bytes and passes, from the sizes alone.

Both end with the same bits, so that the choice is one of time. It does not look at the machine: constants are those of
one machine of each kind, and what decides is the ratio of the operations. Of rows on the device, what both do, moments,
seeding and the last distances, is left out. A restart is taken to need 12 iterations, in which every row joins a
cluster four times: once in the first, and three times in all that follow. That is what activations need; on rows that
lie in clear groups restarts end after two or three, and the primal solver is then faster than is said here.

Rows that are streamed are read in passes, whose number times the seconds of one counts for each solver: all of them,
the same ones too. The primal's seeding reads them twice for each cluster, for the rows that it tries and for distances;
the dual's not at all, but it reads them once for each wide slice of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.gram import BLOCKS, slice_width, wide_width
from gpuclust.cluster.memory import Needs, Share, default_limit, dual_needs, primal_needs
from gpuclust.cluster.seeding.draws import trials
from gpuclust.config import show_bytes
from gpuclust.errors import MemoryLimitError, UnavailableError
from gpuclust.free import free_bytes

# Operations per second of float32 products (float64: half of that), and bytes per second that are read.
_RATES = {"cpu": (150e9, 10e9), "cuda": (50e12, 2e12)}
_PASSES, _JOINS = 12, 4
# Bytes moved for each value of the centroids in a pass: means, movement, operands.
_CENTROID_BYTES = 80
# Bytes moved for each score in a pass: torch's operations on a CPU go over all of them, kernels keep them.
_SCORE_BYTES = {"cpu": 40, "cuda": 0}
# Passes over streamed rows of every fit, for moments and the last distances; of the dual solver, for true centroids and
# what single rows decide.
_ALWAYS, _DECIDED = 4, 3
# Adding a row to a sum costs as much as so many columns of a product.
_PER_ADD = 16


@dataclass(frozen=True)
class Plan:
    """What the solvers would take; ``refused`` says why the dual one cannot run, if so, and ``limited`` why the primal.

    ``primal`` and ``dual`` are how they divide the limit; ``primal_passes`` and ``dual_passes`` how often they read
    rows that are streamed, 0 where these lie on the device.
    """

    primal_s: float
    primal_bytes: int
    primal: Share
    dual_s: float
    dual_bytes: int
    dual: Share
    refused: str | None
    limited: MemoryLimitError | None = None
    primal_passes: int = 0
    dual_passes: int = 0

    def __str__(self) -> str:
        primal = _shown("primal", self.primal_s, self.primal_bytes, self.primal_passes)
        if self.refused:
            return f"{primal}; no dual: {self.refused}"
        return f"{_shown('dual', self.dual_s, self.dual_bytes, self.dual_passes)}; {primal}"

    def choose(self, solver: str) -> tuple[str, Share]:
        """The solver for what was asked for, with "auto" the faster one that the limit allows, and its share.

        Raises
        ------
        UnavailableError
            If the dual solver was asked for and cannot run.
        MemoryLimitError
            If the limit is too little.
        """
        if solver == "dual" and self.refused:
            raise UnavailableError(f"solver='dual' cannot run here: {self.refused}; use solver='auto' or 'primal'")
        faster = self.refused is None and (self.limited is not None or self.dual_s < self.primal_s)
        if solver == "dual" or (solver == "auto" and faster):
            return "dual", self.dual
        if self.limited:
            raise self.limited
        return "primal", self.primal


def plan(
    problem: Problem,
    memory_limit: int | None = None,
    *,
    rows: int | None = None,
    lightest: float | None = None,
    resident: bool = True,
    asked: bool = False,
    pass_s: float = 0.0,
    moves: bool = False,
) -> Plan:
    """The plan for a problem; a row's value on the device is taken to have 4 bytes.

    Parameters
    ----------
    memory_limit : int or None
        Bytes beside the rows; by default `gpuclust.cluster.memory.default_limit`, and for a dual solver that was
        ``asked`` for all that is free.
    rows : int, optional
        The most that a process has.
    lightest : float, optional
        The least weight above 0, where rows have weights.
    resident : bool
        Whether the rows lie on the device; else they are streamed.
    pass_s : float
        Seconds of one pass over rows that are streamed; 0.0: as their bytes take.
    moves : bool
        Whether single rows move in the end.
    """
    n, d, restarts, device = problem.n, problem.d, problem.restarts, problem.device
    products, read = _RATES.get(device.type, _RATES["cpu"])
    clusters, values = restarts * problem.k, n * d
    joins = 2.0 * values * min(problem.k, _PER_ADD) / (products / 2)
    moved = _CENTROID_BYTES * clusters * d + _SCORE_BYTES.get(device.type, 0) * clusters * n
    one_pass = max(2.0 * values * clusters / products, 4 * values / read) + moved / read
    primal_s = _PASSES * one_pass + _JOINS * restarts * joins
    triangle = (1 + 1 / BLOCKS) * n * values / (products / 2)
    iterations = _PASSES * clusters * n * (2.0 * n / (products / 2) + 80 / read)
    # Rows are converted once, and the clusters of one restart are made.
    dual_s = triangle + iterations + 28 * values / read + joins

    rows = n if rows is None else rows
    primal = primal_needs(problem, rows, lightest)
    dual = dual_needs(problem, rows, lightest, resident=resident, moves=moves)
    given = default_limit(problem, rows, primal) if memory_limit is None else memory_limit
    shares = [needs.within(max(given, needs.least), restarts) for needs in (primal, dual)]
    used = [_peak(problem, rows, primal, shares[0]), _peak(problem, rows, dual, shares[1])]
    passes = [0, 0]
    if not resident:
        size = problem.dtype.itemsize
        width = slice_width(rows, d, device, shares[1].halvings)
        wide = wide_width(rows, d, width, size, shares[1].slice_bytes)
        groups = math.ceil(restarts / shares[0].together)
        more = math.ceil(problem.k / (shares[1].summed or problem.k)) - 1  # passes for centroids
        passes = [
            _ALWAYS + groups * (1 + 2 * problem.k + _PASSES),
            _ALWAYS + math.ceil(d / wide) + _DECIDED + more,
        ]
        used[1] = max(dual.used(shares[1]), dual.before + rows * wide * size + (dual.work >> shares[1].halvings))
        one_pass = pass_s or rows * d * size / read
        primal_s += passes[0] * one_pass
        dual_s += passes[1] * one_pass + triangle
    room = free_bytes(device) if asked and memory_limit is None else given
    refused, limited = None, None
    if problem.ranks > 1:
        refused = f"{problem.ranks} processes share the rows, and it needs all of them in one"
    elif not asked and d < 4 * n:
        refused = "its matrix would take more than half of what the rows take"
    elif dual.least > room:
        refused = f"it takes {show_bytes(dual.least)} beside the rows, of {show_bytes(room)}"
    if memory_limit is not None and memory_limit < primal.least:
        limited = primal.too_little(memory_limit)
    return Plan(primal_s, used[0], shares[0], dual_s, used[1], shares[1], refused, limited, *passes)


def _peak(problem: Problem, rows: int, needs: Needs, share: Share) -> int:
    """What a solver holds at most: while it iterates, or while it seeds, and keeps what its share has room for."""
    image, drawn = 8 * rows * problem.d, 8 * rows * share.together * (trials(problem.k) + 1)
    kept = sum(size for size in (image, drawn) if size <= share.spare_bytes // 2)
    seeding = needs.fixed - needs.centroids + share.seeded * needs.seeds + (needs.work >> share.halvings) + kept
    return max(needs.used(share), seeding)


def _shown(solver: str, seconds: float, size: int, passes: int) -> str:
    return f"{solver}: {seconds:.2g} s, {show_bytes(size)}" + (f", {passes} passes" if passes else "")
