"""What a call takes on a GPU, above what was held before it."""

from __future__ import annotations

import torch


class PeakMemory:
    """Begin before the call; `peak_bytes` after it, while what it returned is still held.

    Where torch allocates it is the peak; for a library with an allocator of its own, which keeps what it once had, it
    is how much less is free.
    """

    def __init__(self, device: torch.device, by_torch: bool) -> None:
        self._device, self._by_torch = device, by_torch
        self._before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) if by_torch else torch.cuda.mem_get_info(device)[0]

    def peak_bytes(self) -> int | None:
        """None where it cannot be told: on a CPU."""
        if self._device.type != "cuda":
            return None
        if self._by_torch:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, self._before - torch.cuda.mem_get_info(self._device)[0])
