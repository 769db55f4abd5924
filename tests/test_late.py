"""Nothing in an iteration of the CuPy backend waits for the device: every operation is watched for what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_cluster import rows
from on_host import HostLauncher
from torch.utils._python_dispatch import TorchDispatchMode

from gpuclust.cluster.backends import cupy_wide
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.distributed import OneProcess
from gpuclust.cluster.late import Late
from gpuclust.cluster.lloyd import Lloyd, Weights, _Front
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import TensorSource

# Their results, or the sizes of them, are known on the device alone; `lift_fresh` is what the host's numbers come by.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount"),
    *("equal", "is_nonzero", "repeat_interleave", "lift_fresh"),
}


class Waits(TorchDispatchMode):
    """Notes the operations that would wait for a device if the tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or masks:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def loop(backend: Any, x: torch.Tensor, weights: torch.Tensor | None) -> Lloyd:
    source = TensorSource(x)
    shares = None if weights is None else Weights(weights)
    known = Moments.of(source, None if shares is None else shares.lightest)
    return Lloyd(
        *(backend, source, known, OneProcess(), shares, lambda restarts: 64, 1 << 20),
        **{"max_iter": 50, "tol": 0.0, "precision": "exact"},
    )


def watched(lloyd: Lloyd, starts: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Waits, int]:
    """What waits in the iterations of a run, and how many there were."""
    waits, iterate, count = Waits(), lloyd._iterate, 0

    def iteration(*arguments: Any) -> Late:
        nonlocal count
        count += 1
        with waits:
            return iterate(*arguments)

    monkeypatch.setattr(lloyd, "_iterate", iteration)
    lloyd.run(starts)
    return waits, count


@pytest.mark.compiler
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "d"), [(torch.float32, 6), (torch.float16, 6), (torch.float64, 6), (torch.float32, 1030)], ids=str
)
def test_an_iteration_waits_for_nothing(
    dtype: torch.dtype, d: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_wide, "multiplied", lambda a, b: a.float() @ b.float())
    x = rows("blobs", 80, d, dtype)
    weights = torch.arange(1.0, 81.0, dtype=torch.float64) if weighted else None
    starts = torch.stack([x[:5], x[20:25], x[40:45]]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    lloyd = loop(CupyBackend(HostLauncher()), x, weights)
    assert lloyd.late == 1
    waits, count = watched(lloyd, starts, monkeypatch)
    assert count > 2
    assert waits.operations > 20 * count
    assert waits.found == set()


# Operations of torch, those that only allocate or look at a part of a tensor among them, and kernels: what the host
# issues in an iteration of one chunk; benchmarks/predict.py has the first of these lines.
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("d", "weighted", "operations", "kernels"), [(6, False, 26, 10), (6, True, 39, 10), (1030, False, 32, 12)]
)
def test_what_the_host_issues_in_an_iteration(
    d: int, weighted: bool, operations: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_wide, "multiplied", lambda a, b: a.float() @ b.float())
    x = rows("noise", 200, d)
    lloyd = loop(CupyBackend(HostLauncher()), x, torch.arange(1.0, 201.0, dtype=torch.float64) if weighted else None)
    lloyd.chunk_rows = lambda restarts: 200
    front = _Front.of(x[None, :5].clone(), 200, lloyd.moments.grid.levels)
    lloyd._iterate(front, True)
    launched = lloyd.backend.launch.launched  # type: ignore[attr-defined]
    launched.clear()
    with Waits() as waits:
        lloyd._iterate(front, False)
    assert (waits.operations, len(launched)) == (operations, kernels)
    assert launched[-3:] == ["judge", "move", "close"]


def test_what_waits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("blobs", 80, 6)
    waits, _ = watched(loop(TorchBackend(), x, None), x[None, :5].clone(), monkeypatch)
    assert "nonzero" in waits.found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_overwritten_later_is_read_as_it_was(device: str) -> None:
    numbers = torch.arange(6.0, device=device).view(3, 2)
    late = Late(numbers)
    numbers.zero_()
    assert late.read() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
