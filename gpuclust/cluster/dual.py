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
primal's own sums of their rows, and kept as long as no row moves and memory allows. The rows that restarts begin with
are their first true centroids; they are read where they decide something.

**Ends.** Restarts end when labels repeat, which needs no centroid, or by ``tol``: the movement of the true centroids is
within delta of both ends of that of the means; where this interval holds ``tol``, true centroids decide. An empty
cluster gets its row by the primal's rule from true centroids. In the end true centroids are made for every restart
that can be the best by its inertia and the bound of that, once for each partition; the primal's rule picks among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch

from gpuclust.cluster.backends.base import Candidates
from gpuclust.cluster.centres import Centres, Rounding, per_cluster
from gpuclust.cluster.distributed import Block
from gpuclust.cluster.exact import decide, repeated_in
from gpuclust.cluster.gram import Gram, U, gamma
from gpuclust.cluster.lloyd import Lloyd, Solution, numbered
from gpuclust.cluster.means import Means, grouped
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.seeding.image import KnownImage, Pixels
from gpuclust.cluster.sources.checksum import require_unchanged
from gpuclust.cluster.story import Story
from gpuclust.cluster.sums import tree_sum

# Values of the scores that are worked on at a time.
_PIECE_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Pairs of a row and a centroid that are decided together.
_PAIRS = 1 << 17
# Inertias by the primal's rule differ by less than this share of the spread from exact, and so may those it keeps.
_ALIKE = 2.0**-34


@dataclass(frozen=True)
class Ending:
    """Where a restart ended: like `Solution`, without true centroids; ``inertia`` is within ``bound``.

    ``mass`` (k,) is of the labels, ``home`` (n,) and ``home_mass`` (k,) of the clusters whose means the centroids are;
    ``given`` (k, d) are the true centroids where an empty cluster got a row in the last iteration.
    """

    labels: torch.Tensor
    inertia: float
    bound: float
    n_iter: int
    shifts: tuple[float, ...]
    mass: torch.Tensor
    home: torch.Tensor
    home_mass: torch.Tensor
    given: torch.Tensor | None


