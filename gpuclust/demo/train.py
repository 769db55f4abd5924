"""How the demonstration's network was trained, and how its pictures were chosen.

    python -m gpuclust.demo.train FOLDER_WITH_FASHION_MNIST --out FOLDER

reads Fashion-MNIST's four ``*-ubyte.gz`` files and writes ``demonet.safetensors`` and ``images.safetensors``. On one
kind of CPU with one version of torch the same seed and number of threads give the same bits. The test set takes no
part in training: the weights are those of the last step, and the accuracy on the test set is measured once, afterwards.
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gpuclust.demo.dataset import CLASSES, IMAGES
from gpuclust.demo.network import SIDE_PX, WEIGHTS, DemoNet, normalise

PER_CLASS = 100
SHIFT_PX = 2
UBYTE = 8  # IDX's code of unsigned bytes


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in a gzipped IDX file, in the shape that its header states.

    Raises
    ------
    ValueError
        If it isn't an IDX file of unsigned bytes, or not of the size that its header says.
    """
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != bytes((0, 0, UBYTE)) or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ')}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(data) - start} values where its header says {shape}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``(n, 28, 28)`` uint8 and labels ``(n,)`` int64 of ``train`` or ``t10k``.

    Raises
    ------
    FileNotFoundError, ValueError
        If the files aren't there, or aren't what they should be.
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if images.shape != (len(labels), SIDE_PX, SIDE_PX) or labels.ndim != 1:
        raise ValueError(f"{split}: images of shape {tuple(images.shape)} and labels of {tuple(labels.shape)}")
    return images, labels.long()


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` of each class, in their order among all: whatever a network says of them.

    Raises
    ------
    ValueError
        If a class has fewer.
    """
    chosen = [torch.nonzero(labels == label).flatten()[:count] for label in range(len(CLASSES))]
    for name, positions in zip(CLASSES, chosen, strict=True):
        if len(positions) < count:
            raise ValueError(f"{name} has {len(positions)} images, and {count} are wanted")
    return torch.cat(chosen).sort().values


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image ``(b, 1, 28, 28)`` moved by up to `SHIFT_PX` either way (black comes in), half of them mirrored."""
    count = len(images)
    top, left = torch.randint(0, 2 * SHIFT_PX + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(SIDE_PX)
    columns = left + torch.arange(SIDE_PX)
    columns = torch.where(mirror, columns.flip(1), columns)
    black = float(normalise(torch.zeros(1)))
    padded = F.pad(images[:, 0], (SHIFT_PX,) * 4, value=black)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def train(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int,
    peak_rate: float,
    weight_decay: float,
    smoothing: float,
    seed: int,
    report: Callable[[str], None] = print,
) -> DemoNet:
    """A network trained by AdamW, its learning rate rising and falling once (OneCycleLR).

    Parameters
    ----------
    images, labels
        ``(n, 1, 28, 28)`` as `normalise` makes them, and ``(n,)`` int64.
    epochs, batch
        Passes over the images, and images per step (the last of a pass may be smaller).
    peak_rate, weight_decay, smoothing
        Highest learning rate, AdamW's decay, label smoothing.
    seed
        Of the initial weights, the order of the images, the augmentation and the dropout.
    report
        Takes one line per epoch.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DemoNet()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            torch.nn.init.zeros_(parameter)
    network.to(memory_format=torch.channels_last)
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}], lr=peak_rate
    )
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        started = time.perf_counter()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            loss = F.cross_entropy(
                network(augment(images[chosen], generator)), labels[chosen], label_smoothing=smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        seconds = time.perf_counter() - started
        report(f"epoch {epoch + 1}/{epochs}: loss {total / len(images):.4f}, {seconds:.1f} s")
    return network.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def correct(network: DemoNet, images: Tensor, labels: Tensor) -> Tensor:
    """Which images ``(n, 1, 28, 28)`` the network, in eval mode, classifies rightly: bool ``(n,)``."""
    return torch.cat([network(some).argmax(1) for some in images.split(500)]) == labels


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write both files; see the module's own words."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuclust.demo.train", description="Train the network of `gpuclust demo`."
    )
    parser.add_argument("folder", type=Path, help="with Fashion-MNIST's four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.05)
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="test images to keep (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    images, labels = read_split(options.folder, "train")
    test_images, test_labels = read_split(options.folder, "t10k")
    kept = first_of_each_class(test_labels, options.per_class)
    with _reproducible(options.threads):
        recipe = {
            name: getattr(options, name)
            for name in ("epochs", "batch", "peak_rate", "weight_decay", "smoothing", "seed")
        }
        network = train(normalise(images[:, None]), labels, **recipe)
        right = correct(network, normalise(test_images[:, None]), test_labels)
    measured = {
        "test_accuracy": f"{right.float().mean():.4f}",
        "demo_accuracy": f"{right[kept].float().mean():.4f}",
    }
    about = {name: str(value) for name, value in recipe.items()}
    about |= measured | {"threads": str(options.threads), "torch": torch.__version__, "data": "Fashion-MNIST"}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), options.out / WEIGHTS.name, about)
    pictures = {
        "images": test_images[kept],
        "labels": test_labels[kept].to(torch.uint8),
        "positions": kept.to(torch.int32),
    }
    save_file(
        pictures, options.out / IMAGES.name, {"source": "Fashion-MNIST, test set; MIT, Copyright (c) 2017 Zalando SE"}
    )
    print(
        f"accuracy {measured['test_accuracy']} on {len(test_labels)} test images, "
        f"{measured['demo_accuracy']} on the {len(kept)} kept"
    )


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """The same bits every time; torch's settings and random numbers as they were afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True)
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])


if __name__ == "__main__":
    main()
