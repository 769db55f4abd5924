"""Networks: every source, every kind of weights, and what each refuses."""

from __future__ import annotations

import os
import pickle
import random
import socket
import sys
import urllib.error

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from gpuclust.capture.models import import_object, load_network, load_state, load_weights
from gpuclust.errors import InputError, UnavailableError

SMALL = "squeezenet1_1"
PAPER = (
    *("alexnet", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("googlenet", "inception_v3"),
)


class Net(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    return load_network(SMALL, "none", seed=5)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """The current folder, with modules of the user's in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty cache, and every name lookup fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def lookup(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(value, state[name]) for name, value in own.items())


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---- torchvision


@pytest.mark.parametrize("name", PAPER)
def test_every_network_of_the_paper_is_known_with_its_own_transform(name):
    with torch.device("meta"):  # shapes alone: nothing is allocated
        network = load_network(name, "none")
    side = 299 if name == "inception_v3" else 224
    assert network.input_shape == (3, side, side)
    assert network.transform is not None
    assert network.transform.crop_size == [side]
    assert network.weights == "none (random, seed 0)"
    assert (network.name, network.module.training) == (name, False)
    if name in ("googlenet", "inception_v3"):
        assert network.module.transform_input is False
        assert network.notes["transform_input"].startswith("off")
        assert not any(part.startswith(("aux", "Aux")) for part, _ in network.module.named_children())
    if name == "resnet50":
        assert network.transform.resize_size == [232]  # of its best weights, V2


def test_random_weights_are_seeded_and_the_callers_generator_is_not_touched(small):
    states = torch.get_rng_state(), random.getstate()
    again, other = load_network(SMALL, "none", seed=5), load_network(SMALL, "none", seed=6)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert same(again.module, small.module.state_dict())
    assert not same(other.module, small.module.state_dict())
    assert small.weights == "none (random, seed 5)"


def test_random_weights_are_those_of_torchvisions_own_initialisation():
    module = load_network("googlenet", "none").module
    spread = module.inception3a.branch1.conv.weight.std().item()
    assert spread == pytest.approx(0.01, rel=0.1)  # its truncated normal; torch's default would give 0.042


def test_unknown_models_and_weights_give_close_names():
    with pytest.raises(InputError, match=r"unknown model 'resnet5'; close: .*resnet50.*timm:NAME, or package"):
        load_network("resnet5")
    with pytest.raises(InputError, match=r"unknown model 'fasterrcnn_resnet50_fpn'"):
        load_network("fasterrcnn_resnet50_fpn")  # no classifier
    with pytest.raises(InputError, match=r"unknown weights 'IMAGENET1K_V3' for resnet50; close: IMAGENET1K_V[12]"):
        load_network("resnet50", "IMAGENET1K_V3")
    with pytest.raises(InputError, match=r"no checkpoint at nowhere\.pth"):
        load_network(SMALL, "nowhere.pth")
    with pytest.raises(InputError, match="or such a module itself; got int"):
        load_network(3)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_without_a_network_one_line_says_how_to_give_a_file(no_network, weights, capfd):
    with pytest.raises(UnavailableError) as caught:
        load_network("alexnet", weights)
    message = str(caught.value)
    assert "alexnet" in message
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in message
    assert "(Name or service not known)" in message or "([Errno -2] Name or service not known)" in message
    assert message.endswith("give a local file with --weights PATH, or random weights with --weights none")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_other_failures_of_a_download_say_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for error, said in (
        (urllib.error.URLError(TimeoutError("timed out")), "(timed out)"),
        (urllib.error.HTTPError("https://x", 403, "Forbidden", {}, None), "(HTTP Error 403: Forbidden)"),
        (RuntimeError('invalid hash value (expected "b8a5", got "0000")'), "invalid hash value"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (TimeoutError(), "(TimeoutError)"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("torch.hub.download_url_to_file", fail)
        with pytest.raises(UnavailableError, match="cannot get the weights") as caught:
            load_network(SMALL)
        assert said in str(caught.value)
        if isinstance(error, urllib.error.HTTPError):
            error.close()


def published_file(folder) -> str:
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    url = torchvision.models.get_model_weights(SMALL)["DEFAULT"].url
    return str(checkpoints / url.rpartition("/")[2])


def test_published_weights_bring_their_transform_and_categories(small, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save(small.module.state_dict(), published_file(tmp_path))
    network = load_network(SMALL)
    assert same(network.module, small.module.state_dict())
    assert network.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1 (torchvision)"
    assert (len(network.categories), network.categories[0]) == (1000, "tench")
    assert network.transform.mean == [0.485, 0.456, 0.406]
    assert not network.module.training


def test_even_published_weights_are_read_as_weights_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"a": Hostile(tmp_path / "marker")}, published_file(tmp_path))
    with pytest.raises(
        UnavailableError, match=r"cannot get the weights .*\(Trying to load unsupported GLOBAL posix.mkdir"
    ):
        load_network(SMALL)
    assert not (tmp_path / "marker").exists()


# ---- checkpoints


@pytest.mark.parametrize(
    ("name", "wrapping"),
    [
        ("weights.safetensors", None),
        ("weights.pt", None),
        *((f"{wrapping}.pth", wrapping) for wrapping in (None, "state_dict", "model_state_dict", "model")),
    ],
)
def test_a_checkpoint_replaces_the_weights(tmp_path, small, name, wrapping):
    state = small.module.state_dict()
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapping: state, "epoch": 3} if wrapping else state, path)
    network = load_network(SMALL, str(path))
    assert same(network.module, state)
    assert network.weights == f"file {path}"
    assert network.transform is not None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_cut(prefix):
    source, module = Net(), Net()
    load_weights(module, {prefix + name: value for name, value in source.state_dict().items()}, "file")
    assert same(module, source.state_dict())


def test_a_checkpoint_of_before_batch_norm_counted_is_whole():
    source, module = Net(), Net()
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_weights(module, state, "file")
    assert torch.equal(module.fc.weight, source.fc.weight)


def test_a_checkpoint_that_does_not_fit_names_the_keys_and_changes_nothing():
    module, state = Net(), Net(width=4).state_dict()
    state["extra.weight"] = state.pop("norm.running_var")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(module, state, "my.pth")
    message = str(caught.value)
    assert message.startswith("my.pth does not fit Net: 1 missing: norm.running_var; 1 unexpected: extra.weight; ")
    assert "6 of another shape: conv.weight (4, 3, 3, 3) instead of (3, 3, 3, 3), " in message
    assert "fc.weight" not in message  # the first four are enough
    assert ", .... Give the network that it was saved from" in message
    assert same(module, before)


def test_another_number_of_classes_is_named(tmp_path):
    path = tmp_path / "ten.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=10).state_dict(), path)
    with pytest.raises(InputError, match=r"classifier\.1\.weight \(10, 512, 1, 1\) instead of \(1000, 512, 1, 1\)"):
        load_network(SMALL, str(path))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_checkpoint_with_auxiliary_heads_loads(tmp_path, name):
    source = getattr(torchvision.models, name)(
        weights=None, aux_logits=True, transform_input=True, init_weights=False
    ).eval()
    state = source.state_dict()
    assert any(key.startswith(("aux1.", "AuxLogits.")) for key in state)
    path = tmp_path / "aux.pth"
    torch.save(state, path)
    network = load_network(name, str(path))
    assert same(network.module, state)
    assert network.module.transform_input is True
    assert network.notes["transform_input"].startswith("on")
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.module(x), source(x))


def test_heads_of_a_users_own_network_are_not_optional():
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.aux1 = nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"2 missing: aux1\.weight, aux1\.bias"):
        load_weights(Own(), Net().state_dict(), "file")


def test_old_densenet_names_are_those_of_now():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.denselayer1 = nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})

    source, module = Layer(), Layer()
    state = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for name, v in source.state_dict().items()}
    assert "denselayer1.norm.1.weight" in state
    load_weights(module, state, "file")
    assert same(module, source.state_dict())


def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path):
    zipped, bare = tmp_path / "zipped.pth", tmp_path / "bare.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Hostile(tmp_path / "marker")}, zipped)
    bare.write_bytes(pickle.dumps(Hostile(tmp_path / "marker")))
    for path in (zipped, bare):
        with pytest.raises(
            InputError,
            match=r"cannot be read as weights alone \((Trying to load u|U)nsupported .*save model.state_dict",
        ) as caught:
            load_network(SMALL, str(path))
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # no advice on how to switch the guard off
    assert not (tmp_path / "marker").exists()


def test_files_that_hold_no_weights(tmp_path):
    cases = {
        "text.pth": (b"no weights at all", "cannot be read as weights alone"),
        "empty.pth": (b"", "cannot be read as weights alone"),
        "text.safetensors": (b"no weights at all", "cannot be read as safetensors"),
        "empty.safetensors": (b"", "cannot be read as safetensors"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_state(tmp_path / name)
    whole = tmp_path / "whole.pth"
    torch.save(Net().state_dict(), whole)
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        load_state(whole)
    torch.save(Net(), tmp_path / "module.pth")
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        load_state(tmp_path / "module.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match=r"holds no state dict \(names to tensors\), but dict"):
        load_state(tmp_path / "numbers.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="but list"):
        load_state(tmp_path / "list.pth")


# ---- the user's own


def test_a_module_itself_is_taken_as_it_is():
    module = Net().train()
    network = load_network(module)
    assert network.module is module
    assert (network.name, network.transform, network.input_shape, network.weights) == ("Net", None, None, "as given")
    assert module.training  # capturing switches modes, and back; loading does not
    preset = torchvision.transforms._presets.ImageClassification(crop_size=64)
    pair = load_network((module, preset))
    assert (pair.module, pair.transform, pair.input_shape) == (module, preset, (3, 64, 64))
    assert load_network(nn.DataParallel(module)).name == "Net"


def test_a_module_takes_a_checkpoint_and_no_other_weights(tmp_path):
    module, source = Net(), Net()
    torch.save(source.state_dict(), tmp_path / "own.pth")
    assert load_network(module, str(tmp_path / "own.pth")).weights == f"file {tmp_path / 'own.pth'}"
    assert same(module, source.state_dict())
    for weights in ("none", "IMAGENET1K_V1"):
        with pytest.raises(InputError, match=f"Net brings its own weights: .*got '{weights}'"):
            load_network(module, weights)


OWN = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 2, 3)).train()

def pair():
    return build(), lambda image: torch.zeros(3, 8, 8)

class Nets:
    tiny = staticmethod(build)

def text():
    return "no module"

number = 3
"""


def test_a_callable_in_the_current_folder(own_modules):
    (own_modules / "own_nets.py").write_text(OWN)
    network = load_network("own_nets:build", seed=1)
    assert (network.name, network.weights, network.transform) == ("own_nets:build", "as given", None)
    assert not network.module.training
    state = torch.get_rng_state()
    assert same(load_network("own_nets:Nets.tiny", seed=1).module, network.module.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    pair = load_network("own_nets:pair")
    assert isinstance(pair.module, nn.Sequential)
    assert pair.transform(None).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_nets:buidl", "own_nets has no 'buidl'; close: build"),
        ("own_nets:text", r"own_nets:text is an nn.Module or \(nn.Module, transform\); got str"),
        ("own_nets:number", "'own_nets:number' is not callable: int"),
        ("own_net:build", "no module 'own_net' for 'own_net:build': it is looked for in"),
        (":build", "':build' is not package.module:callable"),
        ("own_nets:", "'own_nets:' is not package.module:callable"),
        ("..own_nets:build", "is not package.module:callable"),
    ],
)
def test_what_a_callable_may_not_be(own_modules, path, message):
    (own_modules / "own_nets.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        load_network(path)


def test_a_fault_in_the_users_module_is_one_line_that_says_where(own_modules):
    (own_modules / "own_broken.py").write_text("\nimport own_missing_dependency")
    missing = r"importing own_broken raised ModuleNotFoundError: .*own_missing_dependency.* \(own_broken.py, line 2\)$"
    with pytest.raises(InputError, match=missing) as caught:
        import_object("own_broken:build")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    (own_modules / "own_syntax.py").write_text("def build(:")
    with pytest.raises(InputError, match="importing own_syntax raised SyntaxError"):
        import_object("own_syntax:build")
    (own_modules / "own_value.py").write_text("def build():\n    raise ValueError('inside\\nand more')")
    with pytest.raises(InputError, match=r"^own_value:build raised ValueError: inside \(own_value.py, line 2\)$"):
        load_network("own_value:build")
    with pytest.raises(InputError, match="torch:rand raised TypeError"):
        load_network("torch:rand")


# ---- timm


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_timm_networks(timm):
    network = load_network("timm:test_resnet", "none", seed=2)
    assert network.input_shape == (3, 160, 160)
    assert network.transform is not None
    assert (network.name, network.weights) == ("timm:test_resnet", "none (random, seed 2)")
    assert not network.module.training
    assert same(load_network("timm:test_resnet", "none", seed=2).module, network.module.state_dict())


def test_timm_checkpoint(timm, tmp_path):
    source = load_network("timm:test_resnet", "none", seed=3).module.state_dict()
    save_file(source, tmp_path / "timm.safetensors")
    network = load_network("timm:test_resnet", str(tmp_path / "timm.safetensors"))
    assert same(network.module, source)


def test_timm_unknown_names(timm):
    with pytest.raises(InputError, match="unknown timm model 'test_resnt'; close: test_resnet"):
        load_network("timm:test_resnt")
    with pytest.raises(InputError, match="unknown weights 'r161_in1k' for timm:test_resnet; close: r160_in1k"):
        load_network("timm:test_resnet", "r161_in1k")
    with pytest.raises(InputError, match=r"unknown weights in 'timm:test_resnet\.r161'.*allowed: r160_in1k"):
        load_network("timm:test_resnet.r161")


def test_timm_without_a_network_is_told_at_once(timm, no_network, capfd):
    with pytest.raises(UnavailableError) as caught:
        load_network("timm:test_resnet")
    message = str(caught.value)
    assert message.startswith("cannot get the weights of timm:test_resnet from the Hugging Face hub (")
    assert message.endswith("give a local file with --weights PATH, or random weights with --weights none")
    assert "\n" not in message
    assert "Retrying" not in capfd.readouterr().err


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnavailableError, match=r"timm:resnet18 needs timm, .*pip install 'gpuclust\[timm\]'"):
        load_network("timm:resnet18")
