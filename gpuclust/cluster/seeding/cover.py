"""How far the rows are from the rows that seeding has chosen so far, for every restart, and draws by that.

A row is drawn with probability proportional to its squared distance, so a sum that rounds differently would draw
another row. Here the distances are whole numbers (`image.Image`), and potentials are int64. Where the image
is too coarse for what is left to cover (tight groups beside a far outlier), the restart goes on with reference
distances. With several processes a number of a row is its number among the rows of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from gpuclust.cluster.exact import reference_dist2
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.image import Image, SeenImage
from gpuclust.cluster.sources.base import ChunkSource, take_rows
from gpuclust.cluster.sums import total, totals

# Below this mean distance, in steps of the image squared and per feature, its rounding (1/6) is a percent of it.
_COARSE = 16


class Cover:
    """Distances of the rows to the rows chosen so far.

    Parameters
    ----------
    source : ChunkSource (n, d)
    moments : Moments
    bits : sequence of RandomBits
        One for each of r restarts.
    weights : float64 (n,) or None
    spare_bytes : int
        For the image.
    owners : bool
        Whether to keep which of the chosen rows is the nearest.
    image : Image, optional
        Where one is known; else it is made.

    Attributes
    ----------
    closest : float64 (r, n)
        Squared distance to the nearest of them, in steps of the image or, where ``fine``, of the rows themselves.
    owner : int32 (r, n) or None
        Its place in the order in which they were chosen; the first of equally near ones.
    fine : list of bool
    spare : int
        What is drawn where nothing is left to cover: the first row that has weight.
    exhausted : bool
        Whether the last draw found nothing left to cover in any restart.
    """

    def __init__(
        self,
        source: ChunkSource,
        moments: Moments,
        bits: Sequence[RandomBits],
        weights: torch.Tensor | None,
        spare_bytes: int,
        *,
        owners: bool = False,
        image: Image | None = None,
    ) -> None:
        n, r, device = source.shape[0], len(bits), source.device
        self.source, self.block, self.bits = source, moments.block, bits
        self.share = None if weights is None else weights / self.block.max(weights.amax())
        self.spare, self._mass_of_all = 0, float(self.block.n)
        self.exhausted = False
        if self.share is not None:
            heavy = self.share.nonzero()[:1, 0] + self.block.first
            first = heavy if len(heavy) else heavy.new_full((1,), self.block.n)
            self.spare = -int(self.block.max(-first))
            self._mass_of_all = total(self.share, None, self.block)
        self.image = image or SeenImage(source, moments, spare_bytes)
        self.closest = torch.full((r, n), math.inf, dtype=torch.float64, device=device)
        self.owner = torch.zeros(r, n, dtype=torch.int32, device=device) if owners else None
        self.fine = [False] * r
        self._chosen = [0] * r
        # The largest power of two that n whole numbers may reach so that their sum stays below 2**62.
        self._exponent = 61 - math.ceil(math.log2(self.block.n + 1))

    def first(self) -> torch.Tensor:
        """A row for each restart, drawn by the weights: int64 (r,)."""
        if self.share is None:
            return torch.tensor([bits.below(self.block.n, 1)[0] for bits in self.bits], device=self.closest.device)
        return self._pick(torch.floor(self.share * 2.0**self._exponent).long()[None], [self.bits], 1)[0]

    def draw(self, count: int, active: Sequence[int], units: torch.Tensor) -> torch.Tensor:
        """So many rows for each active restart, by their distances times weights: int64 (a, count).

        With replacement; -1 where no distance is left.
        """
        every = len(active) == len(self.bits)
        amounts = self.mass(self.closest, units) if every else self.mass(self.closest[active], units[active])
        return self._pick(amounts, [[self.bits[i]] for i in active], count)

    def _pick(self, amounts: torch.Tensor, bits: Sequence[Sequence[RandomBits]], count: int) -> torch.Tensor:
        """Draw by whole numbers (h, n), ``count`` rows for each of the bits of each h: int64 (h, t)."""
        heaps = amounts.cumsum(-1)
        before, limits = self.block.before(heaps[:, -1])
        left = limits.tolist()
        self.exhausted = not any(left)
        targets = torch.tensor(
            [
                [target for one in some for target in one.below(limit, count)]
                for some, limit in zip(bits, left, strict=True)
            ],
            device=heaps.device,
        )
        return torch.where(limits[:, None] > 0, self.block.find(heaps, targets, before), -1)

    def units(self) -> torch.Tensor:
        """What the distances of each restart are multiplied with so that n of them fit 62 bits: float64 (r, 1)."""
        units = torch.ones(len(self.fine), 1, dtype=torch.float64, device=self.closest.device)
        if self.share is None and not any(self.fine):
            return units
        for i, largest in enumerate(self.block.max(self._weighted(self.closest).amax(1)).tolist()):
            if (self.fine[i] or self.share is not None) and math.isfinite(largest):
                exponent = self._exponent - math.frexp(largest)[1]
                units[i] = 2.0 ** max(-1000, min(1000, exponent))
        return units

    def mass(self, dist2: torch.Tensor, units: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Squared distances (r, ..., b) times the weights of the rows, as whole numbers, int64."""
        dist2 = self._weighted(dist2, part)
        if self.share is not None or any(self.fine):
            dist2 = dist2 * (units if dist2.ndim == 2 else units[..., None])
        return dist2.long()

    def _weighted(self, dist2: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        return dist2 if self.share is None else dist2 * self.share[part]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers (m,), in every process: (m, d)."""
        return take_rows(self.source, self.block, index)

    def points(self, index: torch.Tensor, fine: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The rows with these numbers (m,), where the image or a ``fine`` restart reads them; what the image has."""
        x = self.rows(index) if fine or self.image.reads else None
        return x, self.image.points(index, x)

    def parts(self, rows: int, fine: bool) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """All rows of the source in parts, themselves where the image or a ``fine`` restart reads them."""
        if fine or self.image.reads:
            for start, x in self.source.chunks(rows):
                yield slice(start, start + x.shape[0]), x
        else:
            for start in range(0, len(self.image.norms), rows):
                yield slice(start, min(len(self.image.norms), start + rows)), None

    def join(self, chosen: dict[int, torch.Tensor], rows: int) -> None:
        """Bring the distances up to date with newly chosen rows, int64 (m,) by restart, in one pass in chunks."""
        fine = any(self.fine[i] for i in chosen)
        values, points = self.points(torch.cat(list(chosen.values())), fine)
        ends = [0, *itertools.accumulate(len(index) for index in chosen.values())]
        places = {i: slice(*ends[at : at + 2]) for at, i in enumerate(chosen)}
        for part, x in self.parts(rows, fine):
            for i, place in places.items():
                known = self.closest[i, part]
                if self.fine[i] and x is not None and values is not None:
                    which = _nearest(x, values[place], known)
                else:
                    which = self.image.nearest(x, part, points[place], known)
                if self.owner is not None:
                    owner = self.owner[i, part]
                    owner.copy_(torch.where(which < 0, owner, which + self._chosen[i]))
        for i, index in chosen.items():
            self._chosen[i] += len(index)

    def refine(self, chosen: dict[int, torch.Tensor], rows: int) -> None:
        """Go over to reference distances in every restart whose image has become too coarse for its chosen rows."""
        still = [i for i in chosen if not self.fine[i]]
        if not still:
            return
        every = len(still) == len(self.fine)
        left = totals(self._weighted(self.closest if every else self.closest[still]), self.block)
        enough = _COARSE * self.source.shape[1] * self._mass_of_all
        coarse = [i for i, potential in zip(still, left, strict=True) if not potential >= enough]
        for i in coarse:
            self.fine[i], self._chosen[i] = True, 0
            self.closest[i] = math.inf
        if coarse:
            self.join({i: chosen[i] for i in coarse}, rows)


def _nearest(x: torch.Tensor, points: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """What `Image.nearest` does, by reference distances of rows (b, d) to points (m, d)."""
    which = known.new_full((x.shape[0],), -1, dtype=torch.int64)
    for place, point in enumerate(points):
        dist2 = reference_dist2(x, point)
        which.masked_fill_(dist2 < known, place)
        torch.minimum(known, dist2, out=known)
    return which
