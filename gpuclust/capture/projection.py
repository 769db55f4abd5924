"""A sparse random projection of activations: d values to m, squared distances right on average and within sqrt(2 / m).

It is the block construction of Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", J. ACM 61(1), 2014: s = 8
blocks of B = m / 8 buckets each; in every block a value goes into one bucket with a random sign, and a bucket is the
sum of what is in it, times 1 / sqrt(8). Which bucket is drawn for B neighbouring values at a time: they are a group,
which in each block is turned by a random number of places and laid on the others. So two values of a group never meet,
and two of different groups do with probability 1 / B, independently in every block. With independent signs, for any
vector x (of a difference of two rows, say) with groups x_g,

    E ||S x||^2 = ||x||^2,    Var ||S x||^2 = (2 / m) (||x||^4 - sum_g ||x_g||^4) <= (2 / m) ||x||^4,

over seeds: the cross terms x_i x_j are uncorrelated, and each has the variance 4 / (8^2) 8 / B x_i^2 x_j^2. Hence a
squared distance is off by at most a share e with probability 1 - 2 / (m e^2) (Chebyshev). That is what is proved. Where
the difference is spread over many values the error is about normal, and the largest among all pairs of n rows about
sqrt(8 ln(n) / m): 2.2 % rms and 13 % at most for m = 4096 and n = 5000. Where few values carry it, the rms is no larger
but the tail is heavier: two that carry all meet in a block with probability 8 / m, and the squared distance is then off
by up to 1/8. (A bound for every vector takes s of the order of log(1 / delta) / e; Kane and Nelson 2014; for vectors
that are spread out a constant s, as here, goes as far as Dasgupta, Kumar and Sarlos, "A sparse Johnson-Lindenstrauss
transform", STOC 2010, say.) `Distortion` measures it on the rows themselves.

A bucket's sum is over groups as a balanced binary tree of single additions: no atomics, the same bits on every device,
for any batch that a row is in, for any strides, and however many groups are on the way at a time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# One for each bit of a byte of signs.
BLOCKS = 8
# The generator's second key, so that no other random number of the project comes from the same bits.
_STREAM = 0x736B65746368
# Bytes of the turned groups that are held at a time.
_TURNED_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Bytes of float64 values of rows whose distances are measured.
_SLICE_BYTES = 8 << 20


class Projection:
    """Projects activations of d values to m.

    Parameters
    ----------
    d : int
        Values of an activation.
    m : int
        Values that are left, a multiple of 8.
    seed : int
        The same seed, d and m are the same projection on every machine.
    device
        Where the activations are. About a byte for each value stays there; see `projection_bytes`.
    """

    def __init__(self, d: int, m: int, seed: int, device: torch.device | str) -> None:
        self.d, self.m, self.buckets = d, m, m // BLOCKS
        self.groups = -(-d // self.buckets)
        bits = np.random.Philox(key=[seed % 2**64, _STREAM])
        turns = (bits.random_raw(BLOCKS * self.groups) >> np.uint64(32)) * np.uint64(self.buckets) >> np.uint64(32)
        # Bit r of byte i is the sign of the value at place i of the turned groups of block r.
        signs = bits.random_raw(-(-self.groups * self.buckets // 8)).astype("<u8").view(np.uint8)
        self._turns = torch.as_tensor(turns.astype(np.int64).reshape(BLOCKS, self.groups), device=device)
        self._signs = torch.as_tensor(signs[: self.groups * self.buckets], device=device)
        self._places = torch.arange(BLOCKS, dtype=torch.uint8, device=device)[:, None]

    def __call__(self, activations: Tensor) -> Tensor:
        """Project a batch (b, *shape), in C order of the shape: (b, m), float32 or, of float64, float64."""
        dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
        step = _groups_at_a_time(self.m, len(activations), dtype.itemsize, activations.device.type)
        # Sums of 2^i groups, each i once, as in a binary counter: the tree does not depend on the step.
        waiting: list[tuple[int, Tensor]] = []
        start = 0
        while start < self.groups:
            count = 1 << min(step, self.groups - start).bit_length() - 1
            total = self._sum(activations, start, count, dtype)
            start += count
            while waiting and waiting[-1][0] == count:
                total, count = waiting.pop()[1].add_(total), 2 * count
            waiting.append((count, total))
        total = waiting.pop()[1]
        while waiting:
            total = waiting.pop()[1].add_(total)
        # The sign of a zero is that of a sum of zeros: one for all.
        return total.mul_(1 / math.sqrt(BLOCKS)).add_(0.0).view(-1, self.m)

    def _sum(self, activations: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """The sum of some groups, 2^i of them, turned and with their signs, in every block: (b, 8, B)."""
        b, size, device = len(activations), self.buckets, activations.device
        first, stop = start * size, min(self.d, (start + count) * size)
        x = torch.empty(b, count * size, dtype=dtype, device=device)
        x[:, stop - first :] = 0
        copy_features(activations, first, x[:, : stop - first])
        twice = x.view(b, count, size).repeat(1, 1, 2)
        del x
        # Window t of a group that stands there twice is the group turned by t places.
        windows = twice.as_strided((b, count, size, size), (count * 2 * size, 2 * size, 1, 1))
        turned = windows[:, torch.arange(count, device=device), self._turns[:, start : start + count]]
        del twice, windows
        bits = self._signs[first : first + count * size] >> self._places & 1
        turned.mul_(bits.view(BLOCKS, count, size).to(dtype).mul_(-2).add_(1))
        while turned.shape[2] > 1:
            turned = turned[:, :, 0::2].add_(turned[:, :, 1::2])
        return turned.contiguous()


def projection_bytes(d: int, m: int, batch: int, itemsize: int, device: str) -> tuple[int, int]:
    """Bytes on the device that a `Projection` keeps, and those that one call for a batch takes at most, its result
    among them; ``itemsize`` is of the activations, ``device`` the type, "cpu" or "cuda"."""
    buckets, size = m // BLOCKS, 8 if itemsize == 8 else 4
    groups = -(-d // buckets)
    step = min(_groups_at_a_time(m, batch, size, device), groups)
    # Rows twice over and turned, signs, where groups are; and the sums that wait.
    turned = step * buckets * (batch * size * (2 + BLOCKS) + BLOCKS * (size + 2)) + 8 * step
    waiting = ((groups // step).bit_length() + 2) * batch * m * size
    return groups * (buckets + 8 * BLOCKS), turned + waiting


def _groups_at_a_time(m: int, batch: int, itemsize: int, device: str) -> int:
    """A power of two."""
    fit = _TURNED_BYTES.get(device, _TURNED_BYTES["cpu"]) // (max(1, batch) * m * itemsize)
    return 1 << max(1, fit).bit_length() - 1


def copy_features(activations: Tensor, first: int, out: Tensor) -> None:
    """Copy values ``first`` to ``first + w`` of a batch (b, *shape), in C order of the shape, to ``out`` (b, w)."""
    b, stop = len(activations), first + out.shape[1]
    if activations.is_contiguous() or activations.ndim == 2:
        out.copy_(activations.reshape(b, -1)[:, first:stop])
        return
    # Channels last: a part of a channel, whole ones, and a part of one; each is a strided view.
    x = activations.flatten(2)
    p, at = x.shape[2], first
    while at < stop:
        channel, place = divmod(at, p)
        whole = (stop - at) // p if place == 0 else 0
        end = at + whole * p if whole else min(stop, (channel + 1) * p)
        into = out[:, at - first : end - first]
        if whole:
            into.unflatten(1, (whole, p)).copy_(x[:, channel : channel + whole])
        else:
            into.copy_(x[:, channel, place : place + end - at])
        at = end


class Distortion:
    """How far squared distances are from what they were, for pairs of rows of the same batch.

    Parameters
    ----------
    rows : int
        Rows that are looked at, the first of the first batches; nothing of them is kept but the pairs' errors.

    Attributes
    ----------
    pairs : int
        Pairs of different rows so far.
    mean, rms, largest : float
        Of (distance after / distance before) - 1, of squared distances; ``largest`` in magnitude. NaN without pairs.
    """

    def __init__(self, rows: int = 64) -> None:
        self._left, self._errors = rows, np.empty(0)

    def see(self, before: Tensor, after: Tensor) -> None:
        """Look at a batch (b, *shape) and what it was reduced to, (b, values)."""
        count = min(self._left, len(before))
        self._left -= count
        if count < 2:
            return
        square, kept = _squared_distances(before[:count]), _squared_distances(after[:count])
        upper = torch.ones(count, count, dtype=torch.bool).triu(1)
        far = upper & (square > square.max() * 2.0**-40)  # what is less is rounding: the rows are alike
        self._errors = np.append(self._errors, (kept[far] / square[far] - 1).numpy())

    @property
    def pairs(self) -> int:
        return len(self._errors)

    @property
    def mean(self) -> float:
        return float(self._errors.mean()) if self.pairs else math.nan

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.square(self._errors).mean())) if self.pairs else math.nan

    @property
    def largest(self) -> float:
        return float(np.abs(self._errors).max()) if self.pairs else math.nan

    def describe(self) -> str:
        """For a report: ``measured on 2,016 pairs: -0.1 % on average, 2.2 % rms, 7.9 % at most``."""
        if not self.pairs:
            return "not measured: no two different images in a batch"
        return (
            f"measured on {self.pairs:,} pairs of images: {self.mean:+.2%} on average, {self.rms:.2%} rms, "
            f"{self.largest:.2%} at most"
        ).replace("%", " %")


def _squared_distances(rows: Tensor) -> Tensor:
    """Between all rows (b, *shape): float64 (b, b) on the host."""
    b, d = len(rows), rows[0].numel()
    gram = torch.zeros(b, b, dtype=torch.float64, device=rows.device)
    width = max(1, _SLICE_BYTES // (8 * b))
    for start in range(0, d, width):
        x = torch.empty(b, min(width, d - start), dtype=torch.float64, device=rows.device)
        copy_features(rows, start, x)
        x -= x.mean(0)
        gram.addmm_(x, x.t())
    gram = gram.cpu()
    norms = gram.diagonal()
    return (norms + norms[:, None] - 2 * gram).clamp_(min=0)
