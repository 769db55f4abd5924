"""What ``auto`` asks of compiled kernels before it trusts them: the torch backend's labels and sums, on this device.

A kernel depends on a compiler, a driver and a device that nobody may have tried together. The check takes some
milliseconds and the compilation that the first fit would have needed, once in a process.
"""

from __future__ import annotations

from functools import cache

import torch

from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends.base import Backend
from gpuclust.cluster.step import Course, Limits

_RESULTS = "labels", "sums", "counts", "changes", "means", "movements"
_SHAPES = ((300, 20, 7, 2, torch.float32), (130, 200, 70, 1, torch.float16))


@cache
def differs(backend: Backend, device: torch.device) -> str | None:
    """Why the backend is not to be trusted on this device: an error, or results that are not those of torch."""
    try:
        with full_precision(device):
            for shape in _SHAPES:
                if what := _compare(backend, device, *shape):
                    return f"its {what} are not those of the torch backend on this device"
    except Exception as error:  # whatever a compiler, a driver or a device may raise is the answer
        return f"its kernels fail on this device ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


def _compare(backend: Backend, device: torch.device, n: int, d: int, k: int, r: int, dtype: torch.dtype) -> str | None:
    from gpuclust.cluster.backends.torch import TorchBackend
    from gpuclust.cluster.moments import Moments
    from gpuclust.cluster.sources.base import TensorSource

    x = (torch.randn(n, d, generator=torch.Generator("cpu").manual_seed(0), device="cpu") + 0.5).to(device, dtype)
    source = TensorSource(x)
    moments = Moments.of(source)
    norms = moments.frame.norms(moments.dist2)
    # Rows lie on centroids, of which two are equal.
    centroids = x[: r * k].float().view(r, k, d).clone()
    centroids[:, 1] = centroids[:, 0]
    found = []
    for each in (backend, TorchBackend()):
        labels = torch.full((r, n), -1, dtype=torch.int32, device=device)
        each.assign(x, norms, each.prepare(moments.frame, centroids, dtype), labels, "exact")
        sums = torch.zeros(moments.grid.levels, r, k, d, dtype=torch.float64, device=device)
        counts = torch.zeros(r, k, dtype=torch.float64, device=device)
        plus = labels.clamp(0, k - 1)
        changed = torch.zeros(r, dtype=torch.int64, device=device)
        each.accumulate(x, None, moments.grid, plus, None, sums, counts, changed)
        each.accumulate(x, None, moments.grid, plus.flip(1), plus, sums, counts, changed)
        means, still = centroids.clone(), torch.zeros(r, dtype=torch.int64, device=device)
        course = Course(still, still.clone(), still.bool())
        report = each.advance(course, changed, counts + 1, sums, means, Limits(1, 0.0))
        found.append((labels, sums, counts, changed, means, report))
    for what, ours, theirs in zip(_RESULTS, *found, strict=True):
        if not torch.equal(ours, theirs):
            return what
    return None