class Dual:
    """Restarts on their way, as the Gram matrix sees them.

    Parameters
    ----------
    lloyd : Lloyd
        The primal solver, whose rows, weights, tolerance and rules these are; its `Work` counts labels of this one.
    spare_bytes : int
        For true centroids and rows beside those of one restart, which saves passes over streamed rows.
    slice_bytes : int
        For features of all rows that are read in one pass, where the rows are streamed.
    summed : int, optional
        Clusters whose sums there is room for at a time; by default those of a restart.
    image : bool
        Whether the products of the image, by which seeding draws, are found in these passes: `take_image`.
    """

    def __init__(
        self,
        lloyd: Lloyd,
        spare_bytes: int = 0,
        slice_bytes: int = 0,
        summed: int | None = None,
        *,
        image: bool = False,
    ) -> None:
        self.lloyd, self.source, self.moments, self.weights = lloyd, lloyd.source, lloyd.moments, lloyd.weights
        pixels = Pixels(lloyd.source, lloyd.moments) if image else None
        self.gram = Gram(lloyd.source, lloyd.moments, slice_bytes, pixels)
        self.rounding = Rounding(lloyd.moments, lloyd.weights, lloyd.source.dtype)
        self.means = Means(lloyd, spare_bytes, summed)
        self.certain = not lloyd.moments.frame.vanishing or lloyd.source.dtype != torch.float64

    def take_image(self) -> KnownImage | None:
        """The image of the rows, where its products were found; it is not kept here."""
        products, self.gram.image = self.gram.image, None
        return None if products is None else KnownImage(products)

    def run(self, starts: Sequence[list[int] | torch.Tensor], story: Story | None = None) -> list[Ending]:
        """Iterate from rows (k numbers) or centroids (k, d) of each restart: where all ended."""
        r, n, device = len(starts), self.source.shape[0], self.source.device
        centres = Centres.empty(r, len(starts[0]), n, device)
        self._begin(centres, starts)
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
        return [endings[restart] for restart in range(r)]

    def _begin(self, centres: Centres, starts: Sequence[list[int] | torch.Tensor]) -> None:
        """Restarts begin with rows, whose products are known, or with given centroids (k, d)."""
        alike: list[tuple[int, tuple[int, list[int]]]] = []
        for i, start in enumerate(starts):
            if isinstance(start, torch.Tensor):
                self._place(centres, i, start)
                continue
            rows = torch.tensor(start, device=self.source.device)
            centres.place(i, start, self.gram.values[rows], self.gram.dist2[rows], self.gram.error + 2.0**-46)
            centres.repeated[i], clusters = self._alike(rows)
            if clusters:
                alike.append((len(clusters), (i, clusters)))
        for group in grouped(alike, centres.mass.shape[1] + self.means.more):
            self._know(centres, dict(group))
            for i, clusters in group:
                values = self._true(centres, i, clusters)
                square = self.moments.dist2[torch.tensor(starts[i], device=self.source.device)[clusters]]
                centres.repeated[i, clusters] = repeated_in(values[None], square)

    def _alike(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Which of these rows (k,) come again, bool (k,), and places of others that may be equal to each other."""
        again = (rows[:, None] == rows).tril_(-1).any(1)
        square, dist2 = self.gram.dist2[rows], self.moments.dist2[rows]
        both = square[:, None] + square
        apart = both - 2 * self.gram.values[rows[:, None], rows] > both * (4 * self.gram.error + 2.0**-38)
        equal = (apart | (dist2[:, None] != dist2)).logical_not_().fill_diagonal_(False)
        equal &= (again[:, None] | again).logical_not_()
        return again, equal.any(1).nonzero()[:, 0].tolist()

    def _place(self, centres: Centres, i: int, centroids: torch.Tensor) -> None:
        inner, square = self.gram.products(centroids)
        centres.place(i, centroids, inner, square, self.gram.error)
        centres.repeated[i] = repeated_in(centroids[None], square)

    # ---- labels

    def _label(self, centres: Centres) -> torch.Tensor:
        """The nearest true centroid of every row in every restart: int32 (r, n)."""
        r, k, n = centres.inner.shape
        labels = torch.empty(r, n, dtype=torch.int32, device=centres.inner.device)
        open_rows: list[tuple[int, torch.Tensor, torch.Tensor]] = []
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
                open_rows.append((start + i, rows, possible[i][:, rows]))
        # Those of all restarts together, as far as memory has room for their centroids.
        parts = [(possible.numel(), (i, rows, possible)) for i, rows, possible in open_rows]
        for some in grouped(parts, relieved(_PAIRS)):
            sized = [(int(possible.any(1).sum()), (i, rows, possible)) for i, rows, possible in some]
            for group in grouped(sized, k + self.means.more):
                self._decide(centres, group, labels)
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
        self, centres: Centres, group: list[tuple[int, torch.Tensor, torch.Tensor]], labels: torch.Tensor
    ) -> None:
        """Label rows (p,) of some restarts by the reference distance to their ``possible`` (k, p) true centroids."""
        clusters = {i: possible.any(1).nonzero()[:, 0] for i, _, possible in group}
        self._know(centres, {i: some.tolist() for i, some in clusters.items()})
        for index, x in self.means.rows(torch.cat([rows for _, rows, _ in group]).unique()):
            for i, rows, possible in group:
                ends = [index.start, index.stop - 1] if isinstance(index, slice) else [index[0], index[-1]]
                here = slice(*(int(torch.searchsorted(rows, end, right=at > 0)) for at, end in enumerate(ends)))
                if here.start == here.stop:
                    continue
                rows = rows[here]
                places = rows - index.start if isinstance(index, slice) else torch.searchsorted(index, rows)
                row, centroid = possible[clusters[i], here].t().nonzero(as_tuple=True)
                found = labels.new_empty(1, len(x))
                candidates = Candidates(places[row], torch.zeros_like(row), centroid)
                decide(x, self._true(centres, i, clusters[i].tolist())[None], candidates, found)
                labels[i, rows] = clusters[i][found[0, places].long()].int()
        self.lloyd.work.rechecked += sum(len(rows) for _, rows, _ in group)

    # ---- true centroids

    def _true(self, centres: Centres, i: int, clusters: list[int]) -> torch.Tensor:
        """The centroids of some clusters of restart ``i`` as the primal solver has them: (p, d)."""
        self._know(centres, {i: clusters})
        return torch.stack([centres.known[i][cluster] for cluster in clusters])

    def _know(self, centres: Centres, wanted: dict[int, list[int]]) -> None:
        """Have the true centroids of some clusters of restarts in ``known``: at most one `take`, and one pass."""
        known, k = centres.known, centres.mass.shape[1]
        missing = {i: [cluster for cluster in some if cluster not in known[i]] for i, some in wanted.items()}
        missing = {i: some for i, some in missing.items() if some}
        if not missing:
            return
        if sum(map(len, known)) + sum(map(len, missing.values())) > k + self.means.more:
            for i, one in enumerate(known):
                known[i] = {cluster: one[cluster] for cluster in wanted.get(i, []) if cluster in one}
        rows: list[tuple[int, int, int]] = []
        moved: list[tuple[int, list[int]]] = []
        for i, some in missing.items():
            start = centres.starts[i]
            if start is None:
                moved.append((i, some))
            elif isinstance(start, torch.Tensor):
                known[i].update({cluster: start[cluster] for cluster in some})
            else:
                rows += [(i, cluster, start[cluster]) for cluster in some]
        if rows:
            for (i, cluster, _), x in zip(rows, self.means.take([row for *_, row in rows]), strict=True):
                known[i][cluster] = x.to(self.means.dtype, copy=True)
        for job, part, sums in self.means.parts([(centres.home[i], some) for i, some in moved]):
            i, some = moved[job]
            for at, cluster in enumerate(some[part]):
                known[i][cluster] = self.means.centroid(sums[:, at], centres.mass[i, cluster])

    # ---- moving

    def _update(
        self, centres: Centres, labels: torch.Tensor, masses: torch.Tensor, counts: torch.Tensor, last: bool
    ) -> list[tuple[float, bool]]:
        """Centroids become the means of their rows: for each restart how far they moved, and whether less than tol."""
        (r, k), tol = masses.shape, self.lloyd.limits.tol
        scale = self.gram.scale
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
        old.slope, old.margin, old.starts = centres.slope.clone(), centres.margin.clone(), list(centres.starts)
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
                stays = old.known[i] if old.starts[i] is None else {}
                centres.known[i] = {c: known for c, known in stays.items() if not touched[i, c]}
            if not empty[i] and (last or (self.certain and (above[i] or below[i]))):
                moved.append((shift[i], below[i]))
                continue
            exact, centroids = filled[i] if empty[i] else self._step(old, i, labels[i], masses[i])
            if empty[i]:
                self._place(centres, i, centroids)
            moved.append((exact, exact <= tol))
        return moved

    def _step(self, centres: Centres, i: int, labels: torch.Tensor, mass: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The primal's update of restart ``i``: how far its true centroids move, and where to (k, d)."""
        every = list(range(len(mass)))
        centroids = self._true(centres, i, every)
        centres.known[i] = {}
        parts = ((part, sums) for _, part, sums in self.means.parts([(labels, every)]))
        return self.lloyd.update_parts(centroids, labels, parts, mass), centroids

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
        bound = off if self.certain else math.inf
        start = centres.starts[0]
        given = start if isinstance(start, torch.Tensor) else None
        home = centres.home[0].clone(), centres.mass[0].clone(), given
        return Ending(labels.clone(), inertia, bound, n_iter, shifts, mass.clone(), *home)

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


def solutions(
    lloyd: Lloyd, endings: Sequence[Ending], spare_bytes: int = 0, summed: int | None = None
) -> list[Solution]:
    """Those that can be the best, with true centroids; of those with the same partition the first.

    The matrix is not needed for it. ``spare_bytes`` and ``summed`` are as in `Means`.
    """
    means, every = Means(lloyd, spare_bytes, summed), list(range(len(endings[0].mass)))
    least = min(one.inertia + one.bound for one in endings) + _ALIKE * lloyd.moments.spread
    jobs: list[tuple[Ending, bool]] = []
    seen: list[torch.Tensor] = []
    for one in endings:
        if one.inertia - one.bound > least:
            continue
        if one.given is None:
            both = torch.cat([one.home, one.labels])
            partition, _ = numbered(both, len(every), Block.alone(len(both)))
            if any(torch.equal(partition, other) for other in seen):
                continue
            seen.append(partition)
            if not torch.equal(one.home, one.labels):
                jobs.append((one, True))
        jobs.append((one, False))
    found: list[Solution] = []
    away: torch.Tensor | None = None  # centroids of rows that have other labels by now
    wanted = [(one.home if of_home else one.labels, every) for one, of_home in jobs]
    for job, parts in groupby(means.parts(wanted), itemgetter(0)):
        one, of_home = jobs[job]
        given = one.given if away is None else away
        centroids = means.empty(len(every)) if given is None else given
        crosses = torch.empty_like(one.mass)
        for _, part, sums in parts:
            if given is None:
                for at, cluster in enumerate(every[part]):
                    centroids[cluster] = means.centroid(sums[:, at], one.home_mass[cluster])
            if not of_home:
                crosses[part] = lloyd.crosses(centroids[part], sums, one.mass[part])
        away = centroids if of_home else None
        if of_home:
            continue
        inertia = lloyd.spread + tree_sum(crosses).item()
        # The matrix is of the rows as they were, the sums of what they are now.
        require_unchanged(abs(inertia - one.inertia) <= one.bound + lloyd.doubt(centroids, inertia))
        found.append(Solution(centroids, one.labels, inertia, one.n_iter, one.shifts))
    return found
