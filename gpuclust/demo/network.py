"""DemoNet: AlexNet's shape on grey pictures of 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

SIDE_PX = 28
# Of the pixels of Fashion-MNIST's 60,000 training images, where white is 1.
MEAN, STD = 0.2860, 0.3530

WEIGHTS = Path(__file__).parent / "data" / "demonet.safetensors"


class DemoNet(nn.Module):
    """Five convolutions, two fully connected layers and a classifier, with AlexNet's pooling, ReLU and dropout.

    From ``(b, 1, 28, 28)``, as `to_input` makes it, to ``(b, 10)`` logits. 348,906 parameters.
    """

    def __init__(self, classes: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2),
            nn.Conv2d(64, 96, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(96, 64, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(64 * 3 * 3, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(256, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(b, classes)`` of images ``(b, 1, 28, 28)``."""
        return self.classifier(torch.flatten(self.features(images), 1))


def load_trained() -> DemoNet:
    """The network with the weights of the wheel, in eval mode."""
    network = DemoNet()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def to_input(picture: Image.Image) -> Tensor:
    """A picture, grey or coloured, as the network's input ``(1, 28, 28)``.

    Colours become grey (a grey picture in mode RGB the same values as in mode L), and other sizes are resized.
    """
    grey = picture.convert("L")
    if grey.size != (SIDE_PX, SIDE_PX):
        grey = grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return normalise(torch.from_numpy(np.array(grey))[None])


def normalise(pixels: Tensor) -> Tensor:
    """Pixels 0..255 as float32 of mean 0 and variance 1 over the training images."""
    return (pixels.float() / 255 - MEAN) / STD
