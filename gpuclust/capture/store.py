"""LayerStore: the activations of one layer as the rows of one tensor, allocated once and filled in place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gpuclust.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_LIMIT = 65504.0  # the largest finite float16
# A fresh scale puts the largest magnitude into [2^13, 2^14): two doublings before it must be lowered.
HALF_HEADROOM = 13


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

    Attributes
    ----------
    scale : float
        A power of two: the rows hold ``activations * scale``. 1.0 but for float16, where the first batch that is
        not all zero sets it and a later batch that would overflow lowers it (the rows there are rescaled, exact but
        for subnormals).

    Notes
    -----
    NaN and infinity are an `InputError` that names image and value: on the CPU in the `append` that brought them,
    on other devices, where reading a flag stalls the device, in `finish` (float16 reads its range, hence finds
    them, at once).
    """

    resident = True

    def __init__(
        self, n: int, d: int, dtype: torch.dtype, device: torch.device | str, *, name: str = "the layer"
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"rows are stored as {', '.join(map(str, DTYPES))}; got {dtype}")
        if n < 1 or d < 1:
            raise InputError(f"a store has at least one row and one value per row; got n={n}, d={d}")
        self.name = name
        self.n = n
        self.scale = 1.0
        self.filled = 0
        self._scaled = False
        self._buffer = torch.empty((n, d), dtype=dtype, device=device)
        self._checksum = torch.zeros((), dtype=torch.float32, device=device)

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
        # The rows seen in the activations' own shape: one strided copy, whatever their memory format.
        place = rows.view(activations.shape)
        if self.dtype == torch.float16:
            self._fit_scale(activations)
        if self.scale == 1.0:
            place.copy_(activations)
        else:
            torch.mul(activations.float(), self.scale, out=place)
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

    def _fit_scale(self, activations: Tensor) -> None:
        low, high = torch.aminmax(activations)
        largest = max(-low.item(), high.item())
        if not math.isfinite(low.item() + high.item()):
            self._refuse(activations.reshape(activations.shape[0], -1), self.filled)
        if largest == 0.0 or (self._scaled and largest * self.scale <= HALF_LIMIT):
            return
        # The exponent is bounded so that the scale and its inverse are normal float32 numbers.
        exponent = max(-126, min(126, HALF_HEADROOM + 1 - math.frexp(largest)[1]))
        scale = 2.0**exponent
        if self._scaled:
            self.rows.mul_(scale / self.scale)
        self.scale, self._scaled = scale, True

    def _require_finite(self, start: int) -> None:
        for index in range(start, self.filled):
            if not bool(self._buffer[index].isfinite().all()):
                self._refuse(self._buffer[index : index + 1], index)

    def _refuse(self, rows: Tensor, start: int) -> None:
        row, column = (int(index) for index in (~rows.isfinite()).nonzero()[0])
        raise InputError(
            f"{self.name}: the network's activation of image {start + row}, value {column}, is "
            f"{rows[row, column].item()} in {rows.dtype}; check the weights and the transform, or leave this layer out "
            f"with --layers{'' if rows.dtype == torch.float32 else ', or use --dtype float32'}"
        )
