"""The dual solver on rows that are streamed: the bits of rows on the device, and few passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import rows

from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.sources.base import TensorSource


class Passes(TensorSource):
    """Rows that are made anew in each pass, in chunks of odd sizes whose memory is used again; passes are counted."""

    resident = False

    def __init__(self, x: torch.Tensor, sizes: tuple[int, ...] = (37, 1, 50)) -> None:
        super().__init__(x)
        self.passes, self.taken, self._sizes = 0, list[int](), sizes

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        self.passes += 1
        start = turn = 0
        while start < self.shape[0]:
            kept = self.x[start : start + min(rows, self._sizes[turn % len(self._sizes)])].clone()
            yield start, kept
            start, turn = start + len(kept), turn + 1
            kept.fill_(torch.nan)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        self.taken.append(len(index))
        return super().take(index)


def same(one: Fit, other: Fit) -> None:
    for name in ("labels", "centroids", "dist2"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.inertia, one.n_iter) == (other.inertia, other.n_iter)


def some_weights(n: int) -> torch.Tensor:
    values = np.random.RandomState(2).exponential(size=n)
    values[::3] = 0
    return torch.from_numpy(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize("kind", ["relu", "blobs", "duplicates", "one far row", "near ties"])
def test_streamed_rows_have_the_bits_of_rows_on_the_device(kind: str, init: str, dtype: torch.dtype) -> None:
    for (n, d), k in (((120, 700), 5), ((90, 33), 1), ((23, 300), 23)):
        x = rows(kind, n, d, dtype)
        options: dict[str, Any] = {"init": init, "n_init": 3, "seed": 1}
        for weights in (None, some_weights(n)):
            first = fit_kmeans(TensorSource(x), k, solver="primal", weights=weights, **options)
            same(fit_kmeans(Passes(x), k, solver="dual", weights=weights, **options), first)
