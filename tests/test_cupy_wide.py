"""The first look at wide rows: the products of product.cu, and labels by them and by torch's products."""

from __future__ import annotations

import pytest
import torch
from cases_cluster import mislabelled
from cases_contract import Case
from on_host import HostLauncher

from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends import cupy_wide
from gpuclust.cluster.backends.base import SLICE
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.kernels.launch import Launcher

# Shared memory that no tile of assign.cu fits in.
TOO_LITTLE = 9 << 10
CASES = [
    Case(131, 1100, 5, torch.float32, "plain", "relu", 1, None),
    Case(40, 1031, 20, torch.float16, "part of the columns", "offset", 1, None),
    Case(33, 200, 40, torch.bfloat16, "plain", "noise", 1, None),
    Case(50, 2056, 33, torch.float64, "columns first", "near ties", 3, None),
    Case(30, 72, 75, torch.float32, "every other row", "duplicates", 2, None),
]


@pytest.fixture
def backend(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> CupyBackend:
    if device.type == "cpu":
        # Torch multiplies float16 into float32 on CUDA only.
        monkeypatch.setattr(cupy_wide, "multiplied", lambda a, b: a.float() @ b.float())
        return CupyBackend(HostLauncher(TOO_LITTLE, falling=True))
    launcher = Launcher()
    monkeypatch.setattr(launcher, "shared_memory_bytes", lambda _: TOO_LITTLE)
    return CupyBackend(launcher)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_of_each_slice(backend: CupyBackend, device: torch.device, case: Case) -> None:
    x = case.rows(str(device))
    moments = Moments.of(TensorSource(x))
    looks = backend.prepare(moments.frame, case.centroids(x), x.dtype)
    matrix = looks.padded.view(-1, looks.padded.shape[2])
    found = backend._few(x, matrix, looks)
    wide = x.to(looks.shift.dtype)
    seen = (wide * looks.scale - looks.shift).float().half().double()
    assert found.shape == (-(-case.d // SLICE), case.n, case.restarts * case.k)
    for start, products in zip(range(0, case.d, SLICE), found, strict=True):
        part = seen[:, start : start + SLICE]
        columns = matrix[:, start : start + part.shape[1]].double()
        error = (products.double() - part @ columns.t()).abs()
        assert bool((error <= (SLICE + 1) * 2.0**-22 * (part.abs() @ columns.abs().t())).all())


@pytest.mark.parametrize("few", [256, 0], ids=["product.cu", "torch's products"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_labels(
    backend: CupyBackend, device: torch.device, case: Case, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_wide, "_FEW", few)
    monkeypatch.setattr(cupy_wide, "_PRODUCT_BYTES", 1)  # chunks of one block of rows
    x = case.rows(str(device))
    centroids = case.centroids(x)
    moments = Moments.of(TensorSource(x))
    labels = torch.full((case.restarts, case.n), -7, dtype=torch.int32, device=device)
    with full_precision(device):
        operand = backend.prepare(moments.frame, centroids, x.dtype)
        backend.assign(x, moments.frame.norms(moments.dist2), operand, labels, "exact")
    for found, given in zip(labels.cpu(), centroids, strict=True):
        assert mislabelled(found, x, given) == 0
    if device.type == "cpu":
        assert ("product" in backend.launch.launched) == bool(few)
