"""What capturing costs: every auto layer of AlexNet into its store, beside the bare forward pass."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torchvision

from gpuclust.arithmetic import full_precision
from gpuclust.capture.layers import choose_layers, find_layers
from gpuclust.capture.store import LayerStore
from gpuclust.capture.stream import ActivationStream

IMAGES = 256
BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = 9
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
