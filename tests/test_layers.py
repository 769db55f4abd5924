"""Which layers a network has, what they are called, and which of them are the default choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.errors import InputError


def layers_of(name: str) -> list[Layer]:
    """Of a torchvision classifier: on the meta device, where a dry pass computes nothing."""
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None, **options)
        return find_layers(module, torch.empty(1, 3, size, size))


def auto(layers: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in choose_layers(layers, ["auto"])}


@pytest.mark.parametrize(
    ("name", "count", "values"),
    [
        ("alexnet", 8, 494_184),
        ("vgg16", 16, 13_556_712),
        ("vgg16_bn", 16, 13_556_712),
        ("vgg19", 19, 14_861_288),
        ("resnet18", 11, 1_556_968),
        ("resnet50", 19, 6_325_224),
        ("resnet152", 53, 13_951_976),
        ("googlenet", 14, 2_843_240),
        ("inception_v3", 18, 6_655_160),
    ],
)
def test_sizes_of_the_default_choice(name, count, values):
    chosen = auto(layers_of(name)).values()
    assert len(chosen) == count
    assert sum(layer.values for layer in chosen) == values


def test_alexnet_has_the_papers_rows():
    chosen = auto(layers_of("alexnet")).values()
    assert [(layer.name, layer.module, layer.values, layer.kind) for layer in chosen] == [
        ("conv1", "features.1", 193_600, "conv"),
        ("conv2", "features.4", 139_968, "conv"),
        ("conv3", "features.7", 64_896, "conv"),
        ("conv4", "features.9", 43_264, "conv"),
        ("conv5", "features.11", 43_264, "conv"),
        ("fc6", "classifier.2", 4_096, "linear"),
        ("fc7", "classifier.5", 4_096, "linear"),
        ("fc8", "classifier.6", 1_000, "linear"),
    ]
    assert all(layer.after == "" for layer in chosen)


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_vgg_counts_convolutions_within_stages(name):
    names = "conv1_1 conv2_1 conv3_1 conv3_2 conv4_1 conv4_2 conv5_1 conv5_2 fc6 fc7 fc8"
    assert list(auto(layers_of(name))) == names.split()


def test_resnet_takes_the_first_call_of_relu_and_every_block():
    chosen = auto(layers_of("resnet50"))
    assert (chosen["conv1"].module, chosen["conv1"].call, chosen["conv1"].shape) == ("relu", 0, (64, 112, 112))
    blocks = [f"layer{stage}.{block}" for stage, depth in enumerate((3, 4, 6, 3), start=1) for block in range(depth)]
    assert list(chosen) == ["conv1", *blocks, "avgpool", "fc"]
    assert all(chosen[block].module == block for block in blocks)


def test_a_module_called_three_times_is_three_layers():
    layers = layers_of("resnet50")
    calls = [layer for layer in layers if layer.module == "layer1.0.relu" or "layer1.0.relu:2" in layer.aliases]
    assert [(layer.name, layer.call) for layer in calls] == [
        ("layer1.0.relu", 0),
        ("layer1.0.relu:1", 1),
        ("layer1.0", 0),  # the third call is the block's output, one layer under both names
    ]
    assert choose_layers(layers, ["layer1.0.relu:2"]) == choose_layers(layers, ["layer1.0"])


def test_googlenet_and_inception_take_blocks_and_no_auxiliary_heads():
    googlenet = list(auto(layers_of("googlenet")))
    assert googlenet[:4] == ["conv1", "conv2", "conv3", "inception3a"]
    assert googlenet[-3:] == ["inception5b", "avgpool", "fc"]
    inception = layers_of("inception_v3")
    assert list(auto(inception))[4:7] == ["Conv2d_4a_3x3", "Mixed_5b", "Mixed_5c"]
    assert not [layer for layer in inception if "Aux" in layer.module]


@pytest.mark.parametrize(
    ("name", "count", "first", "block", "last"),
    [
        ("densenet121", 10, "features.conv0", "features.denseblock2", "classifier"),
        ("mobilenet_v3_small", 16, "features.0", "features.7", "classifier.3"),
        ("efficientnet_b0", 20, "features.0", "features.1.0", "classifier"),
        ("convnext_tiny", 24, "features.0", "features.1.2", "classifier"),
        ("vit_b_32", 14, "conv_proj", "encoder.layers.encoder_layer_3", "heads"),
        ("swin_t", 18, "features.0.0", "features.5.5", "head"),
        ("squeezenet1_1", 11, "features.0", "features.4", "classifier.3"),
        ("shufflenet_v2_x0_5", 20, "conv1", "stage3.7", "fc"),
        ("mnasnet0_5", 22, "layers.0", "layers.8.2", "classifier"),
        ("maxvit_t", 16, "stem.0", "blocks.2.layers.4", "classifier.5"),
    ],
)
def test_other_networks_give_their_repeated_blocks(name, count, first, block, last):
    names = list(auto(layers_of(name)))
    assert len(names) == count
    assert (names[0], names[-1]) == (first, last)
    assert block in names


def test_pooled_features_are_found_where_a_function_pools_them():
    pool = auto(layers_of("densenet121"))["pool"]
    assert (pool.module, pool.after, pool.shape, pool.kind) == (
        "features",
        "relu+adaptive_avg_pool2d",
        (1024, 1, 1),
        "pool",
    )
    assert auto(layers_of("shufflenet_v2_x0_5"))["pool"].shape == (1024,)


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet26", 8), ("efficientnet_b0", 16), ("convnext_atto", 12), ("vit_tiny_patch16_224", 12)]
)
def test_timm_networks_give_their_repeated_blocks(name, blocks):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        module = timm.create_model(name)
        chosen = auto(find_layers(module, torch.empty(1, 3, 224, 224)))
    assert sum(layer.kind == "block" for layer in chosen.values()) == blocks


# ---- networks of the user's own


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_a_users_alexnet_gets_the_papers_names():
    features = [conv(1, 4), nn.ReLU(True), nn.MaxPool2d(2)]
    for _ in range(4):
        features += [conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    head = [nn.Linear(64, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(True), nn.Linear(8, 3)]
    module = nn.Sequential(nn.Sequential(*features), nn.Flatten(), nn.Sequential(*head))
    chosen = auto(find_layers(module, torch.zeros(1, 1, 8, 8)))
    assert list(chosen) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert chosen["conv2"].module == "0.5"  # the ReLU behind the batch norm
    assert chosen["fc8"].module == "2.5"


class Functional(nn.Module):
    """Non-linearities as functions, one behind a norm, one in place; a softmax at the end."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv(1, 3), nn.BatchNorm2d(3), conv(3, 5)
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = torch.relu_(self.conv2(x))
        x = F.gelu(self.fc1(x.mean((2, 3))))
        return F.log_softmax(self.fc2(x), 1)


