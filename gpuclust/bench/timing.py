"""How long a call takes: several calls in turn (A B A B ...), so that a machine that slows down slows down all of them.

On CUDA the time is between two events on the current stream, with caches flushed before the first; elsewhere it is
the wall clock's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpuclust.errors import first_line

Call = Callable[[], object]

# A cache that a GPU does not tell the size of is smaller than this; what is written to flush it is at least as large.
_FLUSHED_BYTES = 64 << 20


class Clock:
    """Times calls that work on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._flush = torch.empty(max(_FLUSHED_BYTES, 2 * cache_bytes), dtype=torch.uint8, device=device)

    def time(self, call: Call) -> float:
        """Seconds that ``call`` takes, to the end of everything that it started on torch's stream.

        A call whose attribute ``own_streams`` is true works on others, too: the time is then to the end of everything
        on the device. What a call returns is freed before the next: none pays for another's memory.
        """
        if self._flush is None:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        if getattr(call, "own_streams", False):
            torch.cuda.synchronize(self.device)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Kept:
    """A call whose result is kept as ``result``."""

    def __init__(self, call: Call, own_streams: bool = False) -> None:
        self._call, self.own_streams = call, own_streams
        self.result: Any = None

    def __call__(self) -> None:
        self.result = self._call()


class Guarded:
    """A call that keeps its first error as ``error`` and does nothing from then on: the others are still measured."""

    def __init__(self, call: Call, own_streams: bool = False) -> None:
        self.call, self.own_streams = call, own_streams
        self.error: str | None = None

    def __call__(self) -> None:
        if self.error is None:
            try:
                self.call()
            except Exception as error:
                self.error = f"{type(error).__name__}: {first_line(error)}"


def turn(clock: Clock, calls: Sequence[Call]) -> list[float]:
    """One round: seconds of each call, one after the other."""
    return [clock.time(call) for call in calls]


def in_turn(clock: Clock, calls: Sequence[Call], rounds: int, warmup: int = 0) -> list[list[float]]:
    """Seconds of each call in ``rounds`` rounds, after ``warmup`` that do not count: a list for each call.

    Python collects no garbage while it measures.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        measured = [turn(clock, calls) for _ in range(warmup + rounds)][warmup:]
    finally:
        if collecting:
            gc.enable()
    return [list(times_s) for times_s in zip(*measured, strict=True)]


def rounds_for(once_s: float, budget_s: float, least: int = 3, most: int = 20) -> int:
    """How many rounds of ``once_s`` seconds fit a budget; never fewer than ``least`` nor more than ``most``."""
    return max(least, min(most, int(budget_s / max(once_s, 1e-9))))


def spread(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile, under ``name`` with nothing, ``_p20`` and ``_p80`` in its place ``{}``."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {name.format(""): middle, name.format("_p20"): low, name.format("_p80"): high}
