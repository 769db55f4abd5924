"""Fewer values of a layer before its rows are stored, where the user asks for it: pooled, or randomly projected.

Pooling leaves one value per channel. The shape of one image's activation decides what that is: of (c, h, w), and of any
more dimensions, the mean (or the largest) over all but the first; of tokens (t, c), as transformers have them, over the
tokens, leaving c; (c,) has nothing to pool and stays. A network that keeps channels last (Swin's blocks, (h, w, c)) is
pooled over what its shape says all the same: the report names the positions, and a sketch asks for no order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpuclust.capture.layers import Layer, choose_layers
from gpuclust.capture.projection import BLOCKS, Projection, projection_bytes
from gpuclust.errors import InputError

KINDS = "avgpool, maxpool, sketch:M, none"


@dataclass(frozen=True)
class Reduction:
    """What is done to the activations of a layer before they are rows.

    Attributes
    ----------
    kind : str
        ``avgpool``, ``maxpool``, ``sketch`` or ``none``.
    m : int
        Values that a sketch leaves; a layer of no more than these stays as it is.
    seed : int
        Of a sketch.
    """

    kind: str = "none"
    m: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return f"sketch:{self.m}" if self.kind == "sketch" else self.kind

    def values(self, shape: Sequence[int]) -> int:
        """Values that are left of an activation of this shape (of one image)."""
        d = math.prod(shape)
        if self.kind == "sketch":
            return min(d, self.m)
        return d if self.kind == "none" else d // math.prod(self._positions(shape))

    def changes(self, shape: Sequence[int]) -> bool:
        """Whether anything is done to an activation of this shape."""
        if self.kind == "sketch":
            return math.prod(shape) > self.m
        return self.kind != "none" and len(shape) > 1

    @property
    def stated(self) -> float | None:
        """The rms relative error of a squared distance that a sketch is stated to have at most; None for others."""
        return math.sqrt(2 / self.m) if self.kind == "sketch" else None

    def describe(self, shape: Sequence[int]) -> str:
        """For a report: what is done to an activation of this shape, how many values are left, and at which price."""
        d = math.prod(shape)
        if self.kind == "none":
            return f"all {d:,} values"
        if not self.changes(shape):
            return f"{self} leaves the layer as it is: " + (
                f"it has {d:,} values" if self.kind == "sketch" else f"its {d:,} values have no positions"
            )
        left = f"{self.values(shape):,} of {d:,} values"
        if self.stated is not None:
            return (
                f"{left}, a random projection (seed {self.seed}): squared distances are right on average over seeds, "
                f"within {100 * self.stated:.2g} % rms"
            )
        over = " x ".join(map(str, self._positions(shape)))
        return f"{left}, the {'mean' if self.kind == 'avgpool' else 'largest'} over {over} positions"

    def on(self, shape: Sequence[int], device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """What reduces a batch (b, *shape) on a device to (b, values), in float32 or, of float64, in float64.

        A sketch has the same bits for a row in any batch, of any strides, on any device. A pool has those of torch's
        own mean, which may depend on the size of the batch. Where nothing `changes`, batches come back as they are.
        """
        if not self.changes(shape):
            return _unchanged
        if self.kind == "sketch":
            return Projection(math.prod(shape), self.m, self.seed, device)
        dims = (1,) if len(shape) == 2 else tuple(range(2, len(shape) + 1))
        return _mean(dims) if self.kind == "avgpool" else _largest(dims)

    def work_bytes(self, shape: Sequence[int], batch: int, itemsize: int, device: str) -> int:
        """Bytes that `on` and what it returns hold on the device for a batch, at most; ``itemsize`` is of the
        activations, ``device`` the type, "cpu" or "cuda"."""
        if not self.changes(shape):
            return 0
        d = math.prod(shape)
        if self.kind == "sketch":
            return sum(projection_bytes(d, self.m, batch, itemsize, device))
        # On the CPU torch's mean of half precision makes a float32 copy.
        copy = 4 * batch * d if self.kind == "avgpool" and device == "cpu" and itemsize < 4 else 0
        return batch * self.values(shape) * (itemsize + max(4, itemsize)) + copy

    def _positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """What is pooled over."""
        return (shape[0],) if len(shape) == 2 else tuple(shape[1:])


@dataclass(frozen=True)
class Reductions:
    """What the user chose, in the order given: pattern (as of `choose_layers`) and reduction; later ones win."""

    rules: tuple[tuple[str, Reduction], ...] = ()

    def choose(self, layers: Sequence[Layer]) -> dict[str, Reduction]:
        """The reduction of each layer, by name.

        Raises
        ------
        InputError
            For a pattern that none of the layers fits, with close names.
        """
        chosen = {layer.name: Reduction() for layer in layers}
        for pattern, reduction in self.rules:
            try:
                fitting = choose_layers(layers, [pattern])
            except InputError as error:
                raise InputError(f"--reduce {pattern}={reduction}: {error}") from None
            chosen |= {layer.name: reduction for layer in fitting}
        return chosen


def parse_reductions(texts: Sequence[str], seed: int = 0) -> Reductions:
    """What ``--reduce`` was given: each ``KIND`` for all layers, or ``PATTERN=KIND``; later ones win.

    ``KIND`` is ``avgpool``, ``maxpool``, ``sketch:M`` with M a multiple of 8, or ``none``.

    Raises
    ------
    InputError
        For anything else.
    """
    rules = []
    for text in texts:
        pattern, equals, kind = text.rpartition("=")
        if equals and not pattern.strip():
            raise InputError(f"--reduce takes KIND or PATTERN=KIND, as conv*=avgpool; got {text!r}")
        rules.append((pattern.strip() if equals else "all", _parse(kind.strip(), text, seed)))
    return Reductions(tuple(rules))


def _parse(kind: str, text: str, seed: int) -> Reduction:
    if kind in ("avgpool", "maxpool", "none"):
        return Reduction(kind)
    sketch = re.fullmatch(r"sketch:(\d+)", kind)
    if not sketch:
        raise InputError(f"--reduce takes KIND or PATTERN=KIND, with a kind of {KINDS}; got {text!r}")
    m = int(sketch[1])
    if m < BLOCKS or m % BLOCKS:
        near = max(BLOCKS, round(m / BLOCKS) * BLOCKS)
        raise InputError(f"a sketch has a multiple of {BLOCKS} values: sketch:{near}, not {text!r}")
    return Reduction("sketch", m, seed)


def _unchanged(activations: Tensor) -> Tensor:
    return activations


def _mean(dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def pool(activations: Tensor) -> Tensor:
        # Half precision is summed in float32 as it is read: no copy of it.
        wide = torch.float64 if activations.dtype == torch.float64 else torch.float32
        return activations.mean(dims, dtype=wide)

    return pool


def _largest(dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def pool(activations: Tensor) -> Tensor:
        largest = activations.amax(dims)
        return largest if largest.dtype == torch.float64 else largest.float()

    return pool
