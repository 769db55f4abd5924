"""Recomputed: the rows of a layer that fit nowhere; each pass over them is a forward pass of all images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from gpuclust.capture.layers import Layer
from gpuclust.capture.layout import in_memory_order
from gpuclust.capture.passes import Passes
from gpuclust.capture.reduce import Reduction
from gpuclust.capture.store import Scale, largest_finite, put_rows
from gpuclust.cluster.sources.checksum import Unchanged

# Every so many rows count for the checksum that tells whether a pass gave what the first one gave.
_SAMPLED = 8


class Recomputed:
    """A chunk source (`gpuclust.cluster.sources.base.ChunkSource`) with the bits that `LayerStore` would hold.

    Parameters
    ----------
    passes : Passes
        After its first pass.
    layer : Layer
    dtype : torch.dtype
        Of the rows.
    reduction : Reduction
        What is kept of an activation.
    pass_s : float
        What a pass is predicted to take, in seconds.
    channels_last : bool
        Whether the activations lie in memory so; see `in_memory_order`.

    Attributes
    ----------
    scale : float
        The rows hold ``activations * scale``, as in `LayerStore`; float16 rows cost a pass to find it.
    """

    resident = False

    def __init__(
        self,
        passes: Passes,
        layer: Layer,
        dtype: torch.dtype,
        reduction: Reduction,
        pass_s: float,
        *,
        channels_last: bool = False,
    ) -> None:
        self._channels_last = channels_last
        self.layer, self.dtype, self.pass_s = layer, dtype, pass_s
        self.shape = passes.pixels.n, reduction.values(layer.shape)
        self.device = torch.empty(0, device=passes.pixels.device).device
        self._passes, self._reduce = passes, reduction.on(layer.shape, self.device)
        self._unchanged = Unchanged(self.shape[1], 1 if self.device.type == "cuda" else _SAMPLED)
        self._checked = False
        # For each batch, the scale it was stored with and what its rows were multiplied with afterwards.
        self._scales: list[tuple[float, list[float]]] = []
        self.scale = self._find_scale() if dtype == torch.float16 else 1.0

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        checksum = self._unchanged.begin()
        for start, x in self._rows():
            checksum.add(start, x)
            for first in range(0, len(x), rows):
                yield start + first, x[first : first + rows]
        self._checked = True
        self._unchanged.compare(checksum)

    def take(self, index: Tensor) -> Tensor:
        size = self._passes.pixels.batch_size
        out = torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        index = index.to(self.device)
        for start, x in self._rows((index // size).unique().tolist()):
            place = ((index >= start) & (index < start + len(x))).nonzero()[:, 0]
            out[place] = x[index[place] - start]
        return out

    def _rows(self, wanted: list[int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """The rows of all batches, or of those with these numbers, each with the number of the first.

        They are gone when the next is asked for, whoever still refers to them: a forward pass needs the room.
        """
        if wanted == []:
            return
        with closing(self._passes.activations(self.layer, wanted)) as batches:
            for number, start, activation in batches:
                x = self._stored(number, self._reduced(activation))
                del activation
                if not self._checked and self.dtype != torch.float16:
                    largest_finite(x, start, self.layer.name, self.dtype)
                yield start, x
                x.untyped_storage().resize_(0)

    def _reduced(self, activation: Tensor) -> Tensor:
        """What is kept of a batch's activations, in the order of the rows."""
        kept = self._reduce(activation)
        return in_memory_order(kept.dequantize() if kept.is_quantized else kept, self._channels_last)

    def _stored(self, number: int, activation: Tensor) -> Tensor:
        """What is kept of a batch's activations as the rows that are stored."""
        x = torch.empty(len(activation), self.shape[1], dtype=self.dtype, device=self.device)
        scale, ratios = self._scales[number] if self._scales else (1.0, [])
        put_rows(activation, x, scale)
        for ratio in ratios:
            x.mul_(ratio)
        return x

    def _find_scale(self) -> float:
        """A pass that follows what `LayerStore` does to float16 rows; what it did is kept in ``_scales``."""
        scale = Scale()
        with closing(self._passes.activations(self.layer)) as batches:
            for _, start, activation in batches:
                ratio = scale.fit(largest_finite(self._reduced(activation), start, self.layer.name, self.dtype))
                del activation
                if ratio != 1.0:
                    for _, ratios in self._scales:
                        ratios.append(ratio)
                self._scales.append((scale.value, []))
        return scale.value
