"""The demonstration's pictures: 10 classes x 100 test images of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

IMAGES = Path(__file__).parent / "data" / "images.safetensors"


class DemoDataset(Dataset[tuple[Image.Image, int]]):
    """The first 100 images of each class of Fashion-MNIST's test set, in the order of the test set.

    Items are (grey picture of 28 x 28 pixels, label). Fashion-MNIST is Copyright (c) 2017 Zalando SE, under the MIT
    licence in ``data/LICENSE-fashion-mnist``.

    Attributes
    ----------
    classes : tuple of str
        Names of the labels.
    targets : list of int
        The label of each item.
    positions : list of int
        The place of each item in the test set's 10,000 images.
    """

    classes = CLASSES

    def __init__(self) -> None:
        stored = load_file(IMAGES)
        self.pixels = stored["images"].numpy()
        self.targets: list[int] = stored["labels"].tolist()
        self.positions: list[int] = stored["positions"].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]
