"""How the numbers are computed: full float32 and seeded random numbers, whatever the caller's settings of torch are."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import torch

# So many elements for each thread of torch, and an operation uses all of them.
_GRAIN = 1 << 15


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, plain float32, deterministic cuDNN, `subnormals` as they are; then all as it was.

    Some of that is set for the whole process. Threads may overlap: the first saves the caller's settings, and the last
    brings them back.
    """
    with _SETTINGS.held(), subnormals(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def subnormals(device: torch.device) -> Iterator[None]:
    """Subnormal numbers count as they are, though the caller had torch flush them to zero; then all as it was.

    `torch.set_flush_denormal` sets the calling thread alone. Worker threads of torch have what they inherited when they
    began, which nothing can change. Where they flush, the calling thread computes without them, and a warning says so.
    """
    flushed = sys.float_info.min * 0.5 == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    threads = torch.get_num_threads()
    alone = device.type == "cpu" and _workers_flush(threads)
    try:
        if alone:
            warnings.warn(
                "torch's worker threads take subnormal numbers for zero, since torch.set_flush_denormal(True) was "
                "called before they began: gpuclust computes exactly, in one thread. Call it after the first large "
                "operation of torch, or not at all",
                UserWarning,
                stacklevel=2,
            )
            torch.set_num_threads(1)
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)
        if flushed:
            torch.set_flush_denormal(True)


def _workers_flush(threads: int) -> bool:
    """Whether one of the worker threads takes subnormal numbers for zero: each of them compares some with it."""
    least = torch.tensor(math.ulp(0.0), dtype=torch.float64, device="cpu")
    return threads > 1 and not bool((least.expand(threads * _GRAIN) > 0).all())


class _Settings:
    """torch's settings of the process that bear on precision, and who needs them to be full."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holders = 0
        self._before: list[tuple[Any, str, Any]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Full precision until the block, and every other that began meanwhile, has ended."""
        with self._lock:
            if not self._holders:
                self._before = self._read()
            self._holders += 1
        try:
            with self._lock:
                for owner, name, full in self._full():
                    setattr(owner, name, full)
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    for owner, name, value in self._before:
                        setattr(owner, name, value)

    @staticmethod
    def _full() -> list[tuple[Any, str, Any]]:
        """Whose setting, its name, and its value at full precision, in an order that they can be set in."""
        backends: Any = torch.backends
        cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
        operations = (cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
        return [
            (cudnn, "deterministic", True),
            (cudnn, "benchmark", False),
            (cudnn, "allow_tf32", False),
            *((operation, "fp32_precision", "ieee") for operation in operations),
        ]

    def _read(self) -> list[tuple[Any, str, Any]]:
        found = []
        for owner, name, _ in self._full():
            # allow_tf32 cannot be read where the caller set convolutions and recurrent layers apart, which are here too
            with suppress(RuntimeError):
                found.append((owner, name, getattr(owner, name)))
        return found


_SETTINGS = _Settings()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from ``seed``; the caller's generators are as they were afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
