"""What a call takes above what was held before it, on a GPU or of the process's memory; and the most that was held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from gpuclust.free import give_back

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Begin before the call; `peak_bytes` after it, while what it returned is still held.

    On a GPU, where torch allocates, it is torch's peak; for a library with an allocator of its own, which keeps what it
    once had, it is how much less is free. On a CPU it is the kernel's own record of the most that the process had in
    memory (Linux's VmHWM, which is set back before the call; nothing is sampled), pages of mapped files among it.
    """

    def __init__(self, device: torch.device, by_torch: bool) -> None:
        self._device, self._by_torch = device, by_torch
        self._before: int | None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        give_back(device)  # what is kept of memory that was freed would hide what the call takes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) if by_torch else torch.cuda.mem_get_info(device)[0]
        else:
            self._before = _begin()

    def peak_bytes(self) -> int | None:
        """None where it cannot be told: on a CPU whose system keeps no such record, or lets nobody set it back."""
        if self._before is None:
            return None
        if self._device.type != "cuda":
            return max(0, _of_process("VmHWM") - self._before)
        if self._by_torch:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, self._before - torch.cuda.mem_get_info(self._device)[0])


def start_peak(device: torch.device) -> None:
    """Begin to watch the device's peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The device's peak memory since `start_peak`; on a CPU the process's peak since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _begin() -> int | None:
    """Set the record of the process's memory back to what it holds now: bytes."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return _of_process("VmRSS")
    except OSError:
        return None


def _of_process(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
