"""What tests of the CuPy backend have in common: backends of a device, ways of the first look, and a spy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_host import HostLauncher

from gpuclust.cluster.backends import cupy_wide
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.looks import Looks
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.kernels.launch import Launcher

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Shared memory that no tile of assign.cu fits in: torch multiplies; and that the larger tile of streamed rows does not.
TOO_LITTLE, LITTLE = 9 << 10, 81 << 10
# What a block can ask for.
H100, A100, L4 = 227 << 10, 163 << 10, 99 << 10
# Width and backend for each way of the first look: resident rows, a matrix product, streamed rows, Hopper's products.
HOPPER = {"hopper": True}
NARROW = [{}, {"shared_bytes": TOO_LITTLE}, HOPPER]
WAYS: list[tuple[int, dict[str, Any]]] = [*((3, way) for way in NARROW), (1030, {"shared_bytes": LITTLE})]

Make = Callable[..., CupyBackend]


def maker(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Backends of the device: with so much shared memory, on a processor with threads in falling order, for Hopper."""

    def made(shared_bytes: int | None = None, falling: bool = False, hopper: bool = False) -> CupyBackend:
        if device.type == "cpu":
            # Torch multiplies float16 into float32 on CUDA only.
            monkeypatch.setattr(cupy_wide, "multiplied", lambda a, b: a.float() @ b.float())
            return CupyBackend(HostLauncher(shared_bytes or (H100 if hopper else A100), falling, hopper))
        launcher = Launcher()
        if hopper and torch.cuda.get_device_capability(device) != (9, 0):
            pytest.skip("the products of warpgroups need compute capability 9.0")
        monkeypatch.setattr(launcher, "hopper", lambda _: hopper)
        # As many as on the processor: a few small tiles are then enough for streaming.
        monkeypatch.setattr(launcher, "multiprocessors", lambda _: 3)
        if shared_bytes:
            monkeypatch.setattr(launcher, "shared_memory_bytes", lambda _: shared_bytes)
        return CupyBackend(launcher)

    return made


def assigned(
    backend: Any, x: torch.Tensor, centroids: torch.Tensor, spoil: Callable[[Looks], Looks] | None = None, **known: Any
) -> tuple[torch.Tensor, int]:
    """Labels (r, n) of centroids (r, k, d), and how many the reference distance decided."""
    moments = Moments.of(TensorSource(x))
    operand = backend.prepare(moments.frame, centroids, x.dtype)
    operand = operand if spoil is None else spoil(operand)
    # Unwritten labels would be seen: they are a view, between others that must stay.
    held = torch.full((len(centroids), len(x) + 2), -7, dtype=torch.int32, device=x.device)
    norms = known.get("norms", moments.frame.norms(moments.dist2))
    count = backend.assign(x, norms, operand, held[:, 1:-1], known.get("precision", "exact"))
    assert count.dtype == torch.int64
    assert count.device == x.device
    assert bool((held[:, [0, -1]] == -7).all())
    return held[:, 1:-1].cpu(), int(count)


class Spy:
    """A launcher that keeps how many rows each first look left open, and the list that the second left."""

    def __init__(self, launcher: Any) -> None:
        self.launcher, self.opened, self.kernels = launcher, list[torch.Tensor](), list[str]()
        self.left, self.decides = list[tuple[torch.Tensor, ...]](), True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def __call__(self, device: torch.device, file: str, options: Any, kernel: str, *rest: Any) -> None:
        if kernel == "rescore":
            self.opened.append(rest[-5].clone())
        self.kernels.append(kernel)
        if kernel == "decide":
            self.left.append(tuple(part.cpu().clone() for part in rest[-5:-2]))
            if not self.decides:
                rest[-1].copy_(rest[-5].sum())
                return
        self.launcher(device, file, options, kernel, *rest)


def line(operand: Looks, j: int) -> tuple[Any, ...]:
    """Where centroid ``j`` of the first restart is in ``padded``."""
    columns = operand.tile.columns
    return (0, j // columns, slice(None), j % columns) if operand.tile.stages else (0, j)


def all_open(operand: Looks) -> Looks:
    """Every row gets a second look."""
    return replace(operand, terms=torch.full_like(operand.terms, math.nan))


def seeds(x: torch.Tensor, r: int, k: int) -> torch.Tensor:
    """Centroids (r, k, d) near rows and between them."""
    generator = torch.Generator().manual_seed(k)
    chosen = torch.stack([x[torch.randperm(len(x), generator=generator)[:k].to(x.device)] for _ in range(r)])
    chosen = chosen.to(centroid_dtype(x.dtype))
    return chosen * 0.7 + chosen.flip(1) * 0.3
