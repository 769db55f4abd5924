"""ActivationStream: every trap of capturing activations, against plain re-computations."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode

from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.capture.store import LayerStore
from gpuclust.capture.stream import ActivationStream
from gpuclust.errors import InputError


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def capture(module: nn.Module, x: torch.Tensor, *patterns: str) -> dict[str, torch.Tensor]:
    layers = choose_layers(find_layers(module, x[:1]), patterns or ("auto",))
    rows: dict[str, torch.Tensor] = {}
    with ActivationStream(module, layers) as stream:
        stream.forward(x, lambda layer, activation: rows.update({layer.name: activation.clone()}))
    assert list(rows) == [layer.name for layer in layers]
    return rows


def seeded(build, *args, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args, **options)


@pytest.fixture(scope="module")
def alexnet():
    from torchvision.models import alexnet

    return seeded(alexnet).eval()


@pytest.fixture
def x():
    return images(2, 3, 64, 64)


def test_alexnet_rows_are_those_of_a_plain_recomputation(alexnet, x):
    rows = capture(alexnet, x)
    expected: dict[str, torch.Tensor] = {}
    y = x
    with torch.no_grad():
        numbers = iter(range(1, 9))
        for part in [*alexnet.features, alexnet.avgpool, nn.Flatten(), *alexnet.classifier]:
            if isinstance(part, nn.Conv2d):
                y = F.relu(F.conv2d(y, part.weight, part.bias, part.stride, part.padding))
                expected[f"conv{next(numbers)}"] = y
            elif isinstance(part, nn.Linear):
                number = next(numbers)
                y = F.linear(y, part.weight, part.bias)
                y = F.relu(y) if number < 8 else y
                expected[f"fc{number}"] = y
            elif not isinstance(part, nn.ReLU | nn.Dropout):
                y = part(y)
    assert list(rows) == list(expected)
    for name, activation in expected.items():
        assert torch.equal(rows[name], activation), name


def test_a_convolution_asked_for_is_captured_before_the_relu_in_place(alexnet, x):
    assert alexnet.features[1].inplace
    rows = capture(alexnet, x, "features.0", "features.1")
    first = alexnet.features[0]
    with torch.no_grad():
        raw = F.conv2d(x, first.weight, first.bias, first.stride, first.padding)
    assert (raw < 0).any()
    assert torch.equal(rows["features.0"], raw)
    assert torch.equal(rows["conv1"], raw.relu())


def test_every_call_of_a_shared_relu_is_its_own_layer():
    from torchvision.models.resnet import Bottleneck, ResNet

    module = seeded(ResNet, Bottleneck, [1, 1, 1, 1]).eval()
    x = images(2, 3, 32, 32)
    rows = capture(module, x, "conv1", "layer1.0.relu", "layer1.0.relu:1", "layer1.0")
    block = module.layer1[0]
    with torch.no_grad():
        stem = F.relu(module.bn1(module.conv1(x)))
        y = module.maxpool(stem)
        one = F.relu(block.bn1(block.conv1(y)))
        two = F.relu(block.bn2(block.conv2(one)))
        three = F.relu(block.bn3(block.conv3(two)) + block.downsample(y))
    assert [torch.equal(a, b) for a, b in zip(rows.values(), (stem, one, two, three), strict=True)] == [True] * 4


def test_in_place_functions_inside_a_block_do_not_reach_earlier_layers():
    from torchvision.models.googlenet import BasicConv2d

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicConv2d(3, 4, kernel_size=3)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.block(x).mean((2, 3)))

    module, x = seeded(Net), images(2, 3, 8, 8)
    rows = capture(module, x, "block.conv", "block.bn", "block")
    module.eval()
    with torch.no_grad():
        raw = module.block.conv(x)
        normed = module.block.bn(raw)
    assert (normed < 0).any()
    assert torch.equal(rows["block.conv"], raw)
    assert torch.equal(rows["block.bn"], normed)
    assert torch.equal(rows["block"], normed.relu())


class Functional(nn.Module):
    """Functions after modules, a module called twice, one weight under two names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.tied = self.conv2
        self.fc = nn.Linear(3, 2)
        self.modes: list[object] = []

    def forward(self, x):
        self.modes.append(_get_current_function_mode())
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = torch.tanh(self.conv2(x))
        x = self.tied(x).relu_()
        return self.fc(x.mean(dim=(2, 3)))


