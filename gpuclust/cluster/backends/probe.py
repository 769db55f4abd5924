"""What ``auto`` asks of compiled kernels before it trusts them: the torch backend's results, on this device.

A kernel depends on a compiler, a driver and a device that nobody may have tried together, and which kernel runs depends
on the problem's width, clusters and type: so the comparison is of those. It takes some milliseconds and the compilation
that the first fit would have needed, once in a process.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.cluster.step import Course, Limits

# From so many features on all kernels take the widest rows' way, whatever the width; it must be a multiple of 64, for
# what is left of a width decides how rows are loaded.
_WIDEST = 8256
# Values of the centroids: at most, so that a check is less than the fit.
_VALUES = 1 << 22


class Shape(NamedTuple):
    """Of a comparison.

    Attributes
    ----------
    n, d, k, r : int
        Rows, features, centroids of a restart, restarts.
    dtype : torch.dtype
        Of the rows.
    """

    n: int
    d: int
    k: int
    r: int
    dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem) -> Shape:
        """With the same kernels as the problem."""
        d = problem.d if problem.d <= _WIDEST else _WIDEST + problem.d % 64
        return cls(300, d, min(problem.k, max(2, _VALUES // d)), min(problem.restarts, 2), problem.dtype)


def differs(backend: Any, problem: Problem) -> str | None:
    """Why a `Backend` is not to be trusted with the problem here: an error, or results that are not those of torch."""
    try:
        return _differs(backend, problem.device, Shape.of(problem))
    except torch.OutOfMemoryError:  # another time there may be room: not kept
        return "there is no memory on this device to compare its results with torch's"


@cache
def _differs(backend: Any, device: torch.device, shape: Shape) -> str | None:
    try:
        with full_precision(device):
            what = _compare(backend, device, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a driver or a device may raise is the answer
        return f"its kernels fail on this device ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return f"its {what} are not those of the torch backend on this device" if what else None


def _compare(backend: Backend, device: torch.device, shape: Shape) -> str | None:
    """Which results are not the same; those of one backend at a time are on the device."""
    from gpuclust.cluster.backends.torch import TorchBackend

    ours, theirs = (_results(each, device, shape) for each in (backend, TorchBackend()))
    return next((name for name, result in ours.items() if not torch.equal(result, theirs[name])), None)


def _results(backend: Backend, device: torch.device, shape: Shape) -> dict[str, torch.Tensor]:
    """What each step of the backend computes, in host memory."""
    from gpuclust.cluster.moments import Moments, centroid_dtype
    from gpuclust.cluster.sources.base import TensorSource

    n, d, k, r, dtype = shape
    noise = torch.Generator("cpu").manual_seed(0)
    x = (torch.randn(n, d, generator=noise, device="cpu") + 0.5).to(device, dtype)
    weights = torch.rand(n, dtype=torch.float64, generator=noise, device="cpu").to(device)
    moments = Moments.of(TensorSource(x))
    grid, norms = moments.grid, moments.frame.norms(moments.dist2)
    # Rows lie on centroids, of which two are equal.
    centroids = torch.randn(r * k, d, generator=noise, device="cpu").to(device, centroid_dtype(dtype))
    centroids[:n] = x[: r * k]
    centroids = centroids.view(r, k, d)
    centroids[:, 1:2] = centroids[:, :1]

    labels = torch.full((r, n), -1, dtype=torch.int32, device=device)
    backend.assign(x, norms, backend.prepare(moments.frame, centroids, dtype), labels, "exact")
    sums = torch.zeros(grid.levels, r, k, d, dtype=torch.float64, device=device)
    counts = torch.zeros(r, k, dtype=torch.float64, device=device)
    changed = torch.zeros(r, dtype=torch.int64, device=device)
    # Labels that are wrong must not be read as places.
    plus = labels.clamp(0, k - 1)
    backend.accumulate(x, None, grid, plus, None, sums, counts, changed)
    backend.accumulate(x, None, grid, plus.flip(1), plus, sums, counts, changed)
    backend.accumulate(x, weights, grid, plus, plus.flip(1), sums, counts, changed)
    total = torch.zeros(grid.levels, d, dtype=torch.float64, device=device)
    backend.total(x, grid, total)
    found = {
        "labels": labels,
        "sums": sums.cpu(),
        "counts": counts,
        "changes": changed,
        "totals": total,
        "largest values": backend.largest(x),
        "distances": backend.dist2(x, centroids[0], plus[0]),
    }
    still = torch.zeros(r, dtype=torch.int64, device=device)
    course = Course(still, still.clone(), still.bool())
    found["movements"] = backend.advance(course, changed, counts + 1, sums, centroids, Limits(1, 0.0))
    found["means"] = centroids
    return {name: result.cpu() for name, result in found.items()}
