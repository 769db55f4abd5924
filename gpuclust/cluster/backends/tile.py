"""The tiles that ``kernels/cuda/assign.cu`` cuts a product of rows and centroids into, and which shapes it takes."""

from __future__ import annotations

from dataclasses import dataclass

from gpuclust.cluster.backends.base import SLICE

# As in the kernel's file.
DEPTH, STAGES = 32, 4
# Bytes of float16 rows that stay in a GPU's second-level cache, with room for the centroids that pass by them.
_SEEN_BYTES = 24 << 20
# The widest rows that are streamed: so many of them are in that cache (3072) that reading the centroids once for each
# such chunk, from the device's memory, is a twentieth of the time of their products.
_WIDEST = 4096
# Spans of all restarts: the second dimension of a grid, at most.
_MOST_PARTS = 65535
# Static shared memory of a block, at most.
_STATIC_BYTES = 8 << 10


@dataclass(frozen=True)
class Tile:
    """What a block of ``assign.cu`` multiplies at a time.

    Attributes
    ----------
    columns : int
        Centroids.
    rows : int
        0 where a matrix product of torch's takes the kernel's place.
    streamed : bool
        Whether the rows, converted beforehand, go through the ring of shared memory beside the centroids; else they lie
        in shared memory with all their features.
    """

    columns: int
    rows: int
    streamed: bool = False

    @classmethod
    def of(cls, k: int, d: int, shared_bytes: int, multiprocessors: int) -> Tile:
        """The tile for ``k`` centroids of width ``d``, on a device whose blocks can have so much shared memory.

        Streamed rows are taken only where a chunk of them has tiles for four fifths of the device: with fewer
        centroids the memory bounds the time, and a matrix product keeps all of the device busy.
        """
        columns = 32 if k <= 32 else 64 if k <= 64 else 128
        for rows in (128, 64):
            tile = cls(columns, rows)
            if d <= SLICE and tile.shared_bytes(d) <= shared_bytes - _STATIC_BYTES:
                return tile
        for rows in (192, 96):
            tile = cls(128, rows, streamed=True)
            if d <= _WIDEST and tile.shared_bytes(d) <= shared_bytes - _STATIC_BYTES:
                tiles = blocks(tile.chunk_rows(d), rows) * blocks(k, tile.columns)
                return tile if 5 * tiles >= 4 * multiprocessors else cls(columns, 0)
        return cls(columns, 0)

    @property
    def warps(self) -> int:
        """Side by side: each has 64 centroids at most."""
        return 2 if self.columns == 128 else 1

    @property
    def threads(self) -> int:
        """Of a block; each warp has 32 rows, or 48 streamed ones."""
        return self.rows // (48 if self.streamed else 32) * self.warps * 32

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        tiles = self.columns // (8 * self.warps)
        streamed = ("-DSTREAMED_ROWS",) if self.streamed else ()
        return (*streamed, f"-DBLOCK_ROWS={self.rows}", f"-DWARPS={self.warps}", f"-DTILES={tiles}")

    def width(self, d: int) -> int:
        """Features, with zeros up to whole pieces of the ring."""
        return up(d, DEPTH)

    def shared_bytes(self, d: int) -> int:
        """Shared memory of a block for rows of width ``d``."""
        lines = self.columns + (self.rows if self.streamed else 0)
        resident = 0 if self.streamed else self.rows * (self.width(d) + 8)
        return 2 * (resident + STAGES * lines * (DEPTH + 8))

    def chunk_rows(self, d: int) -> int:
        """Streamed rows that are converted at a time: whole tiles, that stay in the cache until they are multiplied."""
        return max(1, _SEEN_BYTES // (2 * self.width(d)) // self.rows) * self.rows

    def span(self, n: int, column_tiles: int, r: int, multiprocessors: int) -> int:
        """Tiles of centroids that a block passes by its streamed rows: what ends first, with a block a multiprocessor.

        A tenth of a tile's time is lost at the beginning and end of a block.
        """
        at_once = blocks(n, self.rows) * r

        def time(span: int) -> float:
            return blocks(at_once * blocks(column_tiles, span), multiprocessors) * (span + 0.1)

        most = min(column_tiles, 64, max(1, _MOST_PARTS // r))
        return min(sorted({blocks(column_tiles, spans) for spans in range(1, most + 1)}), key=time)


def up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return blocks(value, step) * step


def blocks(values: int, size: int) -> int:
    """How many blocks of ``size`` hold so many values."""
    return -(-values // size)