def test_functional_nonlinearities_and_pools_are_captured():
    module, x = seeded(Functional), images(3, 1, 6, 6)
    rows = capture(module, x)
    module.eval()
    with torch.no_grad():
        one = F.relu(module.bn1(module.conv1(x)))
        two = torch.tanh(module.conv2(one))
        three = F.relu(module.conv2(two))
        pool = three.mean(dim=(2, 3))
        expected = {"conv1": one, "conv2": two, "conv2:1": three, "pool": pool, "fc": module.fc(pool)}
    assert list(rows) == list(expected)
    for name, activation in expected.items():
        assert torch.equal(rows[name], activation), name


def test_functions_are_watched_only_where_a_layer_needs_it():
    module, x = seeded(Functional), images(2, 1, 6, 6)
    layers = find_layers(module, x[:1])
    for patterns, watched in ((["fc"], False), (["conv1"], True)):
        module.modes.clear()
        with ActivationStream(module, choose_layers(layers, patterns)) as stream:
            stream.forward(x, lambda layer, activation: None)
        assert [mode is not None for mode in module.modes] == [watched]


class Guarded(nn.Module):
    """Catches every Exception of its first half, and fails if its second half runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.fail = False
        self.tails = 0

    def forward(self, x):
        try:
            x = self.first(x.flatten(1))
        except Exception:
            x = x.flatten(1)
        self.tails += 1
        if self.fail:
            raise ArithmeticError("the tail ran")
        return self.second(x)


def test_the_pass_stops_after_the_last_wanted_layer():
    module, x = Guarded(), images(2, 1, 2, 2)
    layers = find_layers(module, x[:1])
    module.fail, module.tails = True, 0
    with ActivationStream(module, choose_layers(layers, ["first"])) as stream:
        for _ in range(3):
            stream.forward(x, lambda layer, activation: None)
    assert module.tails == 0
    with pytest.raises(ArithmeticError), ActivationStream(module, choose_layers(layers, ["second"])) as stream:
        stream.forward(x, lambda layer, activation: None)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "write"])
def test_hooks_modes_and_settings_are_restored_whatever_happens(error, where):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(), nn.Flatten()))
    module.train()
    module[1].eval()
    modes = [part.training for part in module.modules()]
    x = images(2, 1, 4, 4)
    layers = choose_layers(find_layers(module, x[:1]), ["all"])
    cudnn = torch.backends.cudnn

    def settings():
        operations = (cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, [op.fp32_precision for op in operations]

    before = settings()
    assert before[0] is True  # torch's default, which a pass has to switch off and on again
    seen = []

    def raise_error(*_):
        seen.append(settings())
        assert not any(part.training for part in module.modules())
        raise error

    if where == "forward":
        module[1].register_forward_pre_hook(raise_error)
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    with pytest.raises(error), ActivationStream(module, layers) as stream:
        stream.forward(x, raise_error if where == "write" else lambda *_: None)
    assert seen == [(False, True, False, ["ieee"] * 3)]
    assert settings() == before
    assert [part.training for part in module.modules()] == modes
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()] == hooks
    assert torch.is_grad_enabled()


def test_settings_that_the_caller_made_for_convolutions_alone_come_back():
    module, x = nn.Sequential(nn.Conv2d(1, 2, 3)), images(2, 1, 4, 4)
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        capture(module, x, "all")
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", before)
    finally:
        cudnn.conv.fp32_precision = before


def test_training_mode_of_the_network_does_not_change_the_rows_or_the_network():
    module = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5)))
    x = images(4, 1, 5, 5)
    expected = capture(module.eval(), x)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    rows = capture(module.train(), x)
    assert all(torch.equal(rows[name], expected[name]) for name in expected)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.training


def test_auxiliary_heads_are_never_run_even_of_a_network_in_training():
    from torchvision.models import googlenet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = seeded(googlenet, weights=None, init_weights=False).train()
    calls = []
    module.aux1.register_forward_pre_hook(lambda *_: calls.append("aux1"))
    rows = capture(module, images(1, 3, 64, 64), "inception4a", "fc")
    assert calls == []
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(rows["fc"], module(images(1, 3, 64, 64)))


def test_no_gradients_no_autocast_and_nothing_cached_that_training_could_not_use():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.cache = None

        def forward(self, x):
            if self.cache is None or len(self.cache) != len(x):
                self.cache = x.flatten(1) * 2.0
            return self.fc(self.cache)

    module, x = Net(), images(2, 1, 2, 2)
    layers = find_layers(module, x[:1])
    module.cache = None
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16), ActivationStream(module, layers) as stream:
        stream.forward(x, lambda layer, activation: seen.append((activation.requires_grad, activation.dtype)))
    assert seen == [(False, torch.float32)]
    module(x).sum().backward()  # an inference tensor in the cache would fail here
    assert module.fc.weight.grad is not None


def test_a_data_parallel_network_is_captured_as_the_one_inside():
    module, x = seeded(Functional), images(2, 1, 6, 6)
    rows, wrapped = capture(module, x), capture(nn.DataParallel(module), x)
    assert all(torch.equal(wrapped[name], rows[name]) for name in rows)


def test_the_first_tensor_of_a_tuple_is_captured():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(3, 5, batch_first=True)

        def forward(self, x):
            return self.inner(x.flatten(2))[0]

    module, x = seeded(Pair), images(2, 4, 1, 3)
    with torch.no_grad():
        assert torch.equal(capture(module, x, "inner")["inner"], module(x))


def test_a_layer_that_is_not_reached_is_named():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return (self.high if x.sum() > 0 else self.low)(x.flatten(1))

    module, x = Branch(), torch.ones(2, 1, 2, 2)
    layers = find_layers(module, x[:1])
    with ActivationStream(module, layers) as stream:
        with pytest.raises(InputError, match=r"Branch ended without high \(high, call 0\)"):
            stream.forward(-x, lambda layer, activation: None)
        stream.forward(x, lambda layer, activation: None)  # and the stream is still good


def test_another_shape_and_another_network_are_refused():
    module, x = nn.Sequential(nn.Conv2d(1, 2, 3)), images(2, 1, 4, 4)
    layers = find_layers(module, x[:1])
    with (
        ActivationStream(module, layers) as stream,
        pytest.raises(InputError, match=r"listed with shape \(2, 2, 2\).*gave \(2, 2, 4, 4\)"),
    ):
        stream.forward(images(2, 1, 6, 6), lambda layer, activation: None)
    with (
        pytest.raises(InputError, match="no module 'other'"),
        ActivationStream(module, [Layer("a", "other", "conv", (1,))]),
    ):
        pass
    assert not module[0]._forward_hooks
    with pytest.raises(RuntimeError, match="with block"):
        ActivationStream(module, layers).forward(x, lambda layer, activation: None)


def test_batches_stream_into_stores(alexnet):
    x = images(5, 3, 64, 64)
    layers = choose_layers(find_layers(alexnet, x[:1]), ["conv5", "fc8"])
    stores = {layer: LayerStore(5, layer.values, torch.float32, "cpu", name=layer.name) for layer in layers}
    with ActivationStream(alexnet, layers) as stream:
        for batch in x.split(2):
            stream.forward(batch, lambda layer, activation: stores[layer].append(activation))
    for store in stores.values():
        store.finish()
    whole = torch.cat([capture(alexnet, batch, "fc8")["fc8"] for batch in x.split(2)])
    assert torch.equal(stores[layers[1]].rows, whole)
    assert stores[layers[0]].shape == (5, layers[0].values)


def test_one_function_applied_twice_to_a_tensor_is_two_layers_each_with_its_own_values():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
            self.seen = 0.0

        def forward(self, x):
            x = self.one(x)
            self.seen = float(x.mean())  # not the pooling that follows
            y = torch.clamp(x, 0, 1) + self.two(torch.clamp(x, -1, 0))
            return self.fc(y.mean((2, 3)) + x.mean((2, 3)))

    module, x = seeded(Twice), images(4, 3, 8, 8)
    rows = capture(module, x, "all")
    with torch.no_grad():
        one = module.one(x)
    assert torch.equal(rows["one"], one.clamp(0, 1))
    assert torch.equal(rows["one+clamp#2"], one.clamp(-1, 0))
    assert torch.equal(rows["pool"], one.mean((2, 3)))
    for name in rows:
        assert torch.equal(capture(module, x, name)[name], rows[name])
