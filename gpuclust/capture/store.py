"""LayerStore: the activations of one layer as the rows of one tensor, allocated once and filled in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from gpuclust.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_LIMIT = 65504.0  # the largest finite float16
# A fresh scale puts the largest magnitude into [2^13, 2^14): two doublings before it must be lowered.
HALF_HEADROOM = 13


class Scale:
    """The power of two that the rows of a layer are multiplied with so that they fit float16; 1 for other types.

    Attributes
    ----------
    value : float
        It puts the largest magnitude of the first batch that is not all zero into [2**13, 2**14); a later batch that
        would overflow lowers it, and the rows that are there are multiplied with the ratio.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._known = False

    def fit(self, largest: float) -> float:
        """Make room for a finite magnitude: the ratio by which the rows that are there must be multiplied."""
        if largest == 0.0 or (self._known and largest * self.value <= HALF_LIMIT):
            return 1.0
        # The exponent is bounded so that the scale and its inverse are normal float32 numbers.
        exponent = max(-126, min(126, HALF_HEADROOM + 1 - math.frexp(largest)[1]))
        before, self.value = self.value, 2.0**exponent
        ratio = self.value / before if self._known else 1.0
        self._known = True
        return ratio


def put_rows(activations: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Write activations ``(b, ...)`` times ``scale`` into rows ``(b, d)``, flattened in C order of their shape."""
    # The rows seen in the activations' own shape: a strided copy, whatever their memory format.
    place = rows.view(activations.shape)
    if scale == 1.0:
        place.copy_(activations)
    elif activations.device == place.device:
        torch.mul(activations.float(), scale, out=place)
    else:
        place.copy_(activations.float() * scale)


def largest_finite(activations: Tensor, start: int, name: str, dtype: torch.dtype) -> float:
    """The largest magnitude of activations ``(b, ...)``, of which the first is that of image ``start``.

    Raises
    ------
    InputError
        If one of them is NaN or infinite.
    """
    low, high = torch.aminmax(activations)
    largest = max(-low.item(), high.item())
    if not math.isfinite(low.item() + high.item()):
        refuse(activations.reshape(activations.shape[0], -1), start, name, dtype)
    return largest


def refuse(rows: Tensor, start: int, name: str, dtype: torch.dtype) -> NoReturn:
    """Raise for rows ``(b, d)`` with NaN or infinity, of which the first is that of image ``start``."""
    row, column = (int(index) for index in (~rows.isfinite()).nonzero()[0])
    raise InputError(
        f"{name}: the network's activation of image {start + row}, value {column}, is "
        f"{rows[row, column].item()} in {rows.dtype}; check the weights and the transform, or leave this layer out "
        f"with --layers{'' if dtype == torch.float32 else ', or use --dtype float32'}"
    )


class LayerStore:
    """The rows of one layer: one ``(n, d)`` tensor on one device, uninitialised until appended to.

    Parameters
    ----------
    n, d
        Rows (images) that will be appended, and values of one row.
    dtype
        ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``, of the stored rows.
    device
        Where the rows live.
    name
        The layer's name, for messages.
    place : Callable, optional
        Makes the ``(n, d)`` tensor where it is not a usual one: page-locked, or in a file.

    Attributes
    ----------
    scale : float
        A power of two: the rows hold ``activations * scale``. 1.0 but for float16; see `Scale`. Where it is lowered
        the rows there are rescaled, exact but for subnormals.

    Notes
    -----
    NaN and infinity are an `InputError` that names image and value: on the CPU in the `append` that brought them,
    on other devices, where reading a flag stalls the device, in `finish` (float16 reads its range, hence finds
    them, at once).
    """

    resident = True

    def __init__(
        self,
        n: int,
        d: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        name: str = "the layer",
        place: Callable[[int, int, torch.dtype], Tensor] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"rows are stored as {', '.join(map(str, DTYPES))}; got {dtype}")
        if n < 1 or d < 1:
            raise InputError(f"a store has at least one row and one value per row; got n={n}, d={d}")
        self.name = name
        self.n = n
        self.filled = 0
        self._scale = Scale()
        self._buffer = place(n, d, dtype) if place else torch.empty((n, d), dtype=dtype, device=device)
        self._checksum = torch.zeros((), dtype=torch.float32, device=self._buffer.device)

    @property
    def scale(self) -> float:
        return self._scale.value

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d)``; after `finish`, n is the number of rows that came."""
        return self.n, self._buffer.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored rows."""
        return self._buffer.dtype

    @property
    def device(self) -> torch.device:
        """The device of the stored rows."""
        return self._buffer.device

    @property
    def rows(self) -> Tensor:
        """The rows appended so far, a view of shape ``(filled, d)``."""
        return self._buffer[: self.filled]

    def append(self, activations: Tensor) -> None:
        """Copy a batch of activations ``(b, ...)`` behind the rows that are there, flattened in C order of their shape.

        Raises
        ------
        InputError
            If the rows are too many or of another width, or if an activation is NaN or infinite.
        """
        if activations.is_quantized:
            activations = activations.dequantize()
        b, d = activations.shape[0], self._buffer.shape[1]
        if activations.numel() != b * d:
            raise InputError(f"{self.name}: rows have {d} values; got activations of shape {tuple(activations.shape)}")
        if self.filled + b > self.n:
            raise InputError(f"{self.name}: the store has room for {self.n} rows; got {self.filled} + {b}")
        rows = self._buffer[self.filled : self.filled + b]
        if self.dtype == torch.float16:
            ratio = self._scale.fit(largest_finite(activations, self.filled, self.name, self.dtype))
            if ratio != 1.0:
                self.rows.mul_(ratio)
        put_rows(activations, rows, self.scale)
        self.filled += b
        # A sum is the cheapest pass that NaN and infinity cannot hide from; finite rows that sum to infinity are
        # cleared below.
        checksum = rows.sum(dtype=torch.float32)
        if self.device.type == "cpu":
            if not math.isfinite(checksum):
                self._require_finite(self.filled - b)
        else:
            self._checksum += checksum * 0.0

    def finish(self) -> None:
        """Close the store at the rows that came.

        Raises
        ------
        InputError
            If no row came, or if one holds NaN or infinity.
        """
        if self.filled == 0:
            raise InputError(f"{self.name}: no activations came")
        if not math.isfinite(self._checksum.item()):
            self._require_finite(0)
        self.n = self.filled

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Views of at most `rows` consecutive rows, in order, each with the index of its first row."""
        if rows < 1:
            raise InputError(f"a chunk has at least one row; got {rows}")
        for start in range(0, self.filled, rows):
            yield start, self._buffer[start : min(start + rows, self.filled)]

    def take(self, index: Tensor) -> Tensor:
        """A copy ``(m, d)`` of the rows at `index` ``(m,)``, integers below the number of rows that came."""
        return self.rows.index_select(0, index)

    def _require_finite(self, start: int) -> None:
        for index in range(start, self.filled):
            if not bool(self._buffer[index].isfinite().all()):
                refuse(self._buffer[index : index + 1], index, self.name, self.dtype)
