"""Sums that do not depend on the order of their terms.

Floating-point addition rounds, so a sum over the rows changes with chunks, threads and processes. Here every term is
first rounded to a multiple of a grid step so coarse that no partial sum can need more than the 53 bits of a float64:
then every addition is exact, and any order, any blocking and any matrix product gives the same bits.

The steps are powers of two, one per feature: with ``n`` terms below ``2**e`` the step is ``2**(e - bits)`` with
``bits = 51 - ceil(log2(n + 1))``, so a term is moved by at most half of that (relative to the largest value: 2**-35
for 70,000 rows). Where that is not well below what the dtype resolves, a second level carries the remainder on a grid
finer by the same factor.

Source of the method: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013 (pre-rounding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from gpuclust.cluster.distributed import Block
from gpuclust.errors import InputError

# Values that are split at a time.
_TOTAL_VALUES = 1 << 20
# The sum of n terms of at most t is in range, with the numbers that round them to a grid, where so many times n t is.
SUMMED = 16
# Bits that sums keep below the last of the largest value; a mean's error is half of the last of them at most.
_GUARD = 6
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by one fixed tree, which depends on its length alone. ``values`` is overwritten.

    The upper half is added to the lower half until one value is left, so the same additions are made on any device.
    """
    length = values.shape[-1]
    while length > 1:
        half = (length + 1) // 2
        values[..., : length - half] += values[..., half:length]
        length = half
    return values[..., 0].clone()


def joined(levels: torch.Tensor) -> torch.Tensor:
    """The levels (l, ...) of sums on a grid, added up in their order. Not a copy where there is one level."""
    whole = levels[0]
    for level in levels[1:]:
        whole = whole + level
    return whole


def power_of_two(values: torch.Tensor, block: Block | None = None) -> float:
    """The power of two that brings the largest of the values, which is above 0, to between 1/2 and 1."""
    largest = values.amax() if block is None else block.max(values.amax())
    return float(math.ldexp(1.0, math.frexp(largest.item())[1]))


def power_above(largest: torch.Tensor) -> torch.Tensor:
    """The exponent ``e`` with ``largest < 2**e``, elementwise, int32; for zeros the least exponent."""
    exponent = torch.frexp(largest.double()).exponent
    return torch.where(largest > 0, exponent, torch.full_like(exponent, -1000))


@dataclass(frozen=True)
class Grid:
    """Grid steps of a sum of at most ``n`` terms per feature.

    Attributes
    ----------
    magic : tuple of float64 tensors (d,)
        Per level, 1.5 * 2**52 steps: adding and subtracting it rounds to a multiple of the step.
    """

    magic: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, largest: torch.Tensor, n: int, dtype: torch.dtype, lightest: float = 1.0) -> Grid:
        """The grid for ``n`` terms that are at most ``largest`` (d,) in absolute value and came from ``dtype``.

        Terms that were multiplied with weights of at most 1 keep their digits down to the ``lightest`` weight.

        Raises
        ------
        InputError
            If the weights differ so much that more than 8 levels were needed.
        """
        bits, digits, levels = _digits(n, dtype, lightest)
        if levels > 8:
            raise InputError(
                f"the weights of {n} rows differ by a factor of 2**{-math.log2(lightest):.0f}, and sums tell at most "
                f"2**{8 * bits - digits} apart: leave rows of so little weight out"
            )
        exponent = power_above(largest)
        one = torch.full_like(largest, 1.5, dtype=torch.float64)
        # Below 2**-1010 a step would itself be subnormal: values so small are taken as zero.
        steps = [torch.clamp(exponent - bits * (level + 1), min=-1010) for level in range(levels)]
        return cls(tuple(torch.ldexp(one, step + 52) for step in steps))

    @cached_property
    def constants(self) -> torch.Tensor:
        """``magic`` as one tensor, float64 (levels, d), as kernels read it."""
        return torch.stack(self.magic)

    @property
    def levels(self) -> int:
        return len(self.magic)

    def split(self, values: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
        """``values`` (b, w) float64, features ``start`` to ``start + w``: per level, multiples of its step (b, w)."""
        parts = []
        for level, magic in enumerate(self.magic):
            constant = magic[start : start + values.shape[1]]
            part = (values + constant).sub_(constant)
            parts.append(part)
            if level + 1 < self.levels:
                values = values - part
        return parts


def levels_of(n: int, dtype: torch.dtype, lightest: float = 1.0) -> int:
    """How many levels `Grid.of` has."""
    return _digits(n, dtype, lightest)[2]


def _digits(n: int, dtype: torch.dtype, lightest: float) -> tuple[int, int, int]:
    """Bits that a level of a grid tells apart, bits that sums of ``n`` terms are to have, and levels for them."""
    bits = 51 - math.ceil(math.log2(n + 1))
    levels = 1 if bits >= _DIGITS[dtype] + _GUARD else 2
    digits = min(_DIGITS[dtype] + _GUARD, levels * bits)
    return bits, digits, max(levels, math.ceil((digits - math.log2(lightest)) / bits))


def total(values: torch.Tensor, weights: torch.Tensor | None = None, block: Block | None = None) -> float:
    """The sum of finite float64 values (n,), times weights of any unit, free of any order; within 2**-50 of its largest
    term times n. With a block, the sum over the rows of all processes."""
    if weights is not None:
        unit = power_of_two(weights, block)
        return total(values * (weights / unit), None, block) * unit
    return totals(values[None], block)[0]


def totals(values: torch.Tensor, block: Block | None = None) -> list[float]:
    """The `total` of each row of finite float64 values (r, n)."""
    block = block or Block.alone(values.shape[1])
    grid = Grid.of(block.max(torch.maximum(-values.amin(1), values.amax(1))), block.n, torch.float64)
    parts = values.new_zeros(grid.levels, len(values))
    for some in values.split(max(1, _TOTAL_VALUES // len(values)), 1):
        parts += torch.stack([part.sum(0) for part in grid.split(some.t())])
    return [sum(levels) for levels in block.sum(parts).t().tolist()]
