"""A run of its own process, watched from outside, and a network of wide layers for it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

N, SIDE, WIDE = 300, 64, 16


class Wide(nn.Module):
    """Six layers of 79 MB each for so many images, that cost little."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3, *[WIDE] * 6]
        self.features = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 1), nn.ReLU()) for a, b in itertools.pairwise(channels))
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDE, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(images)).flatten(1))


def network() -> nn.Module:
    """What ``cases_limit:network`` means on the command line; the process tells that it is there, and what it holds."""
    torch.manual_seed(1)
    found = Wide().eval()
    if "--memory-limit" in sys.argv:
        Path("/proc/self/clear_refs").write_text("5")
        print(f"held {held_by('self', 'VmRSS')}", flush=True)
    return found


def held_by(process: int | str, what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:")), 0)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = torch.rand(N, 3, SIDE, SIDE, generator=generator) + labels[:, None, None, None] * 0.01
    return TensorDataset(images, labels)


def run(out: Path, layers: str, *words: str) -> tuple[int, str]:
    """A run of the command, and the most that its process held above what it told, in bytes; and its messages."""
    options = f"--model cases_limit:network --n-init 1 --batch-size 8 --device cpu --workers 0 --layers {layers}"
    with subprocess.Popen(
        [sys.executable, "-m", "gpuclust", "run", "cases_limit:data", *options.split(), "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"},
    ) as process:
        assert process.stdout
        told = process.stdout.readline() if "--memory-limit" in words else ""
        # The process sets its own record back when it measures; so it is read every few milliseconds.
        peak = 0
        while told and process.poll() is None:
            peak = max(peak, held_by(process.pid, "VmHWM"))
            time.sleep(0.002)
        rest = process.stdout.read()
    assert process.returncode == 0, told + rest
    return peak - int(told.split()[1]) if told else 0, rest
