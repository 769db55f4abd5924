"""What a verbose fit prints of its iterations, in scikit-learn's words; restarts run together, so each line has its."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Story:
    """Lines about some restarts on their way.

    Parameters
    ----------
    tell : Callable
        Takes a line.
    restarts : sequence of int
        Their numbers among all.
    unit : float
        What inertias are multiplied with.
    tol : float
        At which movement of the centroids a restart ends.
    """

    def __init__(self, tell: Callable[[str], None], restarts: Sequence[int], unit: float, tol: float) -> None:
        self._tell, self._restarts, self._unit, self._tol = tell, restarts, unit, tol
        tell("Initialization complete")

    def iteration(self, restart: int, number: int, inertia: float) -> None:
        """Iteration ``number``, from 0, of a restart found labels of this inertia for its centroids."""
        self._tell(f"Iteration {number}, inertia {inertia * self._unit:.10g}, restart {self._restarts[restart]}.")

    def end(self, restart: int, n_iter: int, shifts: Sequence[float]) -> None:
        """A restart ended; its labels repeated if it made an iteration more than its centroids moved."""
        if len(shifts) < n_iter:
            why = "strict convergence"
        elif shifts[-1] <= self._tol:
            why = f"center shift {shifts[-1]:.6g} within tolerance {self._tol:.6g}"
        else:
            return
        self._tell(f"Converged at iteration {n_iter - 1}, restart {self._restarts[restart]}: {why}.")
