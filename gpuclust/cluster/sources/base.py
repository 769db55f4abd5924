"""Where the rows come from: a chunk source hands them out in order, chunk by chunk, as often as it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from gpuclust.cluster.backends.base import SLICE
from gpuclust.cluster.distributed import Block
from gpuclust.cluster.relief import relieved
from gpuclust.config import environment

# Bytes of scores that are held at a time: what a processor's cache takes, or what keeps a GPU busy.
_PIECE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Pieces of a chunk.
_PIECES = {"cuda": 4}
# Bytes of lists of the rows of a chunk, and what a row takes in them for each restart.
_LIST_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_LISTED_BYTES = 128
# Bytes of rows that are on their way to a device, or out of a file, at a time.
_STAGE_BYTES = 64 << 20
# Values whose float64 copy is cheap to hold: it stays in a processor's cache, or fills a GPU.
_BLOCK_VALUES = {"cuda": 1 << 23}
# Rows that share one reading of what they are multiplied with.
_TILE_ROWS = 128


class ChunkSource(Protocol):
    """Rows of one data set, in a fixed order. ``gpuclust.capture.store.LayerStore`` is one, too.

    One whose rows are streamed may say in ``pass_s`` how many seconds a pass over all of them takes, by which a solver
    is chosen.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    # Whether the rows lie on the device, so that `take` costs no more than the rows that it takes.
    resident: bool

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield ``(start, x)`` with ``x`` of shape ``(b, d)``, ``b <= rows``, for all rows in order.

        ``x`` is only read, and only until the next is asked for: its memory may be used again.
        """
        ...

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """The rows at ``index`` (m,), as ``(m, d)``."""
        ...


class TensorSource:
    """The rows of a tensor ``(n, d)``, on whatever device, of whatever strides. Chunks are views: nothing is copied."""

    resident = True

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.shape = (x.shape[0], x.shape[1])
        self.dtype = x.dtype
        self.device = x.device

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.shape[0], rows):
            yield start, self.x[start : start + rows]

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self.x.index_select(0, index)


class WatchedSource:
    """The rows of another source; ``tell`` hears of every chunk that is handed out: its first row and their number."""

    def __init__(self, source: ChunkSource, tell: Callable[[int, int], None]) -> None:
        self._source, self._tell = source, tell
        self.shape, self.dtype, self.device, self.resident = source.shape, source.dtype, source.device, source.resident
        self.pass_s: float = getattr(source, "pass_s", 0.0)

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start, x in self._source.chunks(rows):
            self._tell(start, x.shape[0])
            yield start, x

    def take(self, index: torch.Tensor) -> torch.Tensor:
        return self._source.take(index)


def take_rows(source: ChunkSource, block: Block, index: torch.Tensor) -> torch.Tensor:
    """The rows with these numbers (m,) among the rows of all processes, to the bit: (m, d) in every process."""
    if block.group.size == 1:
        return source.take(index)
    here, local = block.place(index)
    rows = torch.zeros(len(index), source.shape[1], dtype=source.dtype, device=source.device)
    rows[here] = source.take(local)
    # One process has the bytes of a row, the others zeros.
    return block.sum(rows.view(torch.uint8)).view(source.dtype)


def block_rows(d: int, device: torch.device) -> int:
    """Rows of width ``d`` whose float64 copy is cheap to hold; one at least."""
    return relieved(_BLOCK_VALUES.get(device.type, 1 << 18) // d)


def tile_rows(d: int, device: torch.device) -> int:
    """Rows that are multiplied at a time, a tile of features after another where all of them would be too many."""
    return max(relieved(_TILE_ROWS), block_rows(d, device))


def tiles(rows: int, d: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``d`` features; so many rows' float64 copy of one is cheap to hold."""
    width = block_rows(rows, device)
    return (slice(start, min(d, start + width)) for start in range(0, d, width))


def piece_rows(clusters: int, d: int, device: torch.device) -> int:
    """Rows of width ``d`` whose scores, with ``clusters`` in all, are cheap to hold, and a slice of which is no more
    than eight times that as float64. GPUCLUST_CHUNK_BYTES sets the bytes of the scores; no result depends on them."""
    return relieved(_piece_rows(clusters, d, device))


def _piece_rows(clusters: int, d: int, device: torch.device) -> int:
    size = environment().chunk_bytes or _PIECE_BYTES.get(device.type, 16 << 20)
    return max(16, min(size // (4 * clusters), size // min(d, SLICE)))


def chunk_rows(clusters: int, d: int, device: torch.device, restarts: int = 1) -> int:
    """Rows of a chunk: so many pieces that what is done once for a chunk costs little, and lists of rows little too."""
    most = _LIST_BYTES.get(device.type, 16 << 20) // (_LISTED_BYTES * restarts)
    return relieved(max(16, min(_PIECES.get(device.type, 16) * _piece_rows(clusters, d, device), most)))


def listed_rows(row_bytes: int, device: torch.device) -> int:
    """Rows of a chunk of which nothing is stored but lists, so many bytes for each; no result depends on it."""
    size = environment().chunk_bytes or _LIST_BYTES.get(device.type, 16 << 20)
    return relieved(max(16, size // row_bytes))


def stage_bytes(memory_limit: int | None = None) -> int:
    """Bytes of one of the two buffers that rows pass through; GPUCLUST_CHUNK_BYTES sets them, too."""
    size = environment().chunk_bytes or _STAGE_BYTES
    return size if memory_limit is None else min(size, memory_limit // 8)
