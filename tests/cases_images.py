"""Small pictures in class folders and data sets, for the tests of image sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from gpuclust.capture.catalog import Catalog
from gpuclust.capture.images import ImageSource


def transform(image: Image.Image) -> torch.Tensor:
    """A picture as a tensor ``(3, 8, 8)``, 0 to 255."""
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()


def write_images(root: Path, sizes: dict[str, int]) -> Path:
    """Class folders of PNGs; the colour of an image is its number and the number of its class."""
    for place, (name, count) in enumerate(sizes.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (10, 12), (i, place, 0)).save(folder / f"{i:02}.png")
    return root


def keys(catalog: Catalog) -> dict[str, list[str]]:
    """All keys of all classes."""
    return {name: list(some) for name, some in catalog.walk(dict.fromkeys(catalog.counts, lambda _: True))}


def run(
    source: ImageSource, batch_size: int = 4, workers: int = 0
) -> tuple[torch.Tensor, np.ndarray, list[str], list[bytes], list[int]]:
    """All of one pass: images, labels, paths, thumbs and the sizes of its batches."""
    batches = list(source.batches(transform, batch_size, workers))
    return (
        torch.cat([batch.images for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        [path for batch in batches for path in batch.paths],
        [thumb for batch in batches for thumb in batch.thumbs],
        [len(batch) for batch in batches],
    )


class Pictures(Dataset[tuple[Image.Image, int]]):
    """PIL images of two classes, or of given labels."""

    def __init__(self, labels: Sequence[int] = (0, 1) * 6, shade: int = 0, bad: Sequence[int] = ()) -> None:
        self.labels, self.shade, self.bad = labels, shade, bad

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            raise OSError("disk")
        return Image.new("L", (5, 5), index + self.shade), self.labels[index]
