"""Passes: the run's images through its network, as often as the plan wants, with the same activations each time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from torch import Tensor

from gpuclust.arithmetic import seeded
from gpuclust.capture.batches import Batch
from gpuclust.capture.layers import Layer
from gpuclust.capture.models import Network
from gpuclust.capture.pixels import Pixels
from gpuclust.capture.stream import ActivationStream
from gpuclust.errors import users_code
from gpuclust.profile import each

Write = Callable[[Layer, int, Tensor], None]


class Passes:
    """Forward passes of all images, or of some batches of them.

    Parameters
    ----------
    network : Network
        On its device.
    pixels : Pixels
        The images, in batches that are the same in every pass.
    seed : int
        Of a network that draws random numbers: each batch has its own, the same in every pass.
    """

    def __init__(self, network: Network, pixels: Pixels, seed: int) -> None:
        self.network, self.pixels, self.seed = network, pixels, seed

    def first(self, layers: Sequence[Layer], write: Write) -> Generator[Batch, None, None]:
        """The first pass, in which the images are decoded: yields each batch once it has been through the network.

        ``write(layer, start, activation)`` gets the activation ``(b, *layer.shape)`` of the images from ``start`` on,
        for each layer, and must copy it before it returns.
        """
        with ActivationStream(self.network.module, layers) as stream, closing(self.pixels.first()) as batches:
            for start, images, batch in each("decode", batches):
                if layers:
                    self._forward(stream, start // self.pixels.batch_size, start, images, write)
                del images
                yield batch

    def again(
        self, layers: Sequence[Layer], write: Write, wanted: Sequence[int] | None = None
    ) -> Generator[range, None, None]:
        """A later pass over all batches, or those of these numbers: yields the numbers of each one's images."""
        with ActivationStream(self.network.module, layers) as stream, closing(self.pixels.again(wanted)) as batches:
            for index, start, images in each("decode", batches):
                self._forward(stream, index, start, images, write)
                count = len(images)
                del images
                yield range(start, start + count)

    def activations(
        self, layer: Layer, wanted: Sequence[int] | None = None
    ) -> Generator[tuple[int, int, Tensor], None, None]:
        """A later pass up to one layer: (number of the batch, first image, activation (b, *layer.shape)) of each.

        The activation is the network's own tensor, which nothing overwrites any more since the pass ends there.
        """
        found: list[Tensor] = []
        with closing(self.again([layer], lambda _, __, activation: found.append(activation), wanted)) as batches:
            for images in batches:
                yield images.start // self.pixels.batch_size, images.start, found.pop()

    def _forward(self, stream: ActivationStream, index: int, start: int, images: Tensor, write: Write) -> None:
        with users_code(f"{self.network.name} on {len(images)} images raised"), seeded(self.seed + index):
            stream.forward(images, lambda layer, activation: write(layer, start, activation))
