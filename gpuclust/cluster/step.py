"""What follows a pass: restarts end, wait for the host, or make a step, in plain torch operations.

Every backend that has kernels for it gives the same bits: a centroid is the joined sums of its rows divided by their
weight in float64, rounded once; how far it moved is the fixed-tree sum over the features of the squared differences
(`gpuclust.cluster.sums.tree_sum`), and of a restart the fixed-tree sum of that over its centroids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gpuclust.cluster.sources.base import block_rows
from gpuclust.cluster.sums import joined, tree_sum

# What a restart does: iterate; stand still because it has ended, or because a cluster is empty, which the host fills.
MOVES, ENDED, EMPTY = 0, 1, 2

Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Course(NamedTuple):
    """How far restarts have come, on the device; `advance` overwrites it.

    Attributes
    ----------
    does : int64 (r,)
        MOVES, ENDED or EMPTY.
    passes : int64 (r,)
        In which it moved.
    closing : bool (r,)
        Whether the next pass is its last.
    """

    does: torch.Tensor
    passes: torch.Tensor
    closing: torch.Tensor


class Limits(NamedTuple):
    """When a restart ends: after so many steps, or after one of no more than ``tol`` (squared movements, added up)."""

    max_iter: int
    tol: float


def advance(
    course: Course,
    changed: torch.Tensor,
    masses: torch.Tensor,
    sums: torch.Tensor,
    centroids: torch.Tensor,
    limits: Limits,
    finish: Finish | None = None,
) -> torch.Tensor:
    """`gpuclust.cluster.backends.base.Backend.advance`; ``finish`` as in `move`."""
    does, passes, closing = course
    moves = does == MOVES
    passes += moves
    end = moves & (closing | (changed == 0))
    empty = moves & ~end & (masses == 0).any(1)
    steps = moves & ~end & ~empty
    does += end * ENDED + empty * EMPTY
    shift = move(centroids, sums, masses, steps, finish)
    closing.copy_(torch.where(steps, (shift <= limits.tol) | (passes >= limits.max_iter), closing))
    return torch.stack([steps.double(), shift], 1)


def move(
    centroids: torch.Tensor,
    sums: torch.Tensor,
    masses: torch.Tensor,
    steps: torch.Tensor,
    finish: Finish | None = None,
) -> torch.Tensor:
    """Move the centroids (r, k, d) of the restarts that make a step, bool (r,), to the means of their rows.

    Parameters
    ----------
    sums : float64 (levels, r, k, d)
    masses : float64 (r, k)
        A cluster that gave its last row away stays where it is.
    finish : Callable, optional
        Makes centroids of means (p, d), float64, and of the centroids before; by default they are rounded.

    Returns
    -------
    float64 (r,) : the sums of the squared movements.
    """
    r, k, d = centroids.shape
    flat, sums, mass = centroids.view(r * k, d), sums.flatten(1, 2), masses.reshape(r * k, 1)
    moves = (steps[:, None] & (masses > 0)).view(r * k, 1)
    shifts = masses.new_empty(r * k)
    size = block_rows(d, centroids.device)
    for start in range(0, r * k, size):
        some = slice(start, start + size)
        before = flat[some]
        means = joined(sums[:, some]) / mass[some]
        after = means.to(before.dtype) if finish is None else finish(means, before)
        after = torch.where(moves[some], after, before)
        shifts[some] = tree_sum(torch.sub(after.double(), before).square_())
        before.copy_(after)
    return tree_sum(shifts.view(r, k))
