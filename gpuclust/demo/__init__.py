"""What ``gpuclust demo`` looks at: a small AlexNet, and a thousand test images of Fashion-MNIST."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

    from gpuclust.demo.dataset import DemoDataset
    from gpuclust.demo.network import DemoNet

__all__ = ["demo_dataset", "demo_network"]


def demo_network() -> tuple[DemoNet, Callable[[Image.Image], Tensor]]:
    """The trained network in eval mode, and its transform: a picture to a tensor ``(1, 28, 28)``."""
    from gpuclust.demo.network import load_trained, to_input

    return load_trained(), to_input


def demo_dataset() -> DemoDataset:
    """The first 100 images of each of the 10 classes of Fashion-MNIST's test set; items are (picture, label)."""
    from gpuclust.demo.dataset import DemoDataset

    return DemoDataset()
