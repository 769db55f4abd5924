"""What makes a run the same run: the code, the network, the software."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cases_run as cases
import pytest
import torch
from torch import Tensor, nn

from gpuclust import identity
from gpuclust.identity import of_network, of_software


def write(root: Path, name: str, text: str = "one") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout in the place of this one."""
    for name in ("identity.py", "capture/store.py", "report/page.py", "cli.py"):
        write(tmp_path / "gpuclust", name)
    write(tmp_path / "kernels", "cuda/assign.cu")
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "gpuclust/identity.py"))
    monkeypatch.setattr(identity, "ROOT", tmp_path / "kernels")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        ("gpuclust/capture/store.py", True),
        ("gpuclust/capture/new.py", True),
        ("kernels/cuda/assign.cu", True),
        ("kernels/cuda/sums.cuh", True),
        ("gpuclust/report/page.py", False),
        ("gpuclust/cli.py", False),
        ("gpuclust/capture/notes.txt", False),
    ],
)
def test_code_that_bears_on_results_counts(package: Path, name: str, tells: bool) -> None:
    before = identity.code_hash.__wrapped__()
    write(package, name, "two")
    assert (identity.code_hash.__wrapped__() != before) == tells


def test_this_checkout_is_read() -> None:
    names = [name for name, _ in identity._sources()]
    assert {"analysis.py", "cluster/lloyd.py", "cuda/assign.cu", "triton/assign.py"} <= set(names)
    assert len(names) == len(set(names))


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.ndim in {2, 3, 4} else images


def changed(forward: Any) -> nn.Module:
    kind = type("Plain", (nn.Module,), {"forward": forward, "__module__": __name__})
    return kind()


def test_a_network_that_computes_something_else_is_another_one() -> None:
    one, other = changed(lambda self, images: images + 1), changed(lambda self, images: images + 2)
    assert of_network(one, None)["network"] != of_network(other, None)["network"]
    # fmt: off
    again = changed(lambda self, images:
                    images + 1)  # on other lines, and with a comment
    # fmt: on
    assert of_network(again, None) == of_network(one, None)


def test_weights_are_told_from_the_network() -> None:
    one, two = (of_network(cases.small_net(seed), cases.to_tensor) for seed in (0, 1))
    assert {name for name in one if one[name] != two[name]} == {"tensors"}


def test_a_transform_of_another_body_is_another_one() -> None:
    def body(text: str) -> Any:
        space: dict[str, Any] = {}
        exec(f"def transform(picture):\n    return {text}", space)
        return space["transform"]

    one, again, other = (of_network(Plain(), body(text))["transform"] for text in ("picture", "picture", "-picture"))
    assert one == again != other
    assert one.startswith("<function transform> with code ")


def test_processes_agree() -> None:
    """Sets among a function's constants have another order in each."""
    code = "import test_identity as t; print(t.of_network(t.Plain(), t.cases.to_tensor))"
    shown = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert shown == {f"{of_network(Plain(), cases.to_tensor)}\n"}


def test_versions_are_those_of_what_computes() -> None:
    found = of_software(torch.device("cpu"), "pillow", ["torch"])
    assert found["torch"] == torch.__version__
    assert {"gpuclust", "pillow", "torchvision", "numpy", "code", "python", "cpu"} <= set(found)


def test_kernels_that_are_compiled_here_are_known_by_their_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "versions", lambda: {"cupy": "14", "triton": "3", "torch": "2"})
    monkeypatch.setattr(identity.nvrtc, "compiler", lambda: "13.0")
    monkeypatch.setenv("GPUCLUST_HOPPER", "1")
    device = torch.device("cpu")
    one, other = (of_software(device, "pillow", backends) for backends in (["cupy", "torch"], ["triton"]))
    assert (one["cupy"], one["nvrtc"], one["GPUCLUST_HOPPER"], one.get("triton")) == ("14", "13.0", "True", None)
    assert (other["triton"], other.get("cupy"), other.get("nvrtc")) == ("3", None, None)


class Buffered(nn.Module):
    def __init__(self, kept: float, passing: float) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(kept))
        self.register_buffer("passing", torch.tensor(passing), persistent=False)


def test_every_buffer_counts_as_a_weight() -> None:
    plain, *others = (of_network(Buffered(*values), None) for values in ((1, 1), (2, 1), (1, 2)))
    for other in others:
        assert {name for name in plain if plain[name] != other[name]} == {"tensors"}


def test_packages_of_a_network_are_named_with_their_versions() -> None:
    import timm
    from torchvision.models import squeezenet1_1

    assert of_network(timm.create_model("resnet10t"), None)["timm"] == timm.__version__
    assert set(of_network(squeezenet1_1(), None)) == {"transform", "network", "tensors"}


def test_activations_are_the_same_but_for_rounding() -> None:
    values = torch.randn(1, 30, 50, 50, generator=torch.Generator().manual_seed(0))
    of = {name: {"a": identity.summary(one)} for name, one in (
        ("same", values), ("rounded", values * (1 + 1e-6)), ("other", values * 1.0001), ("turned", values.flip(-1)),
        ("format", values.to(memory_format=torch.channels_last)), ("nothing", values * 0), ("hole", values / 0),
    )}  # fmt: skip
    assert identity.alike(of["same"], of["rounded"])
    assert identity.alike(of["same"], of["format"])
    assert identity.alike(of["nothing"], of["nothing"])
    assert identity.alike(of["hole"], of["hole"])
    for name in ("other", "turned", "nothing", "hole"):
        assert not identity.alike(of["same"], of[name])
        assert not identity.alike(of[name], of["same"])
    assert not identity.alike(of["same"], {"b": of["same"]["a"]})
    assert not identity.alike(None, of["same"])