def test_functional_nonlinearities_follow_their_layer():
    layers = find_layers(Functional(), torch.zeros(1, 1, 8, 8))
    assert [(layer.name, layer.module, layer.after, layer.kind) for layer in auto(layers).values()] == [
        ("conv1", "bn1", "relu", "conv"),
        ("conv2", "conv2", "relu", "conv"),
        ("pool", "conv2", "relu+mean", "pool"),
        ("fc1", "fc1", "gelu", "linear"),
        ("fc2", "fc2", "", "linear"),
    ]
    raw = choose_layers(layers, ["*:raw"])
    assert [(layer.name, layer.after) for layer in raw] == [("conv1:raw", ""), ("conv2:raw", ""), ("fc1:raw", "")]


class Reused(nn.Module):
    """One convolution under two names, one ReLU for all, a branch on the data, an addition in place before a ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.act, self.head = conv(3, 4), conv(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.tied = self.body

    def forward(self, x):
        x = self.act(self.stem(x))
        for _ in range(2 if x.sum() >= 0 else 1):
            x = self.act(self.body(x))
        y = self.tied(x)
        y += x
        return self.head(self.act(y).flatten(2).amax(2))


def test_shared_modules_count_their_calls_and_an_addition_ends_directly():
    chosen = auto(find_layers(Reused(), torch.zeros(1, 3, 4, 4)))
    assert [(layer.name, layer.module, layer.call) for layer in chosen.values()] == [
        ("stem", "act", 0),
        ("body", "act", 1),
        ("body:1", "act", 2),
        ("body:2", "body", 2),  # what the ReLU then gets is the sum, not this convolution
        ("head", "head", 0),
    ]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(4, 4), conv(4, 4)

    def forward(self, x):
        return {"features": F.relu(x + self.second(F.relu(self.first(x)))), "extra": None}


class Residuals(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.near, self.far, self.head = conv(3, 4), Residual(), Residual(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.far(self.near(F.relu(self.stem(x)))["features"])["features"]
        return self.head(x.mean((2, 3))), x


def test_blocks_as_attributes_and_outputs_in_dicts_and_tuples():
    chosen = auto(find_layers(Residuals(), torch.zeros(1, 3, 4, 4)))
    assert [(layer.name, layer.kind, layer.shape) for layer in chosen.values()] == [
        ("stem", "conv", (4, 4, 4)),
        ("near", "block", (4, 4, 4)),
        ("far", "block", (4, 4, 4)),
        ("pool", "pool", (4,)),
        ("head", "linear", (2,)),
    ]


def test_a_network_behind_a_normalisation_or_before_a_head_is_not_one_block():
    wrapped = nn.Sequential(nn.BatchNorm2d(3), Residuals())
    assert list(auto(find_layers(wrapped, torch.zeros(1, 3, 4, 4)))) == ["1.stem", "1.near", "1.far", "pool", "1.head"]


class Constant(nn.Module):
    """A module whose output's first dimension is one whatever the batch, and one that returns nothing."""

    def __init__(self):
        super().__init__()
        self.position, self.silent, self.fc = _Position(), _Silent(), nn.Linear(4, 2)

    def forward(self, x):
        self.silent(x)
        return self.fc(x.flatten(1) + self.position(x))


