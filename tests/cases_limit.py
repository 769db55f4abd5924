"""A run of its own process, watched from outside, and a network of many layers for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gpuclust.bench.memory import held_by

N, SIDE = 1000, 32


class Deep(nn.Module):
    """One wide layer and many that a thousand images make 16 MB wide, and cost little."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(24, 4, 1), nn.ReLU())
        self.rest = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(27)))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.rest(self.down(self.first(images)))).flatten(1))


def network() -> nn.Module:
    """What ``cases_limit:network`` means on the command line; the process tells that it is there, and what it holds."""
    torch.manual_seed(1)
    found = Deep().eval()
    if "--memory-limit" in sys.argv:
        Path("/proc/self/clear_refs").write_text("5")
        print(f"held {held_by('self', 'VmRSS')}", flush=True)
    return found


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = torch.rand(N, 3, SIDE, SIDE, generator=generator) + labels[:, None, None, None] * 0.2
    return TensorDataset(images, labels)


def run(out: Path, *words: str) -> tuple[int, str]:
    """A run of the command, and the most that its process held above what it told, in bytes; and its messages."""
    command = [sys.executable, "-m", "gpuclust", "run", "cases_limit:data", "--model", "cases_limit:network"]
    with subprocess.Popen(
        [*command, "--out", str(out), "--n-init", "1", "--batch-size", "8", "--device", "cpu", *words],
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
