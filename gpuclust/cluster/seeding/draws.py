"""Random numbers that depend on the seed, the restart and the number of a row alone: Philox, Salmon et al., SC 2011."""

from __future__ import annotations

import math

import numpy as np

# Numbers of 64 bits that Philox makes of each value of its counter.
_PER_COUNT = 4


def trials(k: int) -> int:
    """Rows that greedy k-means++ tries in each step for ``k`` clusters, as scikit-learn does."""
    return 2 + int(math.log(k))


class RandomBits:
    """Uniform 64-bit numbers of one restart; numpy promises that its raw bits stay the same."""

    def __init__(self, seed: int, restart: int) -> None:
        self._bits = np.random.Philox(key=[seed % 2**64, restart])

    def below(self, limit: int, count: int) -> list[int]:
        """``count`` whole numbers, uniform in ``0 .. limit - 1`` (all 0 where ``limit`` is 0)."""
        return [int(raw) * limit >> 64 for raw in self._bits.random_raw(count)]

    def keys(self, weights: np.ndarray | None, first: int, count: int) -> np.ndarray:
        """A number for each of ``count`` rows from row ``first`` on: in their order the rows are in random order.

        Heavier rows tend to be earlier; those of weight 0 come last. To be called first of all, and once.
        """
        self._bits.advance(first // _PER_COUNT)
        raw = self._bits.random_raw(first % _PER_COUNT + count)[first % _PER_COUNT :]
        uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53
        if weights is None:
            return uniform
        with np.errstate(divide="ignore"):
            return -np.log(uniform) / weights
