"""How the numbers are computed: full float32 and seeded random numbers, whatever the caller's settings of torch are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 in place of float32, deterministic cuDNN; then all as it was.

    Some of that is set for the whole process. Threads may overlap: the first saves the caller's settings, and the last
    brings them back.
    """
    with _SETTINGS.held(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


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
