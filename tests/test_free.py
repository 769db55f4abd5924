"""Free memory, of the machine and of the control groups around the process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_driver import BIG, GIB, SMALL, a_card, fake_nvml, fake_torch

from gpuclust import free
from gpuclust.free import free_by, free_bytes


def test_free_memory_of_this_machine():
    assert 10**8 < free_bytes(torch.device("cpu")) < 10**14


def test_meminfo(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   42 kB\n")
    assert free._available(meminfo) == 42 * 1024
    assert free._available(tmp_path / "absent") > 10**8


def group(folder: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(usage), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_control_group_version_2_takes_the_tightest_of_the_ancestors(tmp_path: Path):
    (tmp_path / "self").write_text("0::/outer/inner\n")
    names = ("memory.max", "memory.current")
    group(tmp_path / "outer/inner", names, "max", 50, "inactive_file 5")
    group(tmp_path / "outer", names, "1000", 300, "anon 1\ninactive_file 100")
    assert free._group_free(tmp_path / "self", tmp_path) == 800
    group(tmp_path / "outer/inner", names, "200", 50, "inactive_file 5")
    assert free._group_free(tmp_path / "self", tmp_path) == 155


def test_control_group_version_1_and_a_containers_own_root(tmp_path: Path):
    (tmp_path / "self").write_text("9:cpu:/\n4:memory:/docker/name\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "memory", names, "1000", 400, "total_inactive_file 50")
    assert free._group_free(tmp_path / "self", tmp_path) == 650


def test_no_control_group_is_no_limit(tmp_path: Path):
    assert free._group_free(tmp_path / "absent", tmp_path) is None
    (tmp_path / "self").write_text("0::/\n")
    assert free._group_free(tmp_path / "self", tmp_path) is None


CUDA1 = torch.device("cuda", 1)


def play(
    monkeypatch: pytest.MonkeyPatch,
    *,
    nvml: Any,
    cards: Any = (BIG, SMALL),
    fraction: float = 1.0,
    uuids: bool = True,
    runtime: int = 3 * GIB,
    held: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Let torch see these cards, and its allocator hold bytes: reserved, of them in use, of them in gaps."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    fake_torch(monkeypatch, list(cards), uuids=uuids)
    names = ("reserved_bytes.all.current", "active_bytes.all.current", "inactive_split_bytes.all.current")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (runtime, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(zip(names, held, strict=True)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)


def test_the_runtime_and_the_driver_agree_on_the_card_that_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, nvml=fake_nvml([SMALL, BIG]))  # the driver numbers them the other way round
    assert free_by(CUDA1) == {"CUDA": 3 * GIB, "the driver": 3 * GIB}
    assert free_bytes(CUDA1) == 3 * GIB


def test_a_card_is_found_by_its_slot_where_uuids_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, nvml=fake_nvml([SMALL, BIG]), uuids=False)
    assert free_by(CUDA1)["the driver"] == 3 * GIB


def test_a_card_is_found_by_its_uuid_where_slots_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml([a_card("NVIDIA RTX A2000", "bbbb", 0x99, 12 * GIB, 3 * GIB)])
    play(monkeypatch, nvml=nvml)
    assert free_by(CUDA1)["the driver"] == 3 * GIB


def test_of_what_torch_holds_the_gaps_between_tensors_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, nvml=fake_nvml([SMALL, BIG]), held=(6 * GIB, 3 * GIB, GIB))
    assert free_by(CUDA1) == {"CUDA": 5 * GIB, "the driver": 5 * GIB}


def test_a_slice_of_a_card_has_what_the_runtime_says(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = a_card("NVIDIA RTX A2000", "bbbb", 0x02, 12 * GIB, 9 * GIB)
    play(monkeypatch, nvml=fake_nvml([whole]), runtime=2 * GIB)
    assert free_by(CUDA1)["the driver"] == 9 * GIB
    assert free_bytes(CUDA1) == 2 * GIB


def test_a_memory_fraction_counts_what_torch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, nvml=fake_nvml([SMALL]), fraction=0.5, held=(5 * GIB, 2 * GIB, GIB))
    assert free_by(CUDA1) == {"CUDA": 5 * GIB, "the driver": 5 * GIB, "torch's memory fraction": 3 * GIB}
    assert free_bytes(CUDA1) == 3 * GIB
    play(monkeypatch, nvml=fake_nvml([SMALL]), fraction=0.25, held=(5 * GIB, 5 * GIB, 0))
    assert free_bytes(CUDA1) == 0


@pytest.mark.parametrize("fault", ["nvmlInit", "nvmlDeviceGetMemoryInfo", None])
def test_without_the_driver_the_runtime_is_believed(monkeypatch: pytest.MonkeyPatch, fault: str | None) -> None:
    play(monkeypatch, nvml=fake_nvml([SMALL], fault=fault) if fault else None)
    assert free_by(CUDA1) == {"CUDA": 3 * GIB}


def test_the_drivers_library_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml([SMALL])
    play(monkeypatch, nvml=nvml)
    assert free_bytes(CUDA1) == free_bytes(CUDA1)
    assert nvml.opened == [True]


@pytest.mark.gpu
def test_the_runtime_and_the_driver_of_this_machine_agree() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    found = free_by(device)
    # What the driver keeps for itself is counted by one of them alone.
    assert abs(found["CUDA"] - found["the driver"]) < GIB
    before = free_bytes(device)
    held = torch.empty(GIB, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) == pytest.approx(GIB, rel=0.1)
    del held  # torch keeps it, and can give it back
    assert free_bytes(device) == pytest.approx(before, rel=0.01)
