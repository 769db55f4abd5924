"""Distances and their argmin in one kernel: the scores of a row never leave the processor that computed them.

The tile: a program takes `ROWS` rows and one restart and walks over the centroids, `CLUSTERS` at a time: it centres,
scales and rounds the rows, multiplies on the tensor cores, and gets the lower end of each score's interval,

    lower_ij = x^_i . matrix_j + (low_j - a_i slope_j).

Of each row it keeps the least, the second least and the index of the least. Up to 128 features the rows stay on the
processor while the centroids pass by, and each thread keeps these for its own columns until the end. Wider rows do not
fit beside the centroids: they are read again for each block of centroids, which is therefore wider, and each block is
folded into one best and second for each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpuclust.cluster.backends.base import SLICE, Bounded
from gpuclust.kernels.triton.rows import number, readable


class Shape(NamedTuple):
    """Of a program: a block of rows, of centroids, of features, and how it is compiled.

    Attributes
    ----------
    whole : bool
        Whether all features are one block: the rows are then read once and each thread folds its own columns.
    """

    rows: int
    clusters: int
    features: int
    whole: bool
    warps: int
    stages: int

    @classmethod
    def of(cls, d: int, item_bytes: int) -> Shape:
        """By the width of the rows and the bytes of a value alone, not by the name of a device.

        Eight warps are two of Hopper's groups. 128 rows times 32 centroids take 126 of their registers a thread (best,
        second, index and accumulators of 16 scores each, and the rows' own values), so that two programs fit a
        processor and one multiplies while the other compares: 256 rows are then at work beside each other, as many as
        64 columns in one program would allow, which would have to wait for themselves. Wide rows get 128 columns, as
        they are read anew for each block, and up to 255 registers; more than `SLICE` features need a second
        accumulator, so half the rows. Stages are what 99 KiB of shared memory hold, the least of the devices'.
        """
        if d <= 128:
            return cls(128, 32, max(16, triton.next_power_of_2(d)), True, 8, 3)
        # Rows pass through shared memory as they are stored.
        stages = 2 if item_bytes == 8 else 3
        if d <= SLICE:
            return cls(128, 128, 32, False, 8, stages)
        return cls(64, 128, 32, False, 8, stages)


# What is not a number leaves its row open: minimum and maximum hand NaN on, and the fold takes it as minus infinity,
# which is never certain. Plus infinity is the lower end of no row's nearest centroid: a row that is not finite (one
# that changed between passes) has it for all centroids, which is not certain either, or has NaN or minus infinity for
# some; a centroid beyond float16 has a bound that is no number (`Frame.operand`).
@triton.jit
def _least(best, second, index):
    """Of each row of (ROWS, W): the least ``best``, with the lowest ``index`` of equal ones, and the next after it."""
    best = tl.where(best == best, best, float("-inf"))
    least = tl.min(best, 1)
    at = tl.min(tl.where(best == least[:, None], index, 2147483647), 1)
    return least, tl.min(tl.where(index == at[:, None], second, best), 1), at


@triton.jit
def _products(rows, x_feature, there, shift, unit, matrix, place, known, d, begin, end, FEATURES: tl.constexpr):
    """x^ . matrix over the features from ``begin`` to ``end``."""
    total = tl.zeros((rows.shape[0], place.shape[0]), tl.float32)
    for first in range(begin, end, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        values = tl.load(
            rows + feature[None, :].to(tl.int64) * x_feature,
            mask=there[:, None] & (feature < d)[None, :],
            other=0,
        )
        moved = number(values).to(unit.dtype) * unit - tl.load(shift + feature, mask=feature < d, other=0.0)[None, :]
        centres = tl.load(
            matrix + place[None, :] * d + feature[:, None],
            mask=known[None, :] & (feature < d)[:, None],
            other=0.0,
        )
        total = tl.dot(moved.to(tl.float32).to(centres.dtype), centres, total)
    return total


@triton.jit(do_not_specialize=["b", "r", "k"])
def assign_kernel(
    x,
    norms,
    matrix,
    low,
    high,
    slope,
    shift,
    scale,
    labels,
    uncertain,
    b,
    r,
    k,
    d,
    width,
    x_row,
    x_feature,
    labels_restart,
    ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    FEATURES: tl.constexpr,
    SLICE: tl.constexpr,
    WHOLE: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """labels (r, b) and uncertain (r, b) of rows x (b, d) for `Bounded`'s matrix and high of (r * k), and its low and
    slope of (r, width), whole blocks of `CLUSTERS`, in which a column that is no centroid is infinitely far."""
    # The restarts of a block of rows are neighbours, so that all but the first find the rows in L2.
    program = tl.program_id(0)
    restart = (program % r).to(tl.int64)
    row = (program // r).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < b
    reach = tl.load(norms + row, mask=there, other=0.0)
    unit = tl.load(scale)
    rows = x + row[:, None] * x_row
    lows, slopes = low + restart * width, slope + restart * width
    feature = tl.arange(0, FEATURES)
    column = tl.arange(0, CLUSTERS)
    far: tl.constexpr = float("inf")

    if WHOLE:
        values = tl.load(
            rows + feature[None, :].to(tl.int64) * x_feature,
            mask=there[:, None] & (feature < d)[None, :],
            other=0,
        )
        moved = number(values).to(unit.dtype) * unit - tl.load(shift + feature, mask=feature < d, other=0.0)[None, :]
        operand = moved.to(tl.float32).to(matrix.dtype.element_ty)
        best = tl.full((ROWS, CLUSTERS), far, tl.float32)
        second = tl.full((ROWS, CLUSTERS), far, tl.float32)
        index = tl.zeros((ROWS, CLUSTERS), tl.int32) + column[None, :]
    else:
        best = tl.full((ROWS,), far, tl.float32)
        second = tl.full((ROWS,), far, tl.float32)
        index = tl.zeros((ROWS,), tl.int32)

    for start in range(0, k, CLUSTERS):
        cluster = start + column
        known = cluster < k
        place = restart * k + cluster
        base = tl.load(lows + cluster)[None, :] - reach[:, None] * tl.load(slopes + cluster)[None, :]
        if WHOLE:
            centres = tl.load(
                matrix + place[None, :] * d + feature[:, None],
                mask=known[None, :] & (feature < d)[:, None],
                other=0.0,
            )
            total = tl.dot(operand, centres, base)
        elif FLUSH:  # each slice is added apart: the bound of `gpuclust.cluster.exact` counts on it
            total = base
            for begin in range(0, d, SLICE):
                end = tl.minimum(begin + SLICE, d)
                total += _products(rows, x_feature, there, shift, unit, matrix, place, known, d, begin, end, FEATURES)
        else:
            total = base + _products(rows, x_feature, there, shift, unit, matrix, place, known, d, 0, d, FEATURES)
        if WHOLE:
            # A maximum, two minima, a comparison and a selection for each score, no shuffle.
            other = tl.maximum(best, total, propagate_nan=tl.PropagateNan.ALL)
            second = tl.minimum(second, other, propagate_nan=tl.PropagateNan.ALL)
            index = tl.where(total < best, cluster[None, :], index)
            best = tl.minimum(best, total, propagate_nan=tl.PropagateNan.ALL)
        else:
            # Nothing is NaN after the fold.
            least, next_least, at_least = _least(total, far, tl.zeros((ROWS, CLUSTERS), tl.int32) + cluster[None, :])
            second = tl.minimum(tl.minimum(second, next_least), tl.maximum(best, least))
            index = tl.where(least < best, at_least, index)
            best = tl.minimum(best, least)
    if WHOLE:
        best, second, index = _least(best, second, index)

    # Certain where the second least lower end is above the upper end of the least one: the least of all upper ends is
    # then that one, for a centroid with a smaller one would have a smaller lower end, too. No other is computed.
    index = tl.minimum(index, k - 1)
    across = tl.load(high + restart * k + index) - tl.load(lows + index)
    upper = best + (across + 2 * reach * tl.load(slopes + index))
    # Minus infinity was no number; nothing is above an upper end that is infinite or NaN.
    certain = (second > upper) & (best > float("-inf"))
    tl.store(labels + restart * labels_restart + row, index, mask=there)
    tl.store(uncertain + restart * b + row, (certain == 0).to(tl.int8), mask=there)


def assign(
    x: torch.Tensor,
    norms: torch.Tensor,
    operand: Bounded,
    scale: torch.Tensor,
    labels: torch.Tensor,
    uncertain: torch.Tensor,
) -> None:
    """Label rows by the least lower end of their scores, and say which of the labels are not certain.

    Parameters
    ----------
    x : (b, d), of any strides
    norms : float32 (b,)
        `Frame.norms` of the rows.
    operand : Bounded
        With a shift.
    scale : () in the type of the shift
        Its scale: where rows are float64 it may be beyond the range of a kernel's float arguments.
    labels : int32 (r, b), rows contiguous, out
    uncertain : int8 (r, b), contiguous, out
        0 where the label is certain by the bound, else 1.
    """
    r, k, d = operand.centroids.shape
    shape = Shape.of(d, x.element_size())
    assert operand.shift is not None
    # Whole blocks, which a thread reads without asking what is there: two of its columns at a time.
    beyond = (0, -k % shape.clusters)
    low = torch.nn.functional.pad(operand.low.view(r, k), beyond, value=float("inf"))
    slope = torch.nn.functional.pad(operand.slope.view(r, k), beyond)
    assert labels.stride(1) == 1 or labels.shape[1] == 1
    assert uncertain.is_contiguous()
    assert norms.is_contiguous()
    assign_kernel[(triton.cdiv(x.shape[0], shape.rows) * r,)](
        readable(x),
        norms,
        operand.matrix,
        low,
        operand.high,
        slope,
        operand.shift,
        scale,
        labels,
        uncertain,
        x.shape[0],
        r,
        k,
        d,
        low.shape[1],
        x.stride(0),
        x.stride(1),
        labels.stride(0),
        ROWS=shape.rows,
        CLUSTERS=shape.clusters,
        FEATURES=shape.features,
        SLICE=SLICE,
        WHOLE=shape.whole,
        FLUSH=d > SLICE,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
