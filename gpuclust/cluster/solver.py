"""Which solver: what the primal and the dual one would take, in seconds and bytes, from the sizes alone.

Both end with the same bits, so that the choice is one of time. It does not look at the machine: constants are those of
one machine of each kind, and what decides is the ratio of the operations. What both do, moments, seeding and the last
distances, is left out. A restart is taken to need 12 iterations, in which every row joins a cluster four times: once in
the first, and three times in all that follow. That is what activations need; on rows that lie in clear groups restarts
end after two or three, and the primal solver is then faster than is said here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuclust.cluster.gram import BLOCKS
from gpuclust.config import show_bytes
from gpuclust.errors import UnavailableError

# Operations per second of float32 products (float64: half of that), and bytes per second that are read.
_RATES = {"cpu": (150e9, 10e9), "cuda": (50e12, 2e12)}
_PASSES, _JOINS = 12, 4
# Bytes moved for each value of the centroids in a pass: means, movement, operands.
_CENTROID_BYTES = 80
# Adding a row to a sum costs as much as so many columns of a product.
_PER_ADD = 16
# Bytes for what grows with the restarts that run together, where no limit is given.
_BUDGET_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Plan:
    """What the solvers would take; ``refused`` says why the dual one cannot run, if so."""

    primal_s: float
    primal_bytes: int
    dual_s: float
    dual_bytes: int
    refused: str | None

    def __str__(self) -> str:
        if self.refused:
            return f"{_shown('primal', self.primal_s, self.primal_bytes)}; no dual: {self.refused}"
        return "; ".join(
            (_shown("dual", self.dual_s, self.dual_bytes), _shown("primal", self.primal_s, self.primal_bytes))
        )

    def choose(self, solver: str) -> str:
        """The solver for what was asked for; with "auto" the faster one.

        Raises
        ------
        UnavailableError
            If the dual solver was asked for and cannot run.
        """
        if solver == "dual" and self.refused:
            raise UnavailableError(f"solver='dual' cannot run here: {self.refused}; use solver='auto' or 'primal'")
        if solver != "auto":
            return solver
        return "dual" if self.refused is None and self.dual_s < self.primal_s else "primal"


def plan(
    n: int,
    d: int,
    k: int,
    restarts: int,
    device: str,
    memory_limit: int | None,
    *,
    resident: bool = True,
    ranks: int = 1,
    asked: bool = False,
) -> Plan:
    """The plan for n rows of width d; a row's value is taken to have 4 bytes.

    Parameters
    ----------
    device : str
        Its type.
    memory_limit : int or None
        By default what `budget_bytes` gives, unless the dual solver was ``asked`` for.
    resident : bool
        Whether the rows lie on the device.
    ranks : int
        Processes that share the rows.
    """
    products, read = _RATES.get(device, _RATES["cpu"])
    clusters, values = restarts * k, n * d
    joins = 2.0 * values * min(k, _PER_ADD) / (products / 2)
    one_pass = max(2.0 * values * clusters / products, 4 * values / read) + _CENTROID_BYTES * clusters * d / read
    primal_s = _PASSES * one_pass + _JOINS * restarts * joins
    triangle = (1 + 1 / BLOCKS) * n * values / (products / 2)
    iterations = _PASSES * clusters * n * (2.0 * n / (products / 2) + 80 / read)
    # Rows are converted once, and the clusters of one restart are made.
    dual_s = triangle + iterations + 28 * values / read + joins

    budget = budget_bytes(device, memory_limit)
    primal_bytes = primal_together(n, d, k, restarts, budget) * _primal_bytes(n, d, k)
    dual_bytes = _dual_fixed(n, d, k, budget) + dual_together(n, d, k, restarts, budget) * _dual_bytes(n, k)
    refused = None
    if ranks > 1:
        refused = f"{ranks} processes share the rows, and it needs all of them in one"
    elif not resident:
        refused = "the rows are streamed (from a file, memory or chunks), and it needs them on the device"
    elif not asked and d < 4 * n:
        refused = "its matrix would take more than half of what the rows take"
    elif dual_bytes > budget and (memory_limit is not None or not asked):
        refused = f"it takes {show_bytes(dual_bytes)} beside the rows, of {show_bytes(budget)}"
    return Plan(primal_s, primal_bytes, dual_s, dual_bytes, refused)


def budget_bytes(device: str, memory_limit: int | None = None) -> int:
    """Bytes for what grows with the restarts that run together, on a type of device."""
    return memory_limit or _BUDGET_BYTES.get(device, _BUDGET_BYTES["cpu"])


def primal_together(n: int, d: int, k: int, restarts: int, budget: int) -> int:
    """Restarts that the primal solver runs at a time, for at most n rows of a process."""
    return min(restarts, max(1, budget // _primal_bytes(n, d, k)))


def dual_together(n: int, d: int, k: int, restarts: int, budget: int) -> int:
    """Restarts that the dual solver runs at a time."""
    return min(restarts, max(1, (budget - _dual_fixed(n, d, k, budget)) // _dual_bytes(n, k)))


def _primal_bytes(n: int, d: int, k: int) -> int:
    return 32 * ((k + 1) * d + n)


def _dual_bytes(n: int, k: int) -> int:
    """Of a restart: products with the rows, memberships, and a copy of both at times; labels."""
    return 32 * k * n + 64 * n


def _dual_fixed(n: int, d: int, k: int, budget: int) -> int:
    """The Gram matrix, a slice of the features, scores, and the true centroids of a restart."""
    return 8 * n * n + min(16 << 20, budget // 8, 8 * n * d) + min(48 << 20, 48 * k * n) + 48 * k * d


def _shown(solver: str, seconds: float, size: int) -> str:
    return f"{solver}: {seconds:.2g} s, {show_bytes(size)}"
