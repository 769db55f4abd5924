"""Free memory, of the machine and of the control groups around the process."""

from __future__ import annotations

from pathlib import Path

import torch

from gpuclust import free
from gpuclust.free import free_bytes


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
