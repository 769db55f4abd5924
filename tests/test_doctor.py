"""The doctor on this machine, and on machines with cards, drivers and faults that a fake driver library plays."""

from __future__ import annotations

import builtins
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases_driver import BIG, GIB, SMALL, a_card, fake_nvml, fake_torch
from rich.console import Console

from gpuclust import doctor
from gpuclust.cluster.backends import survey


def _printed(width=120):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.show(console)
    console.file.close()
    return console.export_text()


def test_this_machine():
    found = doctor.examine()
    assert json.loads(json.dumps(found)) == found
    host = found["devices"][0]
    assert host["device"] == "cpu"
    assert host["cores"] >= 1
    assert 0 < host["free_bytes"] <= host["total_bytes"]
    assert found["backends"] == survey()
    assert found["backends"]["torch"] is None
    assert len(found["devices"]) - 1 >= torch.cuda.device_count()
    if not torch.cuda.is_available():
        assert found["cuda"]["problem"]
        assert "\n" not in found["cuda"]["problem"]


def test_versions_without_importing():
    found = doctor.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__
    assert found.get("cuda") == torch.version.cuda
    code = "import sys, gpuclust.doctor as d; d.versions(); print({'torch', 'numpy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cards_are_matched_by_uuid_not_by_number(monkeypatch):
    nvml = fake_nvml([SMALL, BIG])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    fake_torch(monkeypatch, [BIG, SMALL])
    found = doctor.examine()
    assert [(c["device"], c["name"], c["total_bytes"], c["free_bytes"]) for c in found["devices"][1:]] == [
        ("cuda:0", "NVIDIA H200", 140 * GIB, 139 * GIB),
        ("cuda:1", "NVIDIA RTX A2000", 12 * GIB, 3 * GIB),
    ]
    assert found["devices"][2]["compute_capability"] == "8.6"
    assert (found["cuda"]["driver"], found["cuda"]["driver_cuda"]) == ("580.65.06", "13.2")
    assert found["cuda"]["problem"] is found["cuda"]["nvml"] is None
    assert json.loads(json.dumps(found)) == found


def test_cards_are_matched_by_slot_where_uuids_differ(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([SMALL, BIG]))
    fake_torch(monkeypatch, [BIG], uuids=False)
    cards = doctor.examine()["devices"][1:]
    assert [(c["device"], c["free_bytes"]) for c in cards] == [("cuda:0", 139 * GIB), (None, 3 * GIB)]


def test_a_card_that_torch_does_not_see_is_listed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([BIG, SMALL]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    fake_torch(monkeypatch, [SMALL])
    found = doctor.examine()
    assert [(c["device"], c["name"]) for c in found["devices"][1:]] == [
        ("cuda:0", "NVIDIA RTX A2000"),
        (None, "NVIDIA H200"),
    ]
    text = _printed()
    assert "CUDA_VISIBLE_DEVICES=1" in text
    assert "torch does not see" in text


@pytest.mark.parametrize("slices", [None, 20 * GIB])
def test_memory_the_driver_does_not_know_or_of_a_slice(monkeypatch, slices):
    card = a_card("NVIDIA GB10", "cccc", 1, None if slices is None else 140 * GIB, 139 * GIB)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([card]))
    fake_torch(monkeypatch, [card], slices=slices)
    found = doctor.examine()["devices"][1]
    assert (found["free_bytes"], found["total_bytes"]) == (7 * GIB, 10 * GIB)


@pytest.mark.parametrize("fault", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByIndex"])
def test_a_driver_that_does_not_answer_is_one_line(monkeypatch, fault):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([BIG], fault=fault))
    fake_torch(monkeypatch, [BIG])
    found = doctor.examine()
    assert found["cuda"]["nvml"] == f"the NVIDIA driver does not answer: {fault} failed"
    assert found["devices"][1]["free_bytes"] == 7 * GIB
    assert "7.52 GB" in _printed()


def test_without_nvidia_ml_py(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in doctor.examine()["cuda"]["nvml"]


def test_torch_without_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([BIG]))
    monkeypatch.setattr(torch.version, "cuda", None)
    found = doctor.examine()
    assert "no CUDA" in found["cuda"]["problem"]
    assert [(c["device"], c["name"]) for c in found["devices"][1:]] == [(None, "NVIDIA H200")]


def test_torch_that_does_not_import(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file\nmore")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    found = doctor.examine()
    reason = "torch does not import: libcudart.so.13: cannot open shared object file"
    assert found["backends"] == {"torch": reason}
    assert found["cuda"]["problem"] == reason
    assert reason in _printed()


def test_hardware_names_what_ran(monkeypatch):
    cpu = doctor.hardware("cpu")
    assert cpu["device"].endswith("(cpu)")
    assert cpu["cores"] >= 1
    assert "gpu_memory" not in cpu
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([SMALL, BIG]))
    fake_torch(monkeypatch, [BIG, SMALL])
    assert doctor.hardware("cuda")["device"] == "NVIDIA H200 (cuda:0)"
    second = doctor.hardware("cuda:1")
    assert second["device"] == "NVIDIA RTX A2000 (cuda:1)"
    assert second["gpu_memory"] == "12.9 GB"
    assert second["driver"] == "580.65.06"
    assert second["processor"] in cpu["device"]
    assert doctor.hardware("cuda:5")["note"] == "there is no cuda:5"


@pytest.mark.parametrize("width", [60, 120])
def test_show_says_it_all(monkeypatch, width):
    card = a_card("A [bold]H200[/] \N{RIGHTWARDS ARROW}", "aaaa", 0x41, 140 * GIB, 139 * GIB)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([card]))
    fake_torch(monkeypatch, [card])
    text = _printed(width)
    for words in ("python", "cuda:0", "[bold]H200[/]", "149 GB", "150 GB", "580.65.06", "Backends", "yes"):
        assert words in text, words
    for name, reason in survey().items():
        assert name in text
        assert reason is None or reason.split()[0] in text
    assert max(map(len, text.splitlines())) <= width
