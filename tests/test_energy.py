"""The energy of a run, of cards that a fake driver plays."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from cases_driver import BIG, SMALL, fake_nvml, fake_torch

from gpuclust.energy import Energy

CUDA0 = torch.device("cuda", 0)


def test_a_card_that_counts_its_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([SMALL, BIG]))  # the driver's order, which is not torch's
    fake_torch(monkeypatch, [BIG, SMALL])
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(BIG, "millijoules", 7_000_000)
    energy = Energy(CUDA0)
    monkeypatch.setattr(BIG, "millijoules", 7_009_500)
    now[0] += 19.0
    found = energy.describe()
    assert (found["joules"], found["mean_watts"]) == (9.5, 0.5)
    assert "other processes included" in found["note"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTotalEnergyConsumption failed"),
        ("nvmlInit", "the NVIDIA driver does not answer"),
        (None, "nvidia-ml-py is not installed"),
    ],
)
def test_why_there_is_no_telling(monkeypatch: pytest.MonkeyPatch, fault: str | None, says: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([BIG], fault=fault) if fault else None)
    fake_torch(monkeypatch, [BIG])
    found = Energy(CUDA0).describe()
    assert found["joules"] is found["mean_watts"] is None
    assert says in found["note"]
    assert "\n" not in found["note"]


def test_on_a_cpu_the_driver_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml([BIG])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Energy(torch.device("cpu")).describe() == {
        "joules": None,
        "mean_watts": None,
        "note": "energy is read of NVIDIA cards, and the run was on cpu",
    }
    assert nvml.opened == []


@pytest.mark.gpu
def test_this_machines_card_draws_power() -> None:
    energy = Energy(torch.device("cuda", torch.cuda.current_device()))
    time.sleep(0.5)  # the counter moves every few hundredths of a second
    found = energy.describe()
    assert found["joules"] is None or 5 < found["mean_watts"] < 2000
