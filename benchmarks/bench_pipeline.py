"""What capturing costs, from tensors and from files, beside the bare forward pass; and how it grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms._presets import ImageClassification

from gpuclust import analyze, plan
from gpuclust.arithmetic import full_precision
from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.capture.layout import in_memory_order
from gpuclust.capture.store import LayerStore
from gpuclust.capture.stream import ActivationStream
from gpuclust.config import Options
from gpuclust.peak import PeakMemory
from gpuclust.prepare import find_images, find_network, prepare

IMAGES = 256
BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = 9
# Images of a pass over files, and how often it is timed.
PICTURES, FILE_ROUNDS = 96, 5
LEAST_RATIO = 0.85  # of images/s, on the CPU


def test_alexnet(device: torch.device, in_turn: Callable, record: Callable) -> None:
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval().to(device)
    batches = torch.randn(IMAGES, 3, 224, 224).to(device).split(BATCH[device.type])
    layers = choose_layers(find_layers(network, batches[0][:1]), ["auto"])

    def bare() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([network(batch) for batch in batches])

    def capture() -> dict[str, LayerStore]:
        stores = {layer.name: LayerStore(IMAGES, layer.values, torch.float32, device) for layer in layers}
        with ActivationStream(network, layers) as stream:
            for batch in batches:
                stream.forward(batch, lambda layer, activation: stores[layer.name].append(activation))
        for store in stores.values():
            store.finish()
        return stores

    stores = capture()
    assert sum(store.shape[1] for store in stores.values()) == 494_184
    with full_precision(device):  # the stream's; CUDA's default is TF32 in convolutions
        assert torch.equal(stores["fc8"].rows, bare())
        conv1 = network.features[:2](batches[-1])
    assert torch.equal(stores["conv1"].rows[-len(conv1) :], conv1.flatten(1))
    del stores, conv1

    capture_s, bare_s = in_turn(capture, bare, ROUNDS, warmup=1)
    case = f"AlexNet auto, {IMAGES} images, float32, batch {BATCH[device.type]}"
    record(case, "bare forward pass", bare_s, images_per_s=IMAGES / median(bare_s))
    row = record(
        case, "capture", capture_s, bare_s, beside="bare forward pass", images_per_s=IMAGES / median(capture_s)
    )
    if device.type == "cpu":
        ratio = min(row["ratio"], row["ratio_of_medians"])
        assert ratio >= LEAST_RATIO, f"capturing reaches {ratio:.3f} of the bare forward pass's images/s"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of JPEGs as a camera makes them: 4 x `PICTURES` of 320 x 256 pixels, smooth with some noise."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for index in range(2 * PICTURES):
            small = rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((320, 256), Image.Resampling.BICUBIC)
            noise = rng.integers(-8, 8, (256, 320, 3)) + 20 * label
            pixels = np.clip(np.asarray(picture, np.int16) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:04d}.jpg", quality=90)
    return root


@pytest.mark.parametrize(("name", "count"), [("alexnet", PICTURES), ("resnet18", PICTURES), ("vgg16", PICTURES // 4)])
@pytest.mark.parametrize("kept", [False, True], ids=["decoded", "kept"])
@pytest.mark.parametrize("same_format", [False, True], ids=["as it comes", "same format"])
def test_a_pass_over_files(
    name: str,
    count: int,
    kept: bool,
    same_format: bool,
    pictures: Path,
    device: torch.device,
    in_turn: Callable,
    record: Callable,
) -> None:
    """From files (or images kept as bytes by a pass before) to rows in their stores, beside the bare forward pass.

    That is the network as it comes, or with its inputs in the memory format that the capture chose for them.
    """
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    settings = Options(device=str(device), per_class=count // 2)
    images = find_images(pictures, settings)
    model = find_network((network, ImageClassification(crop_size=224)), images, settings)
    with prepare(model, images, settings) as setup:
        layers, last = setup.layers, setup.forward.channels_last
        passes = setup.capture(list).passes
        pixels = passes.pixels
        pixels.keep = kept
        stores: dict[str, LayerStore] = {}

        def write(layer: Layer, _: int, activation: Tensor) -> None:
            stores[layer.name].append(in_memory_order(activation, layer.name in last))

        def capture() -> None:
            stores.clear()
            for layer in layers:
                stores[layer.name] = LayerStore(count, layer.values, torch.float32, device, name=layer.name)
            for _ in passes.again(layers, write) if kept else passes.first(layers, write):
                pass

        inputs = [batch for _, batch, _ in pixels.first()]

        def bare() -> None:
            with torch.no_grad(), full_precision(device):
                for batch in inputs:
                    network(batch)

        case = f"{name} auto, {count} JPEGs of 320 x 256, float32, batch {setup.batch_size}"
        what = "pass over images kept as bytes" if kept else "pass over files"
        beside = "bare forward pass"
        if same_format:
            beside += f", {str(pixels.memory_format).removeprefix('torch.')}"
        else:
            inputs = [batch.contiguous() for batch in inputs]
        capture_s, bare_s = in_turn(capture, bare, FILE_ROUNDS, warmup=1)
        record(case, beside, bare_s, images_per_s=count / median(bare_s))
        record(case, what, capture_s, bare_s, beside=beside, images_per_s=count / median(capture_s))


@pytest.mark.parametrize("times", [1, 2, 4])
def test_cost_grows_with_the_images(
    times: int, pictures: Path, device: torch.device, in_turn: Callable, record: Callable
) -> None:
    """Whole runs of 1x, 2x and 4x images: seconds, and the peak of memory beside the plan's (without its reserve)."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    model = network, ImageClassification(crop_size=224)
    options: dict[str, Any] = {"layers": "conv3,conv5,fc6", "device": str(device), "per_class": times * PICTURES // 2}

    def run() -> None:
        analyze(model, pictures, **options)

    run_s, _ = in_turn(run, lambda: None, 3, warmup=0)
    planned = plan(model, pictures, **options)
    watched = PeakMemory(device, by_torch=True)
    run()
    record(
        f"AlexNet conv3, conv5, fc6, {times * PICTURES} JPEGs",
        "run",
        run_s,
        images_per_s=times * PICTURES / median(run_s),
        peak_bytes=watched.peak_bytes(),
        note=f"planned {planned.total_bytes - planned.room.reserve_bytes}",
    )
