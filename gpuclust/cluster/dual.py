"""The dual solver: Lloyd's iterations in the space of the n x n Gram matrix, for rows much wider than they are many.

After one product of all rows with each other (`gpuclust.cluster.gram`) a pass costs O(r k n^2) at most, whatever d is.
It ends with the bits of the primal solver (`gpuclust.cluster.lloyd`), whose steps it takes one by one:

**Labels.** Row j and centroid c have the score ``square_c - 2 inner_cj / mass_c``, the squared distance less a term of
the row, within ``e = slope_c ||x~_j|| + margin_c`` (`gpuclust.cluster.centres`). The true centroid c' lies within
delta_c of that mean, so its squared distance differs by at most ``2 ||x~_j - c~|| delta_c + delta_c^2``; and the
reference distance of both is within (log2 d + 4) 2**-53 of exact, relatively (`gpuclust.cluster.exact`), or off by
what squares lose below the normal range, less than d 2**-110 with the largest value near 1. Every centroid whose score
less this bound is not above the least of score plus bound stays a candidate. Where one is left it is certain; what is
not is decided by the reference distance to the true centroids, which are then made, for these clusters alone, by the
primal's own sums of their rows, and kept as long as no row moves.

**Ends.** Restarts end when labels repeat, which needs no centroid, or by ``tol``: the movement of the true centroids is
within delta of both ends of that of the means; where this interval holds ``tol``, true centroids decide. An empty
cluster gets its row by the primal's rule from true centroids. In the end true centroids are made for every restart
that can be the best by its inertia and the bound of that, once for each partition; the primal's rule picks among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gpuclust.cluster.backends.base import Candidates
from gpuclust.cluster.centres import Centres, Rounding, per_cluster
from gpuclust.cluster.exact import decide, repeated_in
from gpuclust.cluster.gram import Gram, U, gamma
from gpuclust.cluster.lloyd import Lloyd, Solution, numbered
from gpuclust.cluster.moments import centroid_dtype
from gpuclust.cluster.sources.base import take_rows, tile_rows
from gpuclust.cluster.sources.checksum import require_unchanged
from gpuclust.cluster.story import Story
from gpuclust.cluster.sums import joined

# Values of the scores that are worked on at a time.
_PIECE_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Inertias by the primal's rule differ by less than this share of the spread from exact, and so may those it keeps.
_ALIKE = 2.0**-34


@dataclass(frozen=True)
class Ending:
    """Where a restart ended: like `Solution`, without true centroids; ``inertia`` is within ``bound``."""

    labels: torch.Tensor
    inertia: float
    bound: float
    n_iter: int
    shifts: tuple[float, ...]
    mass: torch.Tensor
    centres: Centres


class Dual:
    """Restarts on their way, as the Gram matrix sees them.

    Parameters
    ----------
    lloyd : Lloyd
        The primal solver, whose rows, weights, tolerance and rules these are; its `Work` counts labels of this one.
    """

    def __init__(self, lloyd: Lloyd) -> None:
        self.lloyd, self.source, self.moments, self.weights = lloyd, lloyd.source, lloyd.moments, lloyd.weights
        self.gram = Gram(lloyd.source, lloyd.moments)
        self.rounding = Rounding(lloyd.moments, lloyd.weights, lloyd.source.dtype)
        self.dtype = centroid_dtype(lloyd.source.dtype)
        self.certain = not lloyd.moments.frame.vanishing or lloyd.source.dtype != torch.float64

    def run(
        self, starts: Sequence[list[int] | torch.Tensor], story: Story | None = None
    ) -> tuple[list[Ending], list[Solution]]:
        """Iterate from rows (k numbers) or centroids (k, d) of each restart: where all ended, and what may win."""
        r, n, device = len(starts), self.source.shape[0], self.source.device
        centres = Centres.empty(r, len(starts[0]), n, device)
        for i, start in enumerate(starts):
            self._begin(centres, i, start)
        labels = torch.full((r, n), -1, dtype=torch.int32, device=device)
        endings: dict[int, Ending] = {}
        active, closing = list(range(r)), [False] * r
        shifts: list[list[float]] = [[] for _ in range(r)]
        passes = 0
        while active:
            new = self._label(centres)
            changed = (new != labels).sum(1).tolist()
            labels = new
            passes += 1
            counts = per_cluster(torch.ones_like(self.gram.norms).expand(labels.shape), labels, centres.mass.shape[1])
            masses = self.lloyd.masses(labels, counts, counts.shape[1])
            if story:
                for i in [i for i in range(len(active)) if not closing[i]]:
                    story.iteration(active[i], passes - 1, self._inertia(centres.keep([i]), labels[i])[0])
            staying = [i for i in range(len(active)) if not closing[i] and changed[i]]
            for i in sorted(set(range(len(active))) - set(staying)):
                ended = passes - closing[i], tuple(shifts[active[i]])
                endings[active[i]] = self._end(centres.keep([i]), labels[i], masses[i], *ended)
                if story:
                    story.end(active[i], *ended)
            if not staying:
                break
            if len(staying) < len(active):
                centres = centres.keep(staying)
                labels, masses, counts = labels[staying], masses[staying], counts[staying]
                active = [active[i] for i in staying]
            last = passes >= self.lloyd.limits.max_iter
            moved = self._update(centres, labels, masses, counts, last)
            for restart, (shift, _) in zip(active, moved, strict=True):
                shifts[restart].append(shift)
            closing = [last or close for _, close in moved]
        ordered = [endings[restart] for restart in range(r)]
        return ordered, self._solutions(ordered)

    def _begin(self, centres: Centres, i: int, start: list[int] | torch.Tensor) -> None:
        """Restart ``i`` begins with rows, whose products are known, or with given centroids (k, d)."""
        if isinstance(start, torch.Tensor):
            self._place(centres, i, start)
            return
        rows = torch.tensor(start, device=self.source.device)
        centroids = take_rows(self.source, self.moments.block, rows).to(self.dtype)
        centres.place(i, self.gram.values[rows], self.gram.dist2[rows], self.gram.error + 2.0**-46)
        self._know(centres, i, centroids, self.moments.dist2[rows])

    def _place(self, centres: Centres, i: int, centroids: torch.Tensor) -> None:
        inner, square = self.gram.products(centroids)
        centres.place(i, inner, square, self.gram.error)
        self._know(centres, i, centroids, square)

    def _know(self, centres: Centres, i: int, centroids: torch.Tensor, square: torch.Tensor) -> None:
        centres.known[i] = dict(enumerate(centroids))
        centres.repeated[i] = repeated_in(centroids[None], square)

    # ---- labels

    def _label(self, centres: Centres) -> torch.Tensor:
        """The nearest true centroid of every row in every restart: int32 (r, n)."""
        r, k, n = centres.inner.shape
        labels = torch.empty(r, n, dtype=torch.int32, device=centres.inner.device)
        self.lloyd.work.assigned += labels.numel()
        size = max(1, _PIECE_VALUES.get(labels.device.type, 1 << 20) // (k * n))
        for start in range(0, r, size):
            part = slice(start, min(r, start + size))
            scores, bound = self._scores(centres, part)
            if self.lloyd.precision == "fast":
                labels[part] = scores.argmin(1).int()
                continue
            least = (scores + bound).amin(1, keepdim=True)
            # Not "<=": what is not a number stays a candidate.
            possible = (scores - bound > least).logical_not_()
            index = torch.arange(k, dtype=torch.int32, device=labels.device)[:, None]
            labels[part] = (possible * index).sum(1)
            unsure = (possible.sum(1) != 1).cpu()
            for i in unsure.any(1).nonzero()[:, 0].tolist():
                rows = unsure[i].nonzero()[:, 0].to(labels.device)
                self._decide(centres, start + i, rows, possible[i][:, rows], labels)
        return labels

    def _scores(self, centres: Centres, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of some restarts, and how far they can be from telling the reference distances: (p, k, n) each."""
        square, slope, margin, delta = (
            getattr(centres, name)[part][..., None] for name in ("square", "slope", "margin", "delta")
        )
        scores = torch.addcmul(square, centres.inner[part], -2.0 / centres.mass[part][..., None])
        scores.masked_fill_(centres.repeated[part][..., None], math.inf)
        if not self.certain:
            return scores, torch.full_like(scores, math.inf)
        d = self.source.shape[1]
        bound = torch.addcmul(margin + d * 2.0**-110, slope, self.gram.norms)
        far2 = (scores + self.gram.dist2).clamp_(min=0).add_(bound).add_(self.gram.dist2, alpha=2.0**-38)
        reference = (math.log2(d) + 4) * U
        bound += far2.mul(4 * reference)
        bound += far2.sqrt_().mul_(2 * delta * (1 + 2.0**-20))
        bound += delta.square() * 2
        return scores, bound.masked_fill_(centres.repeated[part][..., None], 0)

    def _decide(
        self, centres: Centres, i: int, rows: torch.Tensor, possible: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Label rows (p,) of restart ``i`` by the reference distance to their ``possible`` (k, p) true centroids."""
        clusters = possible.any(1).nonzero()[:, 0]
        centroids = self._true(centres, i, clusters.tolist())
        possible = possible[clusters].t()
        size = tile_rows(self.source.shape[1], labels.device)
        for some, mine in zip(rows.split(size), possible.split(size), strict=True):
            row, centroid = mine.nonzero(as_tuple=True)
            found = labels.new_empty(1, len(some))
            candidates = Candidates(row, torch.zeros_like(row), centroid)
            decide(self.source.take(some), centroids[None], candidates, found)
            labels[i, some] = clusters[found[0].long()].int()
        self.lloyd.work.rechecked += len(rows)

    # ---- true centroids

    def _true(self, centres: Centres, i: int, clusters: list[int]) -> torch.Tensor:
        """The centroids of some clusters of restart ``i`` as the primal solver has them: (p, d)."""
        known = centres.known[i]
        missing = [cluster for cluster in clusters if cluster not in known]
        if missing:
            sums = self._sums(centres.home[i], missing, centres.mass.shape[1])
            mass = centres.mass[i, missing]
            known.update(zip(missing, (joined(sums) / mass[:, None]).to(self.dtype), strict=True))
        return torch.stack([known[cluster] for cluster in clusters])

    def _sums(self, labels: torch.Tensor, clusters: list[int], k: int) -> torch.Tensor:
        """The primal's sums of the rows of some clusters, by labels (n,): float64 (levels, p, d)."""
        d, device = self.source.shape[1], labels.device
        place = torch.full((k,), -1, dtype=torch.int32, device=device)
        place[clusters] = torch.arange(len(clusters), dtype=torch.int32, device=device)
        places = place[labels.long()]
        sums = torch.zeros(self.moments.grid.levels, 1, len(clusters), d, dtype=torch.float64, device=device)
        counts = torch.zeros(1, len(clusters), dtype=torch.float64, device=device)
        for rows, x in self._rows((places >= 0).nonzero()[:, 0]):
            self.lloyd.account(x, rows, places[None, rows], None, sums, counts)
        return sums[:, 0]

    def _rows(self, rows: torch.Tensor) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor]]:
        """The rows with these numbers, a few at a time; nothing is copied where they are all."""
        (n, d), device = self.source.shape, rows.device
        if len(rows) == n:
            for start, x in self.source.chunks(n):
                yield slice(start, start + len(x)), x
            return
        for some in rows.split(4 * tile_rows(d, device)):
            yield some, self.source.take(some)

    # ---- moving

    def _update(
        self, centres: Centres, labels: torch.Tensor, masses: torch.Tensor, counts: torch.Tensor, last: bool
    ) -> list[tuple[float, bool]]:
        """Centroids become the means of their rows: for each restart how far they moved, and whether less than tol."""
        (r, k), tol = masses.shape, self.lloyd.limits.tol
        every, scale = list(range(k)), self.gram.scale
        empty = (masses == 0).any(1).tolist()
        # By the primal's own rule, on true centroids.
        filled = {i: self._step(centres, i, labels[i], masses[i]) for i in range(r) if empty[i]}
        inner = centres.inner.gather(1, labels.long()[:, None])[:, 0]
        if self.weights is not None:
            inner = inner * self.weights.values
        masses = masses.masked_fill(masses == 0, 1.0)
        cross = per_cluster(inner, labels, k) / (masses * centres.mass)
        old = Centres(**{**vars(centres), "inner": centres.inner[:0], "home": centres.home.clone()})
        old.error, old.known = centres.error.clone(), [dict(known) for known in centres.known]
        old.slope, old.margin = centres.slope.clone(), centres.margin.clone()
        centres.move(self.gram, self.rounding, labels, masses, counts)

        touched = self._touched(old.home, labels, k)
        wrong = (old.error / old.mass + gamma(labels.shape[1] + 8) * old.reach) * centres.reach * 2
        wrong += old.margin + centres.margin + 8 * U * (old.reach + centres.reach).square()
        way2 = old.square - 2 * cross + centres.square
        loose = old.delta + centres.delta
        high = ((way2 + wrong).clamp_(min=0).sqrt_() + loose).mul_(touched).div_(scale)
        low = ((way2 - wrong).clamp_(min=0).sqrt_() - loose).clamp_(min=0).mul_(touched).div_(scale)
        shift = (way2.clamp_(min=0).sqrt_().mul_(touched) / scale).square_().sum(1).tolist()
        above = (low.square_().sum(1) * (1 - 2.0**-20) > tol).tolist()
        below = (high.square_().sum(1) * (1 + 2.0**-20) <= tol).tolist()
        moved = []
        for i in range(r):
            if not empty[i]:
                stays = {} if old.home[i, 0] < 0 else old.known[i]
                centres.known[i] = {c: known for c, known in stays.items() if not touched[i, c]}
            if not empty[i] and (last or (self.certain and (above[i] or below[i]))):
                moved.append((shift[i], below[i]))
                continue
            exact, centroids = filled[i] if empty[i] else self._step(old, i, labels[i], masses[i])
            if empty[i]:
                self._place(centres, i, centroids)
            else:
                centres.known[i] = dict(zip(every, centroids, strict=True))
            moved.append((exact, exact <= tol))
        return moved

    def _step(self, centres: Centres, i: int, labels: torch.Tensor, mass: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The primal's update of restart ``i``: how far its true centroids move, and where to (k, d)."""
        every = list(range(len(mass)))
        centroids = self._true(centres, i, every)
        return self.lloyd.update(centroids, labels, self._sums(labels, every, len(every)), mass), centroids

    @staticmethod
    def _touched(old: torch.Tensor, new: torch.Tensor, k: int) -> torch.Tensor:
        """Which clusters lost or gained a row between the labels (r, n): bool (r, k); all that were given."""
        change = (old != new).int()
        touched = torch.zeros(len(new), k + 1, dtype=torch.int32, device=new.device)
        touched.scatter_add_(1, new.long(), change).scatter_add_(1, torch.where(old < 0, k, old).long(), change)
        return touched[:, :k] > 0

    # ---- the end

    def _end(
        self, centres: Centres, labels: torch.Tensor, mass: torch.Tensor, n_iter: int, shifts: tuple[float, ...]
    ) -> Ending:
        inertia, off = self._inertia(centres, labels)
        # The products with the rows are not needed any more, and large.
        centres.inner = centres.inner[:, :, :0].clone()
        return Ending(labels.clone(), inertia, off if self.certain else math.inf, n_iter, shifts, mass, centres)

    def _inertia(self, centres: Centres, labels: torch.Tensor) -> tuple[float, float]:
        """The inertia of one restart's labels (n,), and how far it can be from that of the true centroids."""
        index = labels.long()[None]
        score, bound = (one[0].gather(0, index)[0] for one in self._scores(centres, slice(0, 1)))
        dist2 = score + self.gram.dist2
        bound = bound + (dist2.abs() + self.gram.dist2) * (2.0**-38 + gamma(len(labels)))
        if self.weights is not None:
            dist2, bound = dist2 * self.weights.values, bound * self.weights.values
        inertia, off = (one.sum().item() / self.gram.scale / self.gram.scale for one in (dist2, bound))
        return inertia, off

    def _solutions(self, endings: list[Ending]) -> list[Solution]:
        """Those that can be the best, with true centroids; of those with the same partition the first."""
        least = min(one.inertia + one.bound for one in endings) + _ALIKE * self.moments.spread
        solutions, seen = [], list[torch.Tensor]()
        for one in endings:
            if one.inertia - one.bound > least:
                continue
            repeats = torch.equal(one.centres.home[0], one.labels)
            partition, _ = numbered(one.labels, len(one.mass), self.moments.block)
            if repeats and any(torch.equal(partition, other) for other in seen):
                continue
            if repeats:
                seen.append(partition)
            every = list(range(len(one.mass)))
            sums = self._sums(one.labels, every, len(every))
            if repeats:
                centroids = (joined(sums) / one.centres.mass[0][:, None]).to(self.dtype)
            else:
                centroids = self._true(one.centres, 0, every)
            inertia = self.lloyd.inertia(centroids, sums, one.mass)
            # The matrix is of the rows as they were, the sums of what they are now.
            require_unchanged(abs(inertia - one.inertia) <= one.bound + self.lloyd.doubt(centroids, inertia))
            solutions.append(Solution(centroids, one.labels, inertia, one.n_iter, one.shifts))
        return solutions
