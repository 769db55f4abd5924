"""The one Lloyd loop: every restart at once, exact labels in every pass, sums that follow the rows that move.

In each pass all active restarts see a chunk of rows together, so that the rows are read once for all of them. A restart
ends when its labels repeat, or when its centroids hardly moved (one more pass then makes its labels belong to them).

Who ends is decided on the device. A restart that has ended stands still: a pass more leaves it, to the bit, as it is.
So the host may read what was decided a pass later, while the device already works on the next, and waits for nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import Backend, Rows
from gpuclust.cluster.distributed import Block, Group
from gpuclust.cluster.gaps import Gaps
from gpuclust.cluster.late import Late
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.relief import Relief
from gpuclust.cluster.sketch import Sketches
from gpuclust.cluster.sources.base import ChunkSource, block_rows, chunk_rows
from gpuclust.cluster.step import EMPTY, ENDED, MOVES, Course, Finish, Limits, advance, move
from gpuclust.cluster.story import Story
from gpuclust.cluster.sums import Grid, joined, power_of_two, total, tree_sum
from gpuclust.profile import named


@dataclass(frozen=True)
class Solution:
    """Where one restart ended.

    Attributes
    ----------
    centroids : (k, d)
    labels : int32 (n,)
        The nearest of these centroids.
    inertia : float
        From the sums, not from the rows: within rounding of T, the spread of the rows, times 2**-40.
    n_iter : int
    shifts : tuple of float
        Sum of the squared movements of the centroids, one per update.
    """

    centroids: torch.Tensor
    labels: torch.Tensor
    inertia: float
    n_iter: int
    shifts: tuple[float, ...]


@dataclass
class Work:
    """What the passes did: assignments in all, and how many of them the reference distance decided."""

    assigned: int = 0
    rechecked: int | torch.Tensor = 0  # on the device, where it is read once, at the end

    @property
    def recheck_share(self) -> float:
        return int(self.rechecked) / max(1, self.assigned)


class Weights:
    """Weights of the rows, float64 (n,), split so that their sums are exact, too; unit and grid are of all processes.

    Attributes
    ----------
    unit : float
        The power of two that brings the largest below 1.
    values : float64 (n,)
        The weights in that unit.
    lightest : float
        The least of them that is above 0.
    levels : int
        Of their grid.
    rounding : float
        What a weight can be off on it.
    """

    def __init__(self, weights: torch.Tensor, block: Block | None = None) -> None:
        block = block or Block.alone(weights.numel())
        self.unit = power_of_two(weights, block)
        self.values = values = weights / self.unit
        # What has weight and lost it in this unit counts as the lightest that there can be.
        above = torch.where(values > 0, values, math.inf).masked_fill((values == 0) & (weights > 0), math.ulp(0.0))
        self.lightest = -block.max(-above.amin()).item()
        grid = Grid.of(block.max(values.amax()).reshape(1), block.n, torch.float64, self.lightest)
        self._parts = [part[:, 0] for part in grid.split(values[:, None])]
        self.levels, self.rounding = grid.levels, grid.magic[-1].item() * (2.0**-53 / 1.5)

    def per_cluster(self, labels: torch.Tensor, k: int) -> torch.Tensor:
        """Sum of the weights in each cluster: float64 (levels, r, k) of labels (r, n)."""
        sums = self.values.new_zeros(len(self._parts), len(labels), k)
        for level, part in zip(sums, self._parts, strict=True):
            for row, label in zip(level, labels, strict=True):
                row.index_add_(0, label, part)
        return sums


@dataclass
class _Front:
    """The restarts on their way, r of them.

    Attributes
    ----------
    restarts : list of int
        Their numbers.
    centroids : (r, k, d)
    labels : int32 (r, n)
    sums : float64 (levels, r, k, d)
        Of the rows of this process with these labels; so are ``counts``, float64 (r, k).
    course : Course
    """

    restarts: list[int]
    centroids: torch.Tensor
    labels: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    course: Course

    @classmethod
    def of(cls, centroids: torch.Tensor, n: int, levels: int) -> _Front:
        (r, k, d), device = centroids.shape, centroids.device
        return cls(
            list(range(r)),
            centroids,
            torch.full((r, n), -1, dtype=torch.int32, device=device),
            torch.zeros(levels, r, k, d, dtype=torch.float64, device=device),
            torch.zeros(r, k, dtype=torch.float64, device=device),
            Course(
                torch.full((r,), MOVES, device=device),
                torch.zeros(r, dtype=torch.int64, device=device),
                torch.zeros(r, dtype=torch.bool, device=device),
            ),
        )

    def keep(self, places: list[int]) -> _Front:
        """Some of them; all at no cost."""
        if len(places) == len(self.restarts):
            return self
        index = torch.tensor(places, dtype=torch.int64, device=self.labels.device)
        return _Front(
            [self.restarts[place] for place in places],
            self.centroids[index],
            self.labels[index],
            self.sums[:, index],
            self.counts[index],
            Course(*(one[index] for one in self.course)),
        )


class Lloyd:
    """Restarts on their way; `run` brings all of them to their end.

    Parameters
    ----------
    backend, source, moments, group
        Who computes, on which rows, what is known of them, and the processes that share them.
    weights : Weights or None
    chunk_rows : Callable[[int], int]
        Rows of a chunk for a number of active restarts. The result does not depend on it.
    spare_bytes : int
        For what may be kept to save time. The result does not depend on it.
    max_iter : int
    tol : float
        Movement of the centroids (as in ``Solution.shifts``) at which a restart ends.
    precision : {"exact", "fast"}
    relief : Relief, optional
        Where memory runs out in a pass, it makes the pass again.
    finish : Callable, optional
        Makes centroids of the means of clusters, as in `gpuclust.cluster.step.move`.

    Attributes
    ----------
    late : int
        How many passes are asked for before what became of the first is read. The result does not depend on it.
    """

    def __init__(
        self,
        backend: Backend,
        source: ChunkSource,
        moments: Moments,
        group: Group,
        weights: Weights | None,
        chunk_rows: Callable[[int], int],
        spare_bytes: int,
        *,
        max_iter: int,
        tol: float,
        precision: str,
        relief: Relief | None = None,
        finish: Finish | None = None,
    ) -> None:
        self.finish = finish
        self.relief = relief or Relief(source.device)
        self.backend, self.source, self.moments, self.group = backend, source, moments, group
        self.weights, self.chunk_rows = weights, chunk_rows
        self.limits, self.precision = Limits(max_iter, tol), precision
        self.norms = moments.frame.norms(moments.dist2)
        # T of `inertia`; here, since all processes add it up together.
        self.spread = moments.spread if weights is None else total(moments.dist2, weights.values, moments.block)
        self.work = Work()
        known = backend, source, moments, self.norms, spare_bytes
        sketches = Sketches(*known)
        # What labels most rows without reading them.
        self.shortcut = sketches if sketches.possible else Gaps(*known)
        # Where a pass waits for the device anyway, or reads a file, one that was not needed costs more than it gains.
        self.late = int(not backend.waits and source.resident)

    def run(self, centroids: torch.Tensor, story: Story | None = None) -> list[Solution]:
        """Iterate from ``centroids`` (r, k, d), which are overwritten, to a solution per restart.

        A ``story`` hears of each iteration, which waits for the device and takes an inertia from the sums.
        """
        front = _Front.of(centroids, self.source.shape[0], self.moments.grid.levels)
        solutions: dict[int, Solution] = {}
        shifts: list[list[float]] = [[] for _ in front.restarts]
        reports: deque[Late] = deque()
        self.shortcut.restart()
        first = True
        while front.restarts:
            reports.append(self._iterate(front, first, story))
            first = False
            if len(reports) <= self.late or self._read(reports, front, shifts):
                continue
            while reports:  # in these passes the restarts that stand still did
                self._read(reports, front, shifts)
            front = self._attend(front, solutions, shifts, story)
        return [solutions[restart] for restart in range(len(shifts))]

    @named("iteration")
    def _iterate(self, front: _Front, first: bool, story: Story | None = None) -> Late:
        """A pass, and the steps of the restarts that it does not end; only a story makes the host wait for the device.

        Returns
        -------
        (r, 2) : whether a restart made a step, and how far its centroids moved.
        """
        changed = self.group.all_reduce(self._relieved(front, first))
        masses = self.masses(front.labels, front.counts, front.counts.shape[1])
        sums = self.group.all_reduce(front.sums)
        if story:
            for i in ((front.course.does == MOVES) & ~front.course.closing).nonzero()[:, 0].tolist():
                inertia = self.inertia(front.centroids[i], sums[:, i], masses[i])
                story.iteration(front.restarts[i], int(front.course.passes[i]), inertia)
        given = front.course, changed, masses, sums, front.centroids, self.limits
        return Late(advance(*given, self.finish) if self.finish else self.backend.advance(*given))

    @staticmethod
    def _read(reports: deque[Late], front: _Front, shifts: list[list[float]]) -> bool:
        """Read the oldest report: whether every restart made a step."""
        report = reports.popleft().read()
        for restart, (stepped, shift) in zip(front.restarts, report, strict=True):
            if stepped:
                shifts[restart].append(shift)
        return all(stepped for stepped, _ in report)

    def _attend(
        self, front: _Front, solutions: dict[int, Solution], shifts: list[list[float]], story: Story | None = None
    ) -> _Front:
        """See to the restarts that stand still: those that have ended leave, empty clusters get a row."""
        masses = self.masses(front.labels, front.counts, front.counts.shape[1])
        sums = self.group.all_reduce(front.sums)
        moving = []
        for i, (does, passes, closing) in enumerate(torch.stack([one.long() for one in front.course], 1).tolist()):
            restart, centroids, labels = front.restarts[i], front.centroids[i], front.labels[i]
            if does == ENDED:
                solutions[restart] = Solution(
                    centroids.clone(),
                    labels.clone(),
                    self.inertia(centroids, sums[:, i], masses[i]),
                    passes - closing,
                    tuple(shifts[restart]),
                )
                if story:
                    story.end(restart, passes - closing, shifts[restart])
                continue
            moving.append(i)
            if does == EMPTY:
                shift = self.update(centroids, labels, sums[:, i], masses[i])
                shifts[restart].append(shift)
                front.course.closing[i] = shift <= self.limits.tol or passes >= self.limits.max_iter
                front.course.does[i] = MOVES
        self.shortcut.keep(moving)
        return front.keep(moving)

    def _relieved(self, front: _Front, first: bool) -> torch.Tensor:
        """A pass that is made again where memory runs out. The labels are then still those from before; the sums are
        made anew from all rows, which gives the same bits as following the rows that moved."""
        assigned, rechecked = self.work.assigned, self.work.rechecked

        def undo() -> None:
            nonlocal first
            self.work = Work(assigned, rechecked)
            self.shortcut.restart()  # its first passes read all rows
            first = True
            front.sums.zero_()
            front.counts.zero_()

        return self.relief.run(lambda: self._pass(front, first), undo)

    def _pass(self, front: _Front, first: bool) -> torch.Tensor:
        """Label all rows and bring the sums up to date: how many labels of each restart changed, int64 (r,)."""
        operand = self.backend.prepare(self.moments.frame, front.centroids, self.source.dtype)
        labels, new = front.labels, torch.empty_like(front.labels)
        self.work.assigned += labels.numel()
        changed = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        short = self.shortcut.assign(operand, new, self.precision)
        rechecked = self.work.rechecked if short is None else self.work.rechecked + short
        for start, x in self.source.chunks(self.chunk_rows(len(labels))):
            part = slice(start, start + x.shape[0])
            old, found = labels[:, part], new[:, part]
            if short is None:
                rechecked = rechecked + self.backend.assign(x, self.norms[part], operand, found, self.precision)
            self.account(x, part, found, None if first else old, front.sums, front.counts, changed)
        front.labels, self.work.rechecked = new, rechecked
        return (new != labels).sum(1) if first else changed

    def account(
        self,
        x: torch.Tensor,
        which: slice | torch.Tensor,
        new: torch.Tensor,
        old: torch.Tensor | None,
        sums: torch.Tensor,
        counts: torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        """Bring the sums up to date with labels (r, b) of the rows ``x``; ``which`` of all rows they are."""
        weights = None if self.weights is None else self.weights.values[which]
        self.backend.accumulate(x, weights, self.moments.grid, new, old, sums, counts, changed)

    def masses(self, labels: torch.Tensor, counts: torch.Tensor, k: int) -> torch.Tensor:
        """Weight of each cluster, over all processes, float64 (r, k)."""
        if self.weights is None:
            return self.group.all_reduce(counts)
        return joined(self.group.all_reduce(self.weights.per_cluster(labels, k)))

    def update(self, centroids: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor, mass: torch.Tensor) -> float:
        """Move the centroids (k, d) of one restart to the means of their rows: the sum of the squared movements.

        An empty cluster gets a row first.
        """
        if bool((mass == 0).any()):
            sums = sums.clone()
        return self.update_parts(centroids, labels, [(slice(0, len(mass)), sums)], mass)

    def update_parts(
        self,
        centroids: torch.Tensor,
        labels: torch.Tensor,
        parts: Iterable[tuple[slice, torch.Tensor]],
        mass: torch.Tensor,
    ) -> float:
        """`update` with the sums of some clusters at a time: which they are, and their sums, which are overwritten."""
        dist2, shifts = None, torch.empty_like(mass)
        if bool((mass == 0).any()):
            dist2 = self.relief.run(lambda: distances(self.backend, self.source, centroids, labels))
            if self.weights is not None:
                dist2[self.weights.values == 0] = 0
        every = torch.ones_like(mass, dtype=torch.bool)
        for part, sums in parts:
            after = mass if dist2 is None else self._fill_empty(dist2, labels, mass, part, sums)
            # Each cluster as a restart of its own: of how far it moved.
            one = centroids[part, None], sums[:, :, None], after[part, None], every[part]
            shifts[part] = move(*one, self.finish)
        return tree_sum(shifts).item()

    def _fill_empty(
        self, dist2: torch.Tensor, labels: torch.Tensor, mass: torch.Tensor, part: slice, sums: torch.Tensor
    ) -> torch.Tensor:
        """Give each empty cluster the row farthest from its centroid (ties: lowest index), as in scikit-learn.

        The weights afterwards (k,) are returned, and ``sums`` of some clusters brought up to date.
        """
        empty, after = (mass == 0).nonzero()[:, 0].tolist(), mass.clone()
        far = self._farthest(dist2, labels, len(empty))
        for cluster, (distance, old, weight, terms) in zip(empty, far, strict=False):
            if distance == 0:
                break
            if part.start <= old < part.stop:
                sums[:, old - part.start] -= terms
            if part.start <= cluster < part.stop:
                sums[:, cluster - part.start] = terms
            after[old] -= weight
            after[cluster] = weight
        return after

    def _farthest(
        self, dist2: torch.Tensor, labels: torch.Tensor, count: int
    ) -> Iterator[tuple[float, int, float, torch.Tensor]]:
        """The farthest rows of all processes, farthest first: distance, cluster, weight, terms (levels, d)."""
        order = dist2.sort(descending=True, stable=True).indices[:count]
        weights = None if self.weights is None else self.weights.values
        if self.group.size == 1:  # one after the other: terms take more than rows
            for i, x in zip(order.tolist(), self.source.take(order), strict=True):
                weight = 1.0 if weights is None else weights[i].item()
                terms = self.moments.grid.split(x.double()[None] * weight)
                yield dist2[i].item(), int(labels[i]), weight, torch.cat(terms)
            return
        levels, d = self.moments.grid.levels, self.source.shape[1]
        rows = dist2.new_zeros(self.group.size, count, 3 + levels * d)
        mine = rows[self.group.rank, : order.numel()]
        values = self.source.take(order).double()
        mine[:, 0], mine[:, 1], mine[:, 2] = dist2[order], labels[order].double(), 1.0
        if weights is not None:
            mine[:, 2] = weights[order]
            values *= mine[:, 2:3]
        mine[:, 3:] = torch.stack(self.moments.grid.split(values), 1).flatten(1)
        rows = self.group.all_reduce(rows).flatten(0, 1)
        for row in rows[rows[:, 0].sort(descending=True, stable=True).indices[:count]]:
            yield row[0].item(), int(row[1]), row[2].item(), row[3:].view(levels, d)

    def inertia(self, centroids: torch.Tensor, sums: torch.Tensor, mass: torch.Tensor) -> float:
        """T - 2 sum_j (c_j - m) . (S_j - n_j m) + sum_j n_j ||c_j - m||^2, free of any order."""
        return self.spread + tree_sum(self.crosses(centroids, sums, mass)).item()

    def crosses(self, centroids: torch.Tensor, sums: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """What clusters add to `inertia`, each by itself: float64 (k,)."""
        cross = torch.empty(len(centroids), dtype=torch.float64, device=centroids.device)
        size = block_rows(centroids.shape[1], centroids.device)
        for start in range(0, len(centroids), size):
            part = slice(start, start + size)
            moved = centroids[part].double() - self.moments.mean
            terms = (joined(sums[:, part]) - mass[part, None] * self.moments.mean).mul_(moved)
            cross[part] = tree_sum(terms.mul_(-2.0).add_(moved.square_().mul_(mass[part, None])))
        return cross

    def doubt(self, centroids: torch.Tensor, inertia: float) -> float:
        """How far `inertia` can be from the ``inertia`` that the rows' distances sum up to, for any labels.

        Sums lose half a last step of their grid for each row and the rounding of terms of the rows' size, times the way
        from the centroids (k, d) to the mean; the rest is what weights lose and the rounding of distances.
        """
        frame, n = self.moments.frame, self.moments.block.n
        if frame.vanishing:
            return math.inf
        parts = centroids.split(block_rows(centroids.shape[1], centroids.device))
        lengths = [torch.linalg.vector_norm(part.double() - self.moments.mean, dim=1) for part in parts]
        away = torch.cat(lengths).amax().item()
        half = torch.linalg.vector_norm(self.moments.grid.magic[-1] * (2.0**-53 / 1.5)).item()
        far = math.sqrt(frame.far2)
        row = 2 * away * (half + 2.0**-48 * (frame.offset + far))
        row += (2.0**-48 + 4.0 ** (math.ceil(math.log2(n + 1)) - 51)) * (away + far) * (away + far)
        if self.weights is not None:
            row += self.weights.rounding * away * (away + 2 * frame.offset)
        return n * row + 2.0**-44 * (self.spread + abs(inertia))


def numbered(labels: torch.Tensor, k: int, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (n,) with the clusters numbered in the order of their first rows, and the old numbers (k,) in that order.

    Two solutions are one, but for the order of the clusters, where these labels are the same.
    """
    rows = torch.arange(len(labels), device=labels.device) + block.first
    first = rows.new_full((k,), block.n).scatter_reduce_(0, labels.long(), rows, "amin")
    order = (-block.max(-first)).argsort(stable=True)
    return order.argsort()[labels.long()], order


def distances(backend: Rows, source: ChunkSource, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reference distance of every row to its centroid, float64 (n,)."""
    dist2 = torch.empty(source.shape[0], dtype=torch.float64, device=source.device)
    for start, x in source.chunks(chunk_rows(1, source.shape[1], source.device)):
        part = slice(start, start + x.shape[0])
        dist2[part] = backend.dist2(x, centroids, labels[part])
    return dist2