class _Position(nn.Module):
    def forward(self, x):
        return torch.ones(1, 4)


class _Silent(nn.Module):
    def forward(self, x):
        return None


def test_outputs_without_the_batch_are_left_out_even_for_one_example():
    layers = find_layers(Constant(), torch.zeros(1, 1, 2, 2))
    assert [layer.module for layer in layers] == ["fc"]


def test_a_network_without_layers_is_an_error():
    with pytest.raises(InputError, match="no layer that can be captured"):
        find_layers(_Silent(), torch.zeros(1, 1, 2, 2))


def test_names_are_unique_and_every_module_name_finds_a_layer():
    for layers in (layers_of("resnet18"), find_layers(Reused(), torch.zeros(1, 3, 4, 4))):
        assert len({layer.name for layer in layers}) == len(layers)
        for layer in layers:
            assert choose_layers(layers, [layer.name]) == [layer]
            assert all(choose_layers(layers, [name]) for name in (layer.module or "output", *layer.aliases))


# ---- the dry pass leaves no trace


class Fragile(Functional):
    def forward(self, x):
        super().forward(x)
        raise ArithmeticError("in the forward pass")


@pytest.mark.parametrize("kind", [Functional, Fragile])
def test_modes_hooks_and_buffers_are_as_before(kind):
    module = kind().train()
    module.bn1.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    if kind is Fragile:
        with pytest.raises(ArithmeticError):
            find_layers(module, torch.ones(1, 1, 8, 8))
    else:
        module.bn1.train()
        modes["bn1"] = True
        find_layers(module, torch.ones(1, 1, 8, 8))
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_wrapped_network_has_the_names_of_the_one_inside():
    module = Functional()
    example = torch.zeros(1, 1, 8, 8)
    assert find_layers(nn.DataParallel(module), example) == find_layers(module, example)


# ---- choosing


@pytest.fixture(scope="module")
def alexnet():
    return layers_of("alexnet")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["fc*,conv1"], ["conv1", "fc6", "fc7", "fc8"]),
        (["conv5", "conv1", "conv5"], ["conv1", "conv5"]),
        (["auto", "conv1"], [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]),
        (["classifier.[25]"], ["fc6", "fc7"]),
        (["features.0", "features.1"], ["features.0", "conv1"]),
        (["classifier"], ["fc8"]),  # the same values under another name
    ],
)
def test_patterns(alexnet, patterns, names):
    assert [layer.name for layer in choose_layers(alexnet, patterns)] == names


def test_all_is_everything_in_forward_order(alexnet):
    assert choose_layers(alexnet, ["all"]) == alexnet


def test_unknown_patterns_offer_close_names(alexnet):
    with pytest.raises(InputError, match=r"no layer is called 'conv12'; close: .*conv1"):
        choose_layers(alexnet, ["fc6,conv12"])
    with pytest.raises(InputError, match="Conv1"):  # case counts
        choose_layers(alexnet, ["Conv1"])
    with pytest.raises(InputError, match="no layer was asked for"):
        choose_layers(alexnet, [" , "])


def test_pools_that_follow_a_numbered_convolution_have_its_number():
    def pools(name):
        return {layer.name: (layer.module, layer.auto) for layer in layers_of(name) if layer.name.startswith("pool")}

    assert pools("alexnet") == {
        "pool1": ("features.2", False),
        "pool2": ("features.5", False),
        "pool5": ("features.12", False),
    }
    assert list(pools("vgg11")) == ["pool1", "pool2", "pool3", "pool4", "pool5"]
    assert pools("resnet18") == {}
    layers = layers_of("alexnet")
    assert choose_layers(layers, ["pool5"]) == choose_layers(layers, ["features.12"])
