"""The CuPy backend: CUDA C++ kernels on NVIDIA GPUs from compute capability 8.0.

Three looks, each at fewer rows: float16 on the tensor cores (``assign.cu``, of resident or streamed rows, or torch's
product and ``select.cu``), there again with operands of two float16 parts (``rescore.cu``), the reference distance
(``decide.cu``). What a look leaves open is in a list on the device, whose length the host never asks for: nothing waits
in a pass. torch allocates every buffer.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from gpuclust.cluster.backends.base import Operand, Problem
from gpuclust.cluster.backends.cupy_rows import WIDE, RowKernels
from gpuclust.cluster.backends.cupy_rows import strided as _rows
from gpuclust.cluster.backends.cupy_wide import WideLook
from gpuclust.cluster.backends.looks import Looks
from gpuclust.cluster.backends.probe import differs
from gpuclust.cluster.backends.tile import MOST_PARTS, Tile
from gpuclust.cluster.backends.tile import blocks as _blocks
from gpuclust.cluster.backends.tile import up as _up
from gpuclust.cluster.exact import Frame
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.sources.base import listed_rows
from gpuclust.cluster.step import Course, Limits
from gpuclust.cluster.sums import Grid
from gpuclust.kernels.launch import Launcher

# As in the kernels' files.
_OWNERS = 128
_THREADS, _ROWS_ACCUMULATED = 256, 64
# Shared memory for the sums of the first pass: two blocks of a multiprocessor.
_SUMS_BYTES = 80 << 10
# Widest row that a block of `decide` holds in shared memory, as float32.
_RESIDENT = 8192
# Terms of a fixed-tree sum of two levels before those that shared memory holds.
_SHORT = 4096
_Lists = tuple[torch.Tensor | None, torch.Tensor | None]


class CupyBackend(RowKernels, WideLook):
    """k-means steps as CUDA kernels.

    Parameters
    ----------
    launcher : callable
        What launches them; see `gpuclust.kernels.launch.Launcher`.
    """

    name = "cupy"
    waits = False

    def __init__(self, launcher: Any = None) -> None:
        self.launch = launcher or _launcher()

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("cupy") is None:
            return "cupy is not installed (pip install 'gpuclust[cupy]')"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if torch.version.cuda is None:
            return "this torch is not built for NVIDIA's CUDA"
        best = max((torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), default=(0, 0))
        if best < (8, 0):
            return f"its kernels need compute capability 8.0; this machine has {best[0]}.{best[1]}"
        return None

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"its kernels run on CUDA devices; X is on {problem.device.type}"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < (8, 0):
            return f"its kernels need compute capability 8.0; {problem.device} has {capability[0]}.{capability[1]}"
        if max(problem.d, problem.k) >= 2**31:
            return f"its kernels take fewer than 2**31 features and clusters; got d={problem.d}, k={problem.k}"
        return None

    def reserved(self, problem: Problem) -> str | None:
        return differs(self, problem)

    def chunk_rows(self, r: int, k: int, d: int, device: torch.device) -> int:
        """Rows of a chunk: no scores are stored, and the lists of open rows have 12 bytes for each."""
        return listed_rows(12 * r, device)

    def prepare(self, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Looks:
        _, k, d = centroids.shape
        return Looks.of(self.launch, frame, centroids, dtype, self._tile(k, d, centroids.device))

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, precision: str
    ) -> torch.Tensor:
        assert isinstance(operand, Looks)
        assert labels.stride(1) == 1
        assert norms.is_contiguous()
        r, k, d = operand.centroids.shape
        n, device = x.shape[0], x.device
        counts = torch.zeros(2, r, dtype=torch.int32, device=device)
        open_, left = labels.new_empty(2, r, n)
        upper = torch.empty(r, n, dtype=torch.float32, device=device)
        look = self._multiply if not operand.tile.rows else self._stream if operand.tile.streamed else self._assign
        if precision == "fast":  # the least score, without bounds
            scores = torch.stack([operand.terms[..., 0] + operand.reach / 2, torch.zeros_like(operand.reach)], 2)
            look(x, norms, replace(operand, terms=scores), labels, (None, None))
            return torch.zeros((), dtype=torch.int64, device=device)
        look(x, norms, operand, labels, (counts[0], open_))

        fine = operand.finer
        seen = (*_rows(x), fine.shift, fine.scale, norms)
        held, shared_bytes = fine.room(self.launch.shared_memory_bytes(device))
        resident, decided = d <= _RESIDENT, torch.empty((), dtype=torch.int64, device=device)
        found = k, r, labels, labels.stride(0)
        lists_left = (counts[1], left, upper)
        grid, options = (self.launch.blocks(device), 1), self._options(x)
        self.launch(
            device, "rescore.cu", (*options, f"-DWARPS={fine.warps}"), "rescore", grid, fine.threads, shared_bytes,
            *seen, fine.parts, fine.parts.shape[2], held, fine.terms, fine.reach, *found, counts[0], open_, *lists_left,
        )  # fmt: skip
        self.launch(
            device, "decide.cu", (*options, f"-DCENTRE={WIDE[operand.centroids.dtype]}", *_tree(d)), "decide", grid,
            _THREADS, 4 * d if resident else 0, *seen, fine.matrix, fine.terms, fine.terms.shape[1], operand.centroids,
            *found, *lists_left, resident, decided,
        )  # fmt: skip
        return decided

    def accumulate(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        grid: Grid,
        plus: torch.Tensor,
        minus: torch.Tensor | None,
        sums: torch.Tensor,
        counts: torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        levels, r, k, d = sums.shape
        n, device, options = x.shape[0], x.device, self._options(x)
        assert sums.stride()[2:] == (d, 1)
        assert counts.is_contiguous()
        assert plus.stride(1) == 1
        assert minus is None or minus.stride(1) == 1
        assert weights is None or weights.is_contiguous()
        labels = (plus, plus.stride(0), minus, 0 if minus is None else minus.stride(0))
        self.launch(
            device, "accumulate.cu", options, "count", (_blocks(n, _THREADS), r), _THREADS, 0, n, *labels, k, counts,
            changed,
        )  # fmt: skip
        magic = grid.constants
        shared_bytes = levels * k * _OWNERS * 8
        if minus is None and shared_bytes <= _SUMS_BYTES:
            spans = min(_blocks(d, _OWNERS), MOST_PARTS)
            rows = max(_ROWS_ACCUMULATED, _blocks(n, _blocks(8 * self.launch.blocks(device), spans)))
            for restart in range(r):
                self.launch(
                    device, "accumulate.cu", options, "first", (_blocks(n, rows), spans), _OWNERS, shared_bytes,
                    *_rows(x), weights, magic, levels, plus[restart], k, rows, sums[:, restart], sums.stride(0),
                )  # fmt: skip
            return
        blocks = _blocks(n, _ROWS_ACCUMULATED), min(_blocks(d, _THREADS), MOST_PARTS)
        self.launch(
            device, "accumulate.cu", options, "accumulate", blocks, _THREADS, 0,
            *_rows(x), weights, magic, levels, *labels, k, r, sums, sums.stride(0), sums.stride(1),
        )  # fmt: skip

    def advance(
        self,
        course: Course,
        changed: torch.Tensor,
        masses: torch.Tensor,
        sums: torch.Tensor,
        centroids: torch.Tensor,
        limits: Limits,
    ) -> torch.Tensor:
        (r, k, d), device = centroids.shape, centroids.device
        options = f"-DROW={WIDE[centroids.dtype]}", *_tree(max(k, d))
        does, passes, closing = course
        report, shifts = masses.new_empty(r, 2), masses.new_empty(r, k)
        assert centroids.is_contiguous()
        assert masses.is_contiguous()
        assert sums.stride()[2:] == (d, 1)
        judged = changed, masses, k, does, passes, closing, report
        self.launch(device, "step.cu", options, "judge", (r, 1), _THREADS, 0, *judged)
        self.launch(
            device, "step.cu", options, "move", (k, r), _THREADS, 0,
            centroids, k, d, sums, sums.shape[0], sums.stride(0), sums.stride(1), masses, report, shifts,
        )  # fmt: skip
        closed = shifts, k, limits.max_iter, float(limits.tol), passes, closing, report
        self.launch(device, "step.cu", options, "close", (r, 1), _THREADS, 0, *closed)
        return report

    def _assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Looks, labels: torch.Tensor, lists: _Lists
    ) -> None:
        """The first look: product and argmin in one kernel."""
        r, k, d = operand.centroids.shape
        tile, n, device = operand.tile, x.shape[0], x.device
        rest = (tile.stages,) if tile.stages else (tile.padded(k) // tile.columns, None)
        self.launch(
            device, tile.file, (*self._options(x), *tile.options), "assign",
            (tile.blocks(n, self.launch.multiprocessors(device)), 1), tile.threads, tile.shared_bytes(d), *_rows(x),
            operand.shift, operand.scale, norms, operand.padded, tile.width(d), operand.terms, operand.reach, k, r,
            labels, labels.stride(0), *lists, *rest,
        )  # fmt: skip

    def _stream(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Looks, labels: torch.Tensor, lists: _Lists
    ) -> None:
        """The first look at wider rows: a chunk as float16, its tiles with all centroids, and `merge`."""
        r, k, _ = operand.centroids.shape
        n, device, options, tile = x.shape[0], x.device, self._options(x), operand.tile
        _, padded, width = operand.padded.shape
        size, column_tiles = _up(relieved(tile.chunk_rows(width)), tile.rows), padded // tile.columns
        # Whole tiles: of what lies beyond the last row only products come that nobody reads.
        seen = torch.empty(_up(min(n, size), tile.rows), width, dtype=torch.float16, device=device)
        for first in range(0, n, size):
            some, far = x[first : first + size], norms[first:]
            rows = some.shape[0]
            span = tile.span(rows, column_tiles, r, self.launch.multiprocessors(device))
            spans = _blocks(column_tiles, span)
            parts = norms.new_empty(r, spans, rows, 3)
            self.launch(
                device, "select.cu", options, "convert", (_blocks(rows * width, 8 * _THREADS), 1), _THREADS, 0,
                *_rows(some), operand.shift, operand.scale, width, seen,
            )  # fmt: skip
            self.launch(
                device, "assign.cu", ("-DROW=Float16", *tile.options), "assign", (_blocks(rows, tile.rows), r * spans),
                tile.threads, tile.shared_bytes(width), *_rows(seen[:rows]), None, 1.0, far, operand.padded, width,
                operand.terms, operand.reach, k, r, None, 0, None, None, span, parts,
            )  # fmt: skip
            self.launch(
                device, "select.cu", options, "merge", (_blocks(rows, _THREADS), 1), _THREADS, 0, parts, rows, spans,
                far, operand.terms, operand.reach, padded, r, labels[:, first:], labels.stride(0), *lists, n, first,
            )  # fmt: skip

    def _tile(self, k: int, d: int, device: torch.device) -> Tile:
        launch = self.launch
        return Tile.of(k, d, launch.shared_memory_bytes(device), launch.multiprocessors(device), launch.hopper(device))


@cache
def _launcher() -> Launcher:
    """One for all fits: it keeps the kernels that it loaded."""
    return Launcher()


def _tree(length: int) -> tuple[str, ...]:
    """For the compiler, where a fixed-tree sum is of no more than so many terms: fewer levels, and registers."""
    return ("-DTREE_LEVELS=2",) if length <= _SHORT else ()
