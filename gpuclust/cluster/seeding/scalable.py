"""k-means||: where restarts with many clusters begin, after a few passes over the rows instead of one per cluster.

Each round draws ``OVERSAMPLING`` k rows by their squared distances to the rows drawn so far, all of them at once; after
``ROUNDS`` rounds each drawn row weighs what the rows weigh that are nearest to it, and the greedy k-means++ of
`plus_plus` chooses k of them by these weights. Where fewer than k of them have weight, rounds go on as
long as a row is left uncovered.

Source: Bahmani, Moseley, Vattani, Kumar and Vassilvitskii, "Scalable k-means++", VLDB 2012: an oversampling of 2 k and
5 rounds are theirs. (Spark takes the same oversampling and 2 rounds, cuML the same and up to 8.) Rows are drawn with
replacement from cumulated whole-number distances rather than each by its own coin, so that draws depend on the seed and
the rows alone, and need a random number per draw, not per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding.cover import Cover
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.image import Image
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus
from gpuclust.cluster.sources.base import ChunkSource, TensorSource, block_rows

OVERSAMPLING = 2
ROUNDS = 5
# So many drawn rows are multiplied with a chunk of rows at a time, and both should stay in a processor's cache.
_AT_ONCE = 128


def choose_scalable(
    source: ChunkSource,
    moments: Moments,
    k: int,
    bits: Sequence[RandomBits],
    weights: Weights | None,
    spare_bytes: int,
    image: Image | None = None,
) -> list[list[int]]:
    """k-means|| for each restart: the numbers of ``k`` rows. All restarts share the passes over the rows.

    Parameters
    ----------
    source : ChunkSource (n, d)
    moments : Moments
    k : int
    bits : sequence of RandomBits
        One for each restart; what one draws does not depend on the others.
    weights : Weights or None
    spare_bytes : int
        For what may be kept to save work; never changes a draw.
    image : Image, optional
        Where one is known.
    """
    values = None if weights is None else weights.values
    cover = Cover(source, moments, bits, values, spare_bytes // 2, owners=True, image=image)
    rows = min(cover.image.rows, block_rows(_AT_ONCE, source.device))
    drawn = {i: row for i, row in enumerate(cover.first()[:, None])}
    cover.join(drawn, rows)
    active, passes = list(drawn), 0
    while active:
        cover.refine({i: drawn[i] for i in active}, rows)
        rounds = zip(active, cover.draw(OVERSAMPLING * k, active, cover.units()), strict=True)
        fresh = {i: new.unique() for i, new in rounds}
        fresh = {i: new for i, new in fresh.items() if new[0] >= 0}
        if fresh:
            cover.join(fresh, rows)
        passes += 1
        for i, new in fresh.items():
            drawn[i] = torch.cat([drawn[i], new])
        short = passes < ROUNDS
        active = [i for i in fresh if short or int((_mass(cover, i, len(drawn[i]), weights) > 0).sum()) < k]
    return [_reduce(cover, i, drawn[i], k, weights, spare_bytes) for i in range(len(bits))]


def _mass(cover: Cover, restart: int, drawn: int, weights: Weights | None) -> torch.Tensor:
    """What the rows weigh that are nearest to each of the drawn rows, over all processes: float64 (m,)."""
    assert cover.owner is not None
    owner = cover.owner[restart]
    if weights is None:
        return cover.block.sum(torch.bincount(owner, minlength=drawn)).double()
    return cover.block.sum(weights.per_cluster(owner[None], drawn)[:, 0]).sum(0)


def _reduce(
    cover: Cover, restart: int, drawn: torch.Tensor, k: int, weights: Weights | None, spare_bytes: int
) -> list[int]:
    """Of the rows drawn (m,) the ``k`` that weighted k-means++ chooses, which every process does for itself."""
    mass = _mass(cover, restart, len(drawn), weights)
    heavy = mass > 0
    drawn = drawn[heavy]
    source = TensorSource(cover.rows(drawn))
    places = choose_plus_plus(source, Moments.of(source), k, [cover.bits[restart]], mass[heavy], spare_bytes // 2)[0]
    return drawn[places].tolist()
