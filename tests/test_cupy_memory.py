"""What the CuPy backend takes beside the rows is what `gpuclust.cluster.memory` counts; nothing is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_rows import peak_bytes

from gpuclust.cluster.backends import cupy_wide
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.exact import Frame
from gpuclust.cluster.memory import work_bytes
from gpuclust.cluster.relief import relief

CPU = torch.device("cpu")


class Still:
    """An H100 that computes nothing."""

    def shared_memory_bytes(self, device: torch.device) -> int:
        return 227 << 10

    def multiprocessors(self, device: torch.device) -> int:
        return 132

    def blocks(self, device: torch.device) -> int:
        return 4 * 132

    def hopper(self, device: torch.device) -> bool:
        return False

    def __call__(self, *_: Any) -> None: ...


def prepared(backend: CupyBackend, r: int, k: int, d: int) -> Any:
    frame = Frame.of(torch.float32, torch.zeros(d, dtype=torch.float64), 1.0, 1.0, 1.0)
    return backend.prepare(frame, torch.empty(r, k, d), torch.float32)


@pytest.mark.parametrize(
    ("r", "k", "d"), [(10, 1, 5000), (4, 2, 20_000), (10, 5, 193_600), (2, 70, 4999), (1, 2000, 3000)]
)
def test_operands_take_twelve_bytes_of_each_value_of_the_centroids(r: int, k: int, d: int) -> None:
    backend = CupyBackend(Still())
    centroids_bytes = 4 * r * k * d
    taken = peak_bytes(lambda: prepared(backend, r, k, d)) - centroids_bytes
    assert 8 * r * k * d < taken <= 12 * r * k * d + 96 * d


@pytest.mark.parametrize("halvings", [0, 1, 4])
@pytest.mark.parametrize(
    ("r", "k", "d"),
    [
        (5, 40, 200_000),  # products of each slice
        (1, 30, 3_200_000),
        (1, 300, 5000),  # torch's products
        (2, 1000, 4096),  # streamed rows
    ],
)
def test_what_is_on_the_way_is_halved_with_the_chunks(
    r: int, k: int, d: int, halvings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cupy_wide, "multiplied", lambda a, b: torch.empty(len(a), b.shape[1]))
    backend = CupyBackend(Still())
    operand = prepared(backend, r, k, d)
    with relief(CPU) as room:
        room.begin(halvings)
        n = min(4000, backend.chunk_rows(r, k, d, CPU))
        x, norms = torch.zeros(1, d).expand(n, d), torch.zeros(n)
        labels = torch.empty(r, n, dtype=torch.int32)
        taken = peak_bytes(lambda: backend.assign(x, norms, operand, labels, "exact"))
    assert 12 * r * n < taken <= work_bytes(torch.device("cuda")) >> halvings
