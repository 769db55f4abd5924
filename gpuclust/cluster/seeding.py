"""Where the restarts begin: greedy k-means++ or random distinct rows, the same on any device and for any chunks.

k-means++ draws a row with probability proportional to its squared distance to the nearest centroid so far, so a sum
that rounds differently would draw another row. Here the distances are whole numbers: the rows are rounded to a grid
(an image of about 18 bits per value) on which products of any order are exact in float64, and potentials are int64.
Where the image is too coarse for what is left to cover (tight groups beside a far outlier), the restart goes on with
reference distances.

Sources: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007; the greedy form takes the
best of several draws, as in scikit-learn, but of twice as many: 2 (2 + log k). Where there are many clusters the
restarts end lower for it, for a small part of the time that they take. Random numbers: Philox, Salmon et al., SC 2011,
keyed by seed and restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from gpuclust.cluster.exact import reference_dist2
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.source import ChunkSource, tile_rows, tiles
from gpuclust.cluster.sums import total

# Below this mean distance, in steps of the image squared and per feature, its rounding (1/6) is a percent of it.
_COARSE = 16


class RandomBits:
    """Uniform 64-bit numbers of one restart; numpy promises that its raw bits stay the same."""

    def __init__(self, seed: int, restart: int) -> None:
        self._bits = np.random.Philox(key=[seed % 2**64, restart])

    def below(self, limit: int, count: int) -> list[int]:
        """``count`` whole numbers, uniform in ``0 .. limit - 1`` (all 0 where ``limit`` is 0)."""
        return [int(raw) * limit >> 64 for raw in self._bits.random_raw(count)]

    def order(self, weights: np.ndarray | None, n: int) -> np.ndarray:
        """A random order of ``n`` rows; heavier rows tend to be earlier, those of weight 0 come last."""
        uniform = ((self._bits.random_raw(n) >> np.uint64(11)) + 0.5) * 2.0**-53
        with np.errstate(divide="ignore"):
            keys = uniform if weights is None else -np.log(uniform) / weights
        return np.argsort(keys, kind="stable")


def choose_random(n: int, k: int, seed: int, restarts: range, weights: torch.Tensor | None) -> list[list[int]]:
    """``k`` distinct rows for each restart, drawn without replacement with probabilities like the weights."""
    known = None if weights is None else weights.cpu().numpy()
    return [RandomBits(seed, restart).order(known, n)[:k].tolist() for restart in restarts]


def choose_plus_plus(
    source: ChunkSource,
    moments: Moments,
    k: int,
    seed: int,
    restarts: range,
    weights: torch.Tensor | None,
    budget_bytes: int,
) -> list[list[int]]:
    """Greedy k-means++ for each restart: the indices of ``k`` rows.

    Parameters
    ----------
    source : ChunkSource (n, d)
    moments : Moments
    k, seed : int
    restarts : range
        Which restarts of the seed; what one draws does not depend on the others.
    weights : float64 (n,) or None
    budget_bytes : int
        For what may be kept to save a pass; never changes a draw.
    """
    return _PlusPlus(source, moments, k, seed, restarts, weights, budget_bytes).choose()


class _PlusPlus:
    def __init__(
        self,
        source: ChunkSource,
        moments: Moments,
        k: int,
        seed: int,
        restarts: range,
        weights: torch.Tensor | None,
        budget_bytes: int,
    ) -> None:
        self.source, self.k = source, k
        self.n, self.d = source.shape
        self.bits = [RandomBits(seed, restart) for restart in restarts]
        self.trials = 2 * (2 + int(math.log(k)))
        self.share = None if weights is None else weights / weights.amax()
        # What is drawn where nothing is left to cover: a row that has weight.
        self.spare = 0 if self.share is None else int(self.share.nonzero()[0])
        self.image = _Image(source, moments, budget_bytes // 4)
        self.keeps = 8 * self.n * len(restarts) * self.trials <= budget_bytes // 4
        self.closest = torch.full((len(restarts), self.n), math.inf, dtype=torch.float64, device=source.device)
        self.fine = [False] * len(restarts)

    def choose(self) -> list[list[int]]:
        chosen = [[row] for row in self._first()]
        self._cover(torch.tensor(chosen, device=self.source.device))
        for _ in range(1, self.k):
            self._refine(chosen)
            best = self._cover(self._draw())
            for rows, row in zip(chosen, best, strict=True):
                rows.append(row)
        return chosen

    def _first(self) -> list[int]:
        if self.share is None:
            return [bits.below(self.n, 1)[0] for bits in self.bits]
        heaps = torch.floor(self.share * 2.0 ** (61 - math.ceil(math.log2(self.n + 1)))).long().cumsum(0)
        return [self._pick(heaps, bits, 1).item() for bits in self.bits]  # type: ignore[misc]

    def _pick(self, heaps: torch.Tensor, bits: RandomBits, count: int) -> torch.Tensor:
        """Draw rows from cumulated whole-number weights (n,); the spare row where they are all zero."""
        limit = int(heaps[-1])
        targets = torch.tensor(bits.below(limit, count), device=heaps.device)
        return torch.searchsorted(heaps, targets, right=True) if limit else targets.fill_(self.spare)

    def _units(self) -> torch.Tensor:
        """What the distances of each restart are multiplied with so that n of them fit 62 bits: float64 (r, 1)."""
        units = torch.ones(len(self.fine), 1, dtype=torch.float64, device=self.closest.device)
        for i, fine in enumerate(self.fine):
            if not fine and self.share is None:
                continue
            largest = self._weighted(self.closest[i]).amax().item()
            if math.isfinite(largest):
                exponent = 61 - math.ceil(math.log2(self.n + 1)) - math.frexp(largest)[1]
                units[i] = 2.0 ** max(-1000, min(1000, exponent))
        return units

    def _weighted(self, dist2: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        return dist2 if self.share is None else dist2 * self.share[part]

    def _mass(self, dist2: torch.Tensor, units: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Squared distances (r, ..., b) times the weights of the rows, as whole numbers, int64."""
        dist2 = self._weighted(dist2, part)
        if self.share is not None or any(self.fine):
            dist2 = dist2 * (units if dist2.ndim == 2 else units[..., None])
        return dist2.long()

    def _draw(self) -> torch.Tensor:
        """The rows that each restart tries: int64 (r, trials)."""
        heaps = self._mass(self.closest, self._units()).cumsum(-1)
        return torch.stack([self._pick(heap, bits, self.trials) for heap, bits in zip(heaps, self.bits, strict=True)])

    def _cover(self, tried: torch.Tensor) -> list[int]:
        """Of the rows tried (r, t) keep the one that leaves the least potential (ties: the first)."""
        r, trials = tried.shape
        units = self._units()
        kept = self.closest.new_empty(r, trials, self.n) if self.keeps else None
        potential = torch.zeros(r, trials, dtype=torch.int64, device=tried.device)
        for part, dist2 in self._nearest(tried):
            potential += self._mass(dist2, units, part).sum(-1)
            if kept is not None:
                kept[:, :, part] = dist2
        best = potential.argmin(1, keepdim=True)
        rows = tried.gather(1, best)
        if kept is not None:
            self.closest = kept[torch.arange(r, device=best.device), best[:, 0]]
        else:
            for part, dist2 in self._nearest(rows):
                self.closest[:, part] = dist2[:, 0]
        return rows[:, 0].tolist()

    def _nearest(self, tried: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Per chunk, the distance to the nearest centroid if this row were one: float64 (r, t, b)."""
        r, trials = tried.shape
        candidates = self.source.take(tried.flatten())
        points = self.image.of(candidates)
        square = torch.linalg.vecdot(points, points)
        for start, x in self.source.chunks(self.image.rows):
            part = slice(start, start + x.shape[0])
            dist2 = self.closest.new_empty(r * trials, x.shape[0])
            if not all(self.fine):
                self.image.dist2(x, start, points, square, out=dist2)
            for j in range(r * trials):
                if self.fine[j // trials]:
                    dist2[j] = reference_dist2(x, candidates[j])
            dist2 = dist2.view(r, trials, -1)
            yield part, torch.minimum(dist2, self.closest[:, None, part], out=dist2)

    def _refine(self, chosen: list[list[int]]) -> None:
        """Go over to reference distances in every restart whose image has become too coarse."""
        rows_by_weight = self.n if self.share is None else total(self.share)
        for i, rows in enumerate(chosen):
            if self.fine[i] or total(self._weighted(self.closest[i])) >= _COARSE * self.d * rows_by_weight:
                continue
            self.fine[i] = True
            centroids = self.source.take(torch.tensor(rows, device=self.source.device))
            for start, x in self.source.chunks(self.image.rows):
                part = slice(start, start + x.shape[0])
                self.closest[i, part] = reference_dist2(x, centroids[0])
                for centroid in centroids[1:]:
                    torch.minimum(self.closest[i, part], reference_dist2(x, centroid), out=self.closest[i, part])


class _Image:
    """The rows on a grid of whole numbers so small that squared distances, and sums of n of them, are exact.

    With R = ||x - m|| s + sqrt(d) / 2 a distance is at most (2 R)**2, which is kept below 2**53 and below 2**62 / n.
    """

    def __init__(self, source: ChunkSource, moments: Moments, budget_bytes: int) -> None:
        n, d = source.shape
        far = math.sqrt(moments.dist2.amax().item()) * (1 + 2.0**-20)
        reach = min(2.0**26, math.sqrt(2.0**62 / n)) / 2 - math.sqrt(d) / 2
        exponent = math.frexp(reach / far)[1] - 1 if far > 0 else 0
        self.mean, self.scale = moments.mean, 2.0 ** max(-1000, min(1000, exponent))
        self.rows = min(n, tile_rows(d, source.device))
        self.norms = torch.zeros(n, dtype=torch.float64, device=source.device)
        self._kept = torch.empty(n, d, dtype=torch.float64, device=source.device) if 8 * n * d <= budget_bytes else None
        for start, x in source.chunks(self.rows):
            part = slice(start, start + x.shape[0])
            for span in tiles(self.rows, d, source.device):
                points = self.of(x, span)
                self.norms[part] += torch.linalg.vecdot(points, points)
                if self._kept is not None:
                    self._kept[part, span] = points

    def of(self, x: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
        """The image of rows (b, d), or of a span of their features: whole numbers as float64."""
        return (x[:, span].double() - self.mean[span]).mul_(self.scale).round_()

    def dist2(self, x: torch.Tensor, start: int, points: torch.Tensor, square: torch.Tensor, out: torch.Tensor) -> None:
        """Squared distances of the rows ``x``, which begin at ``start``, to image points (p, d): ``out`` (p, b).

        ``square`` (p,) are the squared norms of the points. Every partial sum is exact, whatever the tiles.
        """
        part = slice(start, start + x.shape[0])
        if self._kept is not None:
            torch.mm(points, self._kept[part].t(), out=out)
        else:
            out.zero_()
            for span in tiles(self.rows, x.shape[1], x.device):
                out.addmm_(points[:, span], self.of(x, span).t())
        out.mul_(-2.0).add_(self.norms[part]).add_(square[:, None])
