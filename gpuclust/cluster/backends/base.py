"""What a backend does for the Lloyd loop: one step at a time, into tensors that the loop owns.

Problem -> choice -> launch are three separate things: a `Problem` is plain data, `supports` answers with a reason, and
`assign` and `accumulate` compute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

from gpuclust.cluster.sums import Grid

if TYPE_CHECKING:
    from gpuclust.cluster.exact import Frame
    from gpuclust.cluster.step import Course, Limits

# Products are summed over at most so many features before these partial sums are added: the worst-case error of a
# float32 sum grows with its length, so the bound of `gpuclust.cluster.exact` stays narrow for any width.
SLICE = 1024
# Both ends of the score of a centroid that equals an earlier one, which wins every tie.
UNREACHED = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Problem:
    """A k-means problem as far as the choice of a backend depends on it."""

    n: int
    d: int
    k: int
    dtype: torch.dtype
    device: torch.device
    weights: bool = False
    restarts: int = 1
    ranks: int = 1


@dataclass(frozen=True)
class Operand:
    """The centroids of all restarts, prepared for a pass, in whatever way a backend reads them.

    With m the centre and s the scale of a pass, it sees a row x as x^ = (x - m) s, rounded in the type of the pass.

    Attributes
    ----------
    centroids : (r, k, d)
        As they are returned.
    shift : (d,) in the type of the pass, or None
        m s, where rows must be converted; None where they are used as they are stored.
    scale : float
        s, a power of two.
    """

    centroids: torch.Tensor
    shift: torch.Tensor | None
    scale: float


@dataclass(frozen=True)
class Bounded(Operand):
    """The centroids as a matrix, with the bound of their scores (`gpuclust.cluster.exact.Frame.operand`).

    The score of row i and centroid j, ``bias_j + x^_i . matrix_j``, is the squared distance less a term that is the
    same for all centroids; it is within ``a_i slope_j + margin_j`` of its exact value, where a_i bounds ||x_i - m||
    times the scale of the frame.

    Attributes
    ----------
    matrix : (r * k, d), dtype of the arithmetic
        -2 (c - m) s, rounded.
    high, low : float32 (r * k, 1)
        Bias plus and minus ``margin``.
    slope : float32 (r * k, 1)
    """

    matrix: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    slope: torch.Tensor

    @property
    def repeated(self) -> torch.Tensor:
        """Which centroids equal an earlier one of their restart, as far as was found, bool (r * k, 1): out of reach."""
        return self.high == UNREACHED

    def alone(self, restart: int) -> Bounded:
        """Of one restart."""
        k = self.centroids.shape[1]
        part = slice(restart * k, (restart + 1) * k)
        return Bounded(
            self.centroids[restart : restart + 1],
            self.shift,
            self.scale,
            *(of_all[part] for of_all in (self.matrix, self.high, self.low, self.slope)),
        )


class Candidates(NamedTuple):
    """The centroids that a pass could not tell apart: parallel int64 tensors (p,), sorted by row, then restart.

    For every (row, restart) whose label is not certain, all centroids that can be the nearest: all k of them where a
    score is not a number.
    """

    row: torch.Tensor
    restart: torch.Tensor
    centroid: torch.Tensor


class Rows(Protocol):
    """What is asked of rows before and after the passes; the same bits from every backend."""

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest absolute value of each column of rows (b, d), float64 (d,); NaN and infinity pass on."""
        ...

    def total(self, x: torch.Tensor, grid: Grid, sums: torch.Tensor) -> None:
        """Add rows (b, d) to ``sums`` float64 (levels, d), on ``grid``."""
        ...

    def dist2(self, x: torch.Tensor, centroids: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """Reference distance of rows (b, d) to centroids (k, d), to ``which`` (b,) each; without that, to one (d,).

        Returns
        -------
        float64 (b,)
        """
        ...


class Backend(Rows, Protocol):
    """One implementation of the steps; ``gpuclust.cluster.exact`` has what its labels must be, and how to be sure.

    Attributes
    ----------
    name : str
    waits : bool
        Whether the host waits for the device in `prepare`, `assign` or `accumulate`.
    """

    name: str
    waits: bool

    def unavailable(self) -> str | None:
        """None if this machine can run the backend, else the reason why not."""
        ...

    def supports(self, problem: Problem) -> str | None:
        """None if the backend can solve ``problem`` here, else the reason why not."""
        ...

    def reserved(self, problem: Problem) -> str | None:
        """None if ``auto`` may take the backend for ``problem``, else why it runs only when asked for by name."""
        ...

    def chunk_rows(self, r: int, k: int, d: int, device: torch.device) -> int:
        """Rows of a chunk for ``r`` active restarts; no result depends on it."""
        ...

    def prepare(self, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Operand:
        """The centroids (r, k, d) for passes over rows of ``dtype``, in the arithmetic that the backend computes in."""
        ...

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, precision: str
    ) -> torch.Tensor:
        """Label each row in each restart.

        Parameters
        ----------
        x : (b, d), as stored
        norms : float32 (b,)
            `Frame.norms` of the rows.
        operand : Operand
            What `prepare` made of the centroids.
        labels : int32 (r, b), out
        precision : {"exact", "fast"}
            "exact": the nearest by the reference distance, and the lowest index of a tie. "fast": the least score.

        Returns
        -------
        int64 ()
            How many labels the reference distance decided. On the device: nothing needs to wait for it.
        """
        ...

    def accumulate(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        grid: Grid,
        plus: torch.Tensor,
        minus: torch.Tensor | None,
        sums: torch.Tensor,
        counts: torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        """Add the rows ``x`` (b, d), times ``weights`` (b,) float64, to the sums of the clusters.

        Parameters
        ----------
        plus, minus : int32 (r, b)
            Cluster that gains and cluster that loses the row in each restart; where both are equal nothing happens.
        sums : float64 (levels, r, k, d), in and out
            On ``grid``, so that the result is free of the order.
        counts : float64 (r, k), in and out
            Numbers of rows, without weights.
        changed : int64 (r,), in and out, optional
            Numbers of rows that something happened to.
        """
        ...

    def advance(
        self,
        course: Course,
        changed: torch.Tensor,
        masses: torch.Tensor,
        sums: torch.Tensor,
        centroids: torch.Tensor,
        limits: Limits,
    ) -> torch.Tensor:
        """End the restarts that are done, and move the centroids of those that go on to the means of their rows.

        A restart ends where no label changed, or after its last pass; it stands still where a cluster is empty.

        Parameters
        ----------
        course : Course, in and out
        changed : int64 (r,)
            Labels that the pass changed in each restart.
        masses : float64 (r, k)
            Weight of each cluster.
        sums : float64 (levels, r, k, d)
        centroids : (r, k, d), in and out
            Means, rounded; a cluster without weight stays where it is.
        limits : Limits

        Returns
        -------
        float64 (r, 2)
            Whether a restart made a step, and the sum of the squared movements of its centroids.
        """
        ...


def current(device: torch.device) -> AbstractContextManager[object]:
    """For libraries that compute on the current device and stream: those of the rows."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@runtime_checkable
class WholeFit(Protocol):
    """A backend that runs a fit as a whole, outside of the one Lloyd loop and of what it promises."""

    name: str

    def fit(
        self, source: Any, k: int, **parameters: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int, tuple[str, ...]]:
        """Centroids, labels, dist2, inertia, iterations, and notes: what a reader of the report must know."""
        ...
