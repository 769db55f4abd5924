"""Small networks and folders of pictures for the tests of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from gpuclust.compare.result import COLUMNS

TIMES = ["capture_s", "cluster_s", "peak_bytes"]
CLASSES = ("cat", "dog", "owl")
SIDE_PX = 16


class SmallNet(nn.Module):
    """Two convolutions with in-place ReLU, pooled features and a classifier of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.drop(torch.flatten(self.pool(self.features(images)), 1)))


LAYERS = ["conv1", "conv2", "pool", "fc3"]


def small_net(seed: int = 0) -> SmallNet:
    """The same network for the same seed, in train mode as a constructor leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallNet()


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as the network's input ``(3, 16, 16)``, 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("RGB").resize((SIDE_PX, SIDE_PX)))).permute(2, 0, 1).float() / 255


def build() -> tuple[SmallNet, object]:
    """What ``cases_run:build`` means on the command line."""
    return small_net(), to_tensor


def picture(label: int, index: int) -> Image.Image:
    """Noise around a colour of the class, so that clusters and classes agree in part."""
    rng = np.random.default_rng([label, index])
    colour = 90 + 60 * np.eye(3)[label % 3] + 15 * (label // 3)
    return Image.fromarray(np.clip(colour + rng.normal(0, 50, (24, 24, 3)), 0, 255).astype(np.uint8))


def write_folder(root: Path, classes: Sequence[str] = CLASSES, per_class: int = 8) -> Path:
    """A folder of class folders with PNGs."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            picture(label, index).save(root / name / f"{index:02d}.png")
    return root


def results(folder: Path) -> tuple[str, bytes]:
    """What two equal runs have in common: layers.csv without times and memory, and assignments.parquet to the byte."""
    layers = pandas.read_csv(folder / "layers.csv")
    assert list(layers.columns) == COLUMNS
    return layers.drop(columns=TIMES).to_csv(), (folder / "assignments.parquet").read_bytes()


class Pictures(Dataset[tuple[Tensor, int]]):
    """The same pictures as tensors; counts how many were read."""

    classes = CLASSES

    def __init__(self, per_class: int = 8) -> None:
        self.per_class = per_class
        self.targets = [label for label in range(len(CLASSES)) for _ in range(per_class)]
        self.read = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        label = self.targets[index]
        return to_tensor(picture(label, index - label * self.per_class)), label
