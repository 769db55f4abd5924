"""Where the restarts begin: greedy k-means++ or random distinct rows, the same on any device and for any chunks.

Draws are by exact whole-number distances (`gpuclust.cluster.seeding.cover`) and counter-based random numbers
(`gpuclust.cluster.seeding.draws`). `gpuclust.cluster.seeding.scalable` has k-means||.

Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007; the greedy form takes the
best of 2 + log k draws, as scikit-learn's does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gpuclust.cluster.distributed import Block
from gpuclust.cluster.exact import reference_dist2
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding.cover import Cover
from gpuclust.cluster.seeding.draws import RandomBits, trials
from gpuclust.cluster.seeding.image import Image
from gpuclust.cluster.sources.base import ChunkSource


def choose_random(block: Block, k: int, seed: int, restarts: range, weights: torch.Tensor | None) -> list[list[int]]:
    """``k`` distinct rows for each restart, drawn without replacement with probabilities like the weights (n,) here."""
    known = None if weights is None else weights.cpu().numpy()
    ours = []
    for restart in restarts:
        keys = RandomBits(seed, restart).keys(known, block.first, block.here)
        early = np.argsort(keys, kind="stable")[:k]
        ours.append((keys[early], early + block.first))
    chosen = []
    for each in zip(*block.group.gather(ours), strict=True):
        keys, rows = (np.concatenate(parts) for parts in zip(*each, strict=True))
        chosen.append(rows[np.argsort(keys, kind="stable")[:k]].tolist())
    return chosen


def choose_plus_plus(
    source: ChunkSource,
    moments: Moments,
    k: int,
    bits: Sequence[RandomBits],
    weights: torch.Tensor | None,
    spare_bytes: int,
    image: Image | None = None,
) -> list[list[int]]:
    """Greedy k-means++ for each restart: the numbers of ``k`` rows.

    Parameters
    ----------
    source : ChunkSource (n, d)
    moments : Moments
    k : int
    bits : sequence of RandomBits
        One for each restart; what one draws does not depend on the others.
    weights : float64 (n,) or None
    spare_bytes : int
        For what may be kept to save a pass; never changes a draw.
    image : Image, optional
        Where one is known.
    """
    return _PlusPlus(source, moments, k, bits, weights, spare_bytes, image).choose()


class _PlusPlus:
    def __init__(
        self,
        source: ChunkSource,
        moments: Moments,
        k: int,
        bits: Sequence[RandomBits],
        weights: torch.Tensor | None,
        spare_bytes: int,
        image: Image | None,
    ) -> None:
        self.source, self.k = source, k
        self.trials = trials(k)
        self.cover = Cover(source, moments, bits, weights, spare_bytes // 2, image=image)
        self.keeps = 8 * source.shape[0] * len(bits) * (self.trials + 1) <= spare_bytes // 2

    def choose(self) -> list[list[int]]:
        cover = self.cover
        every = range(len(cover.bits))
        chosen = self._add(cover.first()[:, None], cover.units())
        for _ in range(1, self.k):
            cover.refine(dict(zip(every, chosen, strict=True)), cover.image.rows)
            units = cover.units()
            drawn = cover.draw(self.trials, every, units)
            if cover.exhausted:  # fewer distinct rows than clusters: no row that is chosen now changes anything
                rest = chosen.new_full((len(chosen), self.k - chosen.shape[1]), cover.spare)
                return torch.cat([chosen, rest], 1).tolist()
            best = self._add(torch.where(drawn < 0, cover.spare, drawn), units)
            chosen = torch.cat([chosen, best], 1)
        return chosen.tolist()

    def _add(self, tried: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Of the rows tried (r, t) keep the one that leaves the least potential (ties: the first): int64 (r, 1)."""
        cover, (r, trials) = self.cover, tried.shape
        kept = cover.closest.new_empty(r, trials, self.source.shape[0]) if self.keeps else None
        potential = torch.zeros(r, trials, dtype=torch.int64, device=tried.device)
        for part, dist2 in self._nearest(tried):
            potential += cover.mass(dist2, units, part).sum(-1)
            if kept is not None:
                kept[:, :, part] = dist2
        best = cover.block.sum(potential).argmin(1, keepdim=True)
        rows = tried.gather(1, best)
        if kept is not None:
            cover.closest = kept[torch.arange(r, device=best.device), best[:, 0]]
        else:
            for part, dist2 in self._nearest(rows):
                cover.closest[:, part] = dist2[:, 0]
        return rows

    def _nearest(self, tried: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Per chunk, the distance to the nearest centroid if this row were one: float64 (r, t, b)."""
        cover, (r, trials) = self.cover, tried.shape
        fine = any(cover.fine)
        candidates, points = cover.points(tried.flatten(), fine)
        for part, x in cover.parts(cover.image.rows, fine):
            known = cover.closest[:, None, part]
            dist2 = cover.closest.new_empty(r * trials, known.shape[2])
            if not all(cover.fine):
                cover.image.dist2(x, part, points, out=dist2)
            for j in range(r * trials):
                if cover.fine[j // trials] and x is not None and candidates is not None:
                    dist2[j] = reference_dist2(x, candidates[j])
            dist2 = dist2.view(r, trials, -1)
            yield part, torch.minimum(dist2, known, out=dist2)
