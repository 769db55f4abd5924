"""Rows that change between two passes are an error and not a result: a checksum of rows, and a sample of them."""

from __future__ import annotations

import numpy as np
import torch

from gpuclust.cluster.sources.base import ChunkSource, block_rows
from gpuclust.errors import InputError

# Values of a sample of resident rows, and the rows that it has at least.
_SAMPLED_VALUES, _SAMPLED_ROWS = 1 << 13, 4
# Words of a row that are multiplied at a time: what is on the way takes 16 bytes for each.
_PIECE = 1 << 16


class Checksum:
    """A 64-bit sum over the bits of rows, their places in the row and their numbers.

    It is the same for any chunks and on any device: whole numbers are added, modulo 2**64. A row's words are multiplied
    with odd random numbers, one for each place in a piece of the row and one for each piece, and added; the upper half
    of that is mixed into the lower (a row of whole numbers has zeros there), times the odd number of the row. Two data
    sets that were not made for it have the same sum once in some 2**60 cases.

    Parameters
    ----------
    d : int
    step : int
        Only rows whose number is a multiple of it count: the price falls by as much, and a change of one row is
        mostly missed, where a change of all rows, or of their order, is not.
    """

    def __init__(self, d: int, step: int = 1) -> None:
        self.d, self.step = d, step
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sum: torch.Tensor | None = None

    def add(self, start: int, x: torch.Tensor) -> None:
        """Add the rows ``x`` (b, d), floating, which begin at row ``start``."""
        first = -start % self.step
        # In words of at most 32 bits: a product keeps what the lowest bits of a word and the highest have to say.
        half = torch.int16 if x.element_size() == 2 else torch.int32
        size = block_rows(self.d, x.device) * self.step
        for begin in range(first, x.shape[0], size):
            rows = x[begin : begin + size : self.step]
            # A dimension of one may have any stride, which words of another size do not put up with.
            words = rows.contiguous().as_strided(rows.shape, (self.d, 1)).view(half)
            pieces = words.split(_PIECE, 1)
            if self._factors is None or self._sum is None:
                odd = _odd(_PIECE + len(pieces)).to(x.device)
                self._factors = odd[:_PIECE], odd[_PIECE:]
                self._sum = torch.zeros((), dtype=torch.int64, device=x.device)
            places, factors = self._factors
            row = torch.zeros(len(words), dtype=torch.int64, device=x.device)
            for piece, factor in zip(pieces, factors, strict=True):
                row += (piece.long() * places[: piece.shape[1]]).sum(1) * factor
            row ^= row >> 29
            number = torch.arange(len(row), device=x.device) * self.step + (start + begin)
            self._sum += (row * (2 * number + 1)).sum()

    def value(self) -> int:
        """The sum so far; waits for the device."""
        return 0 if self._sum is None else int(self._sum.item())


class Unchanged:
    """What the first pass over rows found, which every later pass must find again."""

    def __init__(self, d: int, step: int = 1) -> None:
        self._d, self._step = d, step
        self._first: int | None = None

    def begin(self) -> Checksum:
        """The empty sum of one pass."""
        return Checksum(self._d, self._step)

    def compare(self, checksum: Checksum) -> None:
        """Keep the sum of the first whole pass; compare a later one with it.

        Raises
        ------
        InputError
            If they differ.
        """
        value = checksum.value()
        if self._first is None:
            self._first = value
        else:
            require_unchanged(value == self._first)


class Sample:
    """Some rows of a source that lie on the device, spread over all of them, as they were when this was made.

    Rows that are streamed have a checksum of their own: of these nothing is kept.
    """

    def __init__(self, source: ChunkSource) -> None:
        self._source, self._rows = source, torch.empty(0)
        if source.resident:
            (n, d), device = source.shape, source.device
            count = min(n, max(_SAMPLED_ROWS, _SAMPLED_VALUES // d))
            self._index = torch.arange(count, device=device) * (n - 1) // max(1, count - 1)
            self._rows = self._taken()

    def require_unchanged(self) -> None:
        """Compare with the same rows as they are now; waits for the device.

        Raises
        ------
        InputError
            If a bit of them is another.
        """
        if self._source.resident:
            require_unchanged(torch.equal(self._taken(), self._rows))

    def _taken(self) -> torch.Tensor:
        return self._source.take(self._index).flatten().view(torch.uint8)


def require_unchanged(same: bool) -> None:
    """Raise what a pass says that found other rows than one before.

    Raises
    ------
    InputError
        If they are not the ``same``.
    """
    if not same:
        raise InputError(
            "X changed between two passes: its rows are not those of the first pass, in the same order. X is read "
            "many times, so nothing may shuffle, augment or overwrite it meanwhile"
        )


def _odd(count: int) -> torch.Tensor:
    """Odd random numbers, always the same: int64 (count,)."""
    bits = np.random.Philox(key=[0, 0]).random_raw(count) | np.uint64(1)
    return torch.from_numpy(bits.view(np.int64))
