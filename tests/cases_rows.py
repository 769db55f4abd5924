"""Rows as they are streamed: chunks that come anew, mapped files, and fits that must be the same; rows that change;
and the memory that tensors take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from gpuclust import KMeans
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.memory import Needs, primal_needs
from gpuclust.cluster.sources.arrays import row_dtype
from gpuclust.cluster.sources.base import TensorSource, stage_bytes


class Again:
    """Chunks that come anew in each pass; ``change`` makes another data set of the pass of a number."""

    def __init__(self, chunks: list[Any], change: Callable[[int, list[Any]], list[Any]] | None = None) -> None:
        self.chunks, self.change, self.passes = chunks, change, -2  # one look at the first chunk, one count

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from self.change(self.passes, self.chunks) if self.change else self.chunks


class OneBuffer:
    """Chunks in one array that is filled again for each, as loaders do that save memory."""

    def __init__(self, x: np.ndarray, size: int) -> None:
        self.x, self.size = x, size

    def __iter__(self) -> Iterator[np.ndarray]:
        buffer = np.empty((self.size, self.x.shape[1]), self.x.dtype)
        for start in range(0, len(self.x), self.size):
            part = self.x[start : start + self.size]
            buffer[: len(part)] = part
            yield buffer[: len(part)]
            buffer[:] = np.nan


def cut(x: Any, sizes: tuple[int, ...]) -> list[Any]:
    """``x`` in chunks of these sizes, again and again."""
    chunks, start, turn = [], 0, 0
    while start < len(x):
        size = sizes[turn % len(sizes)]
        chunks.append(x[start : start + size])
        start, turn = start + size, turn + 1
    return chunks


def mapped(folder: Path, x: np.ndarray, mode: str = "r") -> np.ndarray:
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode=mode)  # type: ignore[call-overload, no-any-return]


def needs(x: Any, k: int, lightest: float | None = None) -> Needs:
    """What the primal solver takes for rows, with weights where there is a lightest one."""
    n, d = x.shape
    return primal_needs(Problem(n, d, k, row_dtype(x), torch.device("cpu"), lightest is not None), n, lightest)


def tight(x: Any, k: int, lightest: float | None = None, *, buffers: int = 2) -> int:
    """The least memory limit for a fit of streamed rows: there is no room for a copy of them."""
    return needs(x, k, lightest).least + buffers * stage_bytes()


def same(model: KMeans, other: KMeans) -> None:
    for name in ("labels_", "cluster_centers_"):
        np.testing.assert_array_equal(np.asarray(getattr(model, name)), np.asarray(getattr(other, name)))
    assert (model.inertia_, model.n_iter_) == (other.inertia_, other.n_iter_)


class Changing(TensorSource):
    """Rows that another process writes to: ``change`` is called before they are handed out for the time ``at``."""

    def __init__(self, x: torch.Tensor, at: int, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(x)
        self.times, self._at, self._change = 0, at, change

    def _handed_out(self) -> None:
        self.times += 1
        if self.times == self._at:
            self._change(self.x)

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        self._handed_out()
        yield from super().chunks(rows)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        self._handed_out()
        return super().take(index)


def reorder(x: torch.Tensor) -> None:
    x.copy_(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))])


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that the tensors which a call makes hold at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))
