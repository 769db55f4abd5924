"""How inputs and activations lie in memory: where channels last is taken, rows in that order, the results the same."""

from __future__ import annotations

from pathlib import Path

import cases_images
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gpuclust import analyze
from gpuclust.capture.layout import CHANNELS_LAST, CONTIGUOUS, find_memory_format
from gpuclust.capture.memory import Step
from gpuclust.capture.recompute import Recomputed
from gpuclust.config import Options
from gpuclust.prepare import find_images, find_network, prepare

IMAGE = torch.zeros(1, 3, 12, 16)


class Views(nn.Module):
    """Flattens by a view, which no other format than the contiguous one has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 10 * 14, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.fc(maps.view(len(maps), -1))


class Reads(nn.Module):
    """Takes the memory of its activations as it comes, as an extension of a user's own may do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return maps.as_strided((len(maps), maps[0].numel()), (maps[0].numel(), 1))


class Draws(nn.Module):
    """Draws random numbers in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images) + torch.randn(1)


class Turns(nn.Module):
    """Its second and third layers lie in memory as they do without a run, whatever its input does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5 * 8 * 12, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images).contiguous())
        return self.fc(maps.flatten(1))


class Raises(Draws):
    def forward(self, images: Tensor) -> Tensor:
        raise MemoryError


def convolution(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 10 * 14, 5))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (convolution(), CHANNELS_LAST),
        (Draws(), CHANNELS_LAST),
        (Views(), CONTIGUOUS),
        (Reads(), CONTIGUOUS),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, 5)), CONTIGUOUS),
        (nn.Conv2d(1, 4, 3), CONTIGUOUS),  # does not take the image: whoever captures layers says so
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_channels_last_where_the_network_computes_the_same_in_it(
    module: nn.Module, expected: torch.memory_format
) -> None:
    state = torch.random.get_rng_state()
    module.train()
    assert find_memory_format(module, IMAGE) == expected
    assert module.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_memory_that_runs_out_decides_nothing() -> None:
    with pytest.raises(MemoryError):
        find_memory_format(Raises(), IMAGE)


@pytest.mark.parametrize("shape", [(3, 12), (3, 4, 12, 16)], ids=str)
def test_images_that_are_not_maps_of_channels_keep_their_format(shape: tuple[int, ...]) -> None:
    assert find_memory_format(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3)), torch.zeros(1, *shape)) == CONTIGUOUS


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_torchvisions_networks_take_it(name: str) -> None:
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    assert find_memory_format(network, torch.zeros(1, 3, 96, 96)) == CHANNELS_LAST


@pytest.mark.parametrize("channels", [1, 3])
def test_the_rows_of_a_run_are_those_of_the_network_but_for_rounding(channels: int) -> None:
    torch.manual_seed(0)
    network = convolution(channels).eval()
    images = torch.rand(30, channels, 12, 16)
    labels = torch.arange(30) // 10  # in the order that a run has them
    data = TensorDataset(images + labels[:, None, None, None], labels)
    given: list[Tensor] = []
    hook = network[0].register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    report = analyze(network, data, device="cpu", layers="conv1,fc2", batch_size=7)
    hook.remove()
    assert report.run["network"]["memory_format"] == "channels_last"
    last = given[-1]  # of the pass
    assert last.stride() == torch.empty(last.shape, memory_format=CHANNELS_LAST).stride()
    expected = network[:2](data.tensors[0])  # as it lies without a run
    flat = expected.detach().flatten(1)
    clusters = torch.as_tensor(report.results[0].labels).long()
    centres = torch.stack([flat[clusters == cluster].mean(0) for cluster in range(3)])
    inertia = (flat - centres[clusters]).square().sum().item()
    assert report.results[0].inertia == pytest.approx(inertia, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_hold_their_values_in_the_order_in_which_these_come(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Turns().eval()
    data = TensorDataset(torch.rand(30, 3, 12, 16), torch.arange(30) // 10)
    settings = Options(device="cpu", layers=("first", "second", "fc"), batch_size=7, dtype=str(dtype)[6:])
    images = find_images(data, settings)
    with prepare(find_network(network, images, settings), images, settings) as setup:
        assert setup.memory_format == CHANNELS_LAST
        assert setup.forward.channels_last == {"first"}
        plan = setup.plan(setup.layers)
        capture = setup.capture(list)
        capture.begin(plan)
        (step,) = plan.steps
        stored = {}
        for layer in capture.rows(step, setup.layers, lambda batches, _: batches):
            stored[layer.layer.name] = layer.source.rows.clone(), layer.scale
        anew = Step(step.layers, "recompute", 0.0, 0)
        for layer in capture.rows(anew, setup.layers, lambda batches, _: batches):
            assert isinstance(layer.source, Recomputed)
            rows, scale = stored[layer.layer.name]
            assert layer.scale == scale
            found = torch.cat([x.clone() for _, x in layer.source.chunks(4)])
            assert torch.equal(found, rows)
            assert torch.equal(layer.source.take(torch.tensor([29, 3])), rows[[29, 3]])
        given = data.tensors[0][[int(path) for path in capture.seen()[0]]]
    first = network.first(given)
    expected = {
        "first": first.permute(0, 2, 3, 1).flatten(1),
        "second": network.second(first).flatten(1),
        "fc": network(given),
    }
    for name, (rows, scale) in stored.items():
        torch.testing.assert_close(rows.float() / scale, expected[name], rtol=2e-3, atol=2e-3)


def test_a_network_that_takes_no_other_format_runs(tmp_path: Path) -> None:
    cases_images.write_images(tmp_path, {"cat": 6, "dog": 6})
    torch.manual_seed(0)
    steps = [torchvision.transforms.Resize((12, 16)), torchvision.transforms.ToTensor()]
    report = analyze((Views().eval(), torchvision.transforms.Compose(steps)), tmp_path, device="cpu", layers="all")
    assert report.run["network"]["memory_format"] == "contiguous_format"
