"""How the numbers are computed: full float32 and seeded random numbers, whatever the caller's settings of torch are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 in place of float32, deterministic cuDNN; then all as it was."""
    backends: Any = torch.backends
    operations = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
        backends.mkldnn.matmul,
    )
    precisions = [operation.fp32_precision for operation in operations]
    try:
        allow_tf32 = backends.cudnn.allow_tf32
    except RuntimeError:  # the caller set convolutions and recurrent layers apart, which `precisions` holds
        allow_tf32 = None
    deterministic, benchmark = backends.cudnn.deterministic, backends.cudnn.benchmark
    try:
        backends.cudnn.allow_tf32 = False
        for operation in operations:
            operation.fp32_precision = "ieee"
        backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        backends.cudnn.deterministic, backends.cudnn.benchmark = deterministic, benchmark
        if allow_tf32 is not None:
            backends.cudnn.allow_tf32 = allow_tf32
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from ``seed``; the caller's generators are as they were afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
