"""What a fit takes beside its rows, in bytes, for each solver; and how it keeps within a limit.

With n rows in a process, d features, k clusters, w bytes of a centroid's value (8 for float64 rows, else 4), L levels
of the sums' grid (1 for float32 rows below 2**21 of them; more for float64 and for weights), r restarts at a time:

    primal: 40 n + d (32 + 24 L + k w)                   + r (40 n + k d (2 w + 16 L))          + work
    dual:   40 n + d (32 + 24 L + 2 k w + 8 s L) + 12 n^2 + r (64 n + 32 k n)                   + work

The primal's restart has centroids, operands (4 bytes a value) and sums, and its centroids and sums once more where it
ends beside others, or where an empty cluster gets a row. The dual's has its products with the rows; its centroids are
of one restart, in the end, made from the sums of s clusters at a time: of as many as there is room for. 32 + 24 L are
the mean, the grid and a row on its way. On a GPU kernels take d (64 + 24 k) more, and in a primal restart k d 12 in
place of 8 L, with d a multiple of 64, where that is more. Streamed rows take 4 n^2 more with the dual solver, for the
products of the image by which seeding draws; single rows that move 24 k d. Rows with weights take 40 n more, and 8 n
for each restart. ``work`` is what is on the way: scores of a piece of rows, float64 copies of a block of them, lists of
those that moved. Less memory makes these pieces smaller, then the restarts that share a pass fewer; what is left over
keeps sketches or gaps, and what saves a pass. No result depends on it.

While the dual solver's matrix is found, 40 n + d (24 + 8 L) + 16 n^2 + work are held: all else of a limit is for wide
slices of streamed rows, and the wider these are the fewer passes it takes.

Where no limit is set a fit gives itself 256 MiB and a tenth of what the rows take, and more where one restart needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.tile import PIECE, up
from gpuclust.cluster.seeding.draws import trials
from gpuclust.cluster.sums import levels_of
from gpuclust.config import environment, show_bytes
from gpuclust.errors import MemoryLimitError

# What is on the way where chunks have their usual size (`gpuclust.cluster.sources.base`): so many times the bytes that
# GPUCLUST_CHUNK_BYTES sets, too; and how often these may be halved before time is all that is lost.
_WORK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_PER_CHUNK_BYTE = 16
_MOST_HALVINGS = 4
# The share of a limit that it may take where that leaves too little for more restarts.
_WORK_SHARE = 2
_DEFAULT_BYTES, _DEFAULT_SHARE = 256 << 20, 10


@dataclass(frozen=True)
class Share:
    """How a limit is divided.

    Attributes
    ----------
    halvings : int
        How often the rows of a chunk are halved.
    together : int
        Restarts that run at the same time.
    spare_bytes : int
        For what may be kept to save time.
    slice_bytes : int
        Of the dual solver, for features of all rows that are streamed.
    seeded : int
        Restarts that are seeded at the same time.
    summed : int or None
        Of the dual solver, clusters whose sums are made at the same time.
    """

    halvings: int
    together: int
    spare_bytes: int
    slice_bytes: int = 0
    seeded: int = 1
    summed: int | None = None


@dataclass(frozen=True)
class Needs:
    """What a solver takes, in bytes: once, for each restart that runs at a time, and with chunks of the usual size.

    Of the dual solver, ``before`` is what is held while its matrix is found; what is left of a limit then is for
    features of streamed rows. ``seeds`` is what seeding a restart takes in place of the ``centroids``, a part of
    ``fixed``; nothing where no rows are read for it. ``sums`` are those of a cluster, one of which ``fixed`` has room
    for, and all of a restart ``sums * clusters``.
    """

    fixed: int
    restart: int
    work: int
    before: int = 0
    centroids: int = 0
    seeds: int = 0
    sums: int = 0
    clusters: int = 1

    @property
    def least(self) -> int:
        """With one restart at a time, and the smallest chunks."""
        return self.fixed + self.restart + (self.work >> _MOST_HALVINGS)

    def within(self, limit: int, restarts: int) -> Share:
        """The share of so many restarts in a limit of at least `least` bytes."""
        summed = min(self.clusters, 1 + (limit - self.least) // self.sums) if self.sums else None
        left = limit - self.fixed - self._more_sums(summed)
        halvings = _halvings(self.work, min(left // _WORK_SHARE, left - self.restart))
        left -= self.work >> halvings
        together = max(1, min(restarts, left // self.restart))
        spare = max(0, left - together * self.restart)
        slices = max(0, limit - self.before - (self.work >> halvings)) if self.before else 0
        made = self.centroids + self._more_sums(summed)
        seeded = max(1, (made + spare // 2) // self.seeds) if self.seeds else together
        return Share(halvings, together, spare, slices, min(together, seeded), summed)

    def used(self, share: Share) -> int:
        """All but what may be kept."""
        more = share.together * self.restart + self._more_sums(share.summed)
        return self.fixed + more + (self.work >> share.halvings)

    def _more_sums(self, summed: int | None) -> int:
        return (summed - 1) * self.sums if summed else 0

    def too_little(self, limit: int) -> MemoryLimitError:
        """The error for a limit below `least`."""
        return MemoryLimitError(
            f"memory_limit leaves {show_bytes(limit)} beside X, and this fit takes at least {show_bytes(self.least)} "
            f"({self.least:,} bytes): set memory_limit to more, or to None"
        )


def primal_needs(problem: Problem, n: int, lightest: float | None = None) -> Needs:
    """Of the primal solver, for n rows of a process; ``lightest`` is the least weight above 0, where rows have some."""
    d, k, value, sums = problem.d, problem.k, *_values(problem, lightest)
    rows, weighted = _rows(problem, n)
    fixed = rows + d * (32 + 3 * sums + k * value) + _kernels(problem)
    twice = d * sums if problem.device.type == "cpu" else max(d * sums, 12 * up(d, PIECE))
    restart = (40 + weighted) * n + k * (d * (2 * value + sums) + twice)
    return Needs(fixed, restart, work_bytes(problem.device))


def dual_needs(
    problem: Problem, n: int, lightest: float | None = None, *, resident: bool = True, moves: bool = False
) -> Needs:
    """Of the dual solver, in the same way; ``moves``: whether single rows move in the end."""
    d, k, value, sums = problem.d, problem.k, *_values(problem, lightest)
    rows, weighted = _rows(problem, n)
    centroids = d * (2 * k * value + sums)
    fixed = (
        rows
        + d * (32 + 3 * sums)
        + centroids
        + _kernels(problem)
        + d * k * 24 * moves
        + (12 if resident else 16) * n * n
    )
    restart, work = (64 + weighted) * n + 32 * k * n, work_bytes(problem.device)
    if resident:
        # Of each drawn row that is tried: itself, and as the image has it.
        return Needs(fixed, restart, work, 0, centroids, d * trials(k) * (value + 16), d * sums, k)
    before = rows + d * (24 + sums) + 16 * n * n + _kernels(problem)
    return Needs(fixed, restart, work, before, sums=d * sums, clusters=k)


def least_bytes(k: int, weighted: bool, n: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a fit of n rows with the primal solver takes at least."""
    return primal_needs(Problem(n, d, k, dtype, device, weighted), n, 1.0 if weighted else None).least


