"""Sums of clusters that follow the rows that move: read, round to the grid and add, in one kernel.

A program takes `ROWS` rows and `FEATURES` features. It reads both labels of its rows, and only of the rows that changed
cluster the values: what did not move costs eight bytes, whatever its width, and nobody has to be told (sorted, counted
or waited for) which rows moved. Each value is rounded to the grid of `gpuclust.cluster.sums`, so that every addition is
exact and atomic ones give the same bits in any order.

`x * weight + magic` must not become one fused operation, which rounds once where the grid's definition rounds twice:
the kernel is compiled without fusion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpuclust.kernels.triton.rows import number, readable

# Lanes of a warp take neighbouring features: their atomics go to the same few sectors of L2.
ROWS, FEATURES, WARPS = 16, 128, 4


@triton.jit(do_not_specialize=["b", "r", "k", "levels"])
def accumulate_kernel(
    x,
    weights,
    magic,
    plus,
    minus,
    sums,
    counts,
    b,
    r,
    k,
    d,
    levels,
    x_row,
    x_feature,
    plus_restart,
    minus_restart,
    sums_level,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Add x (b, d) times weights (b,) to sums (levels, r, k, d) at plus (r, b), take it away at minus."""
    blocks = tl.cdiv(d, FEATURES)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = (tl.program_id(0) % blocks) * FEATURES + tl.arange(0, FEATURES)
    there, known = row < b, feature < d
    rows = x + row[:, None] * x_row + feature[None, :].to(tl.int64) * x_feature
    one = tl.full((ROWS,), 1.0, tl.float64)
    gained, lost = plus + row, minus + row
    for restart in range(r):
        gains = tl.load(gained, mask=there, other=0)
        moves = there
        loses = gains
        if not FIRST:
            loses = tl.load(lost, mask=there, other=0)
            moves = there & (gains != loses)
        to, off = restart * k + gains, restart * k + loses
        mask = moves[:, None] & known[None, :]
        values = number(tl.load(rows, mask=mask, other=0)).to(tl.float64)
        if WEIGHTED:
            values *= tl.load(weights + row, mask=moves, other=0.0)[:, None]
        target, step = sums + feature[None, :], magic + feature
        for _ in range(levels):
            constant = tl.load(step, mask=known, other=0.0)[None, :]
            part = (values + constant) - constant
            values -= part
            tl.atomic_add(target + to[:, None].to(tl.int64) * d, part, mask=mask, sem="relaxed")
            if not FIRST:
                tl.atomic_add(target + off[:, None].to(tl.int64) * d, -part, mask=mask, sem="relaxed")
            target += sums_level
            step += d
        if tl.program_id(0) % blocks == 0:
            tl.atomic_add(counts + to, one, mask=moves, sem="relaxed")
            if not FIRST:
                tl.atomic_add(counts + off, -one, mask=moves, sem="relaxed")
        gained += plus_restart
        lost += minus_restart


def accumulate(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    magic: torch.Tensor,
    plus: torch.Tensor,
    minus: torch.Tensor | None,
    sums: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """`Backend.accumulate`, with the grid's constants ``magic`` as float64 (levels, d).

    Parameters
    ----------
    x : (b, d), of any strides
    weights : float64 (b,), contiguous, or None
    plus, minus : int32 (r, b), rows contiguous
    sums, counts : contiguous, in and out
    """
    (b, d), (r, k) = x.shape, counts.shape
    before = plus if minus is None else minus
    for labels in (plus, before):
        assert labels.stride(1) == 1 or b == 1
    assert sums.is_contiguous()
    assert counts.is_contiguous()
    accumulate_kernel[(triton.cdiv(b, ROWS) * triton.cdiv(d, FEATURES),)](
        readable(x),
        magic if weights is None else weights,
        magic,
        plus,
        before,
        sums,
        counts,
        b,
        r,
        k,
        d,
        len(magic),
        x.stride(0),
        x.stride(1),
        plus.stride(0),
        before.stride(0),
        sums.stride(0),
        ROWS=ROWS,
        FEATURES=FEATURES,
        WEIGHTED=weights is not None,
        FIRST=minus is None,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