def default_limit(problem: Problem, n: int, needs: Needs) -> int:
    """What a fit gives itself, for n rows of a process."""
    x_bytes = n * problem.d * problem.dtype.itemsize
    return max(needs.fixed + needs.restart + needs.work // 4, _DEFAULT_BYTES + x_bytes // _DEFAULT_SHARE)


def work_bytes(device: torch.device) -> int:
    """What is on the way where chunks have their usual size."""
    chunk_bytes = environment().chunk_bytes
    return _PER_CHUNK_BYTE * chunk_bytes if chunk_bytes else _WORK_BYTES.get(device.type, _WORK_BYTES["cpu"])


def halvings_within(limit: int, device: torch.device) -> int:
    """How often the rows of a chunk are halved so that what is on the way is within a limit."""
    return _halvings(work_bytes(device), limit)


def _halvings(work: int, limit: int) -> int:
    return next((i for i in range(_MOST_HALVINGS) if work >> i <= limit), _MOST_HALVINGS)


def _values(problem: Problem, lightest: float | None) -> tuple[int, int]:
    """Bytes of a centroid's value and of its sum."""
    dtype = torch.float64 if lightest is not None else problem.dtype
    levels = levels_of(problem.n, dtype, 1.0 if lightest is None else lightest)
    return (8 if problem.dtype == torch.float64 else 4), 8 * levels


def _kernels(problem: Problem) -> int:
    """Bytes beside, on a GPU."""
    return 0 if problem.device.type == "cpu" else problem.d * (64 + 24 * problem.k)


def _rows(problem: Problem, n: int) -> tuple[int, int]:
    """Bytes of what is known of the rows, and of what the weights of one take in each restart."""
    return (80 if problem.weights else 40) * n, 8 if problem.weights else 0
