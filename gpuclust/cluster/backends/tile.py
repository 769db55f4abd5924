"""The tiles that ``kernels/cuda/assign.cu`` and ``assign_hopper.cu`` cut a product of rows and centroids into, and the
shapes that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuclust.cluster.backends.base import SLICE

# As in the kernels' files: of assign.cu, and of assign_hopper.cu (its pieces are those of product.cu, too).
DEPTH, STAGES = 32, 4
PIECE, _GROUP_ROWS, _MOST_STAGES = 64, 64, 16
# Bytes of float16 rows that stay in a GPU's second-level cache, with room for the centroids that pass by them.
_SEEN_BYTES = 24 << 20
# The widest rows that are streamed: so many of them are in that cache (3072) that reading the centroids once for each
# such chunk, from the device's memory, is a twentieth of the time of their products.
_WIDEST = 4096
# The second dimension of a grid, at most.
MOST_PARTS = 65535
# Static shared memory of a block, at most.
_STATIC_BYTES = 8 << 10


@dataclass(frozen=True)
class Tile:
    """What a block of ``assign.cu``, or of ``assign_hopper.cu``, multiplies at a time.

    Attributes
    ----------
    columns : int
        Centroids.
    rows : int
        0 where a matrix product of torch's takes the kernel's place.
    streamed : bool
        Whether the rows, converted beforehand, go through the ring of shared memory beside the centroids; else they lie
        in shared memory with all their features.
    stages : int
        Pieces of the ring of ``assign_hopper.cu``; 0 where it is ``assign.cu``.
    """

    columns: int
    rows: int
    streamed: bool = False
    stages: int = 0

    @classmethod
    def of(cls, k: int, d: int, shared_bytes: int, multiprocessors: int, hopper: bool = False) -> Tile:
        """The tile for ``k`` centroids of width ``d``, on a device whose blocks can have so much shared memory.

        Streamed rows are taken only where a chunk of them has tiles for four fifths of the device: with fewer
        centroids the memory bounds the time, and a matrix product keeps all of the device busy.
        """
        columns = 32 if k <= 32 else 64 if k <= 64 else 128
        if hopper and d <= SLICE:
            # Warpgroups share each reading of the centroids; fewer where the ring would be too short to bring them.
            for groups, least in ((4, 4), (3, 4), (2, 2), (1, 2)):
                tile = cls(columns, groups * _GROUP_ROWS, stages=1)
                left = shared_bytes - _STATIC_BYTES // 8 - tile.shared_bytes(d)
                stages = min(_MOST_STAGES, 1 + left // tile._stage_bytes)
                if stages >= least:
                    return replace(tile, stages=stages)
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
    def groups(self) -> int:
        """Warpgroups of ``assign_hopper.cu``, with 64 rows each; 0 where it is ``assign.cu``."""
        return self.rows // _GROUP_ROWS if self.stages else 0

    @property
    def file(self) -> str:
        return "assign_hopper.cu" if self.stages else "assign.cu"

    @property
    def threads(self) -> int:
        """Of a block; each warp of ``assign.cu`` has 32 rows, or 48 streamed ones."""
        if self.stages:
            return (self.groups + 1) * 128
        return self.rows // (48 if self.streamed else 32) * self.warps * 32

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        if self.stages:
            return f"-DCOLUMNS={self.columns}", f"-DGROUPS={self.groups}"
        tiles = self.columns // (8 * self.warps)
        streamed = ("-DSTREAMED_ROWS",) if self.streamed else ()
        return (*streamed, f"-DBLOCK_ROWS={self.rows}", f"-DWARPS={self.warps}", f"-DTILES={tiles}")

    def blocks(self, n: int, multiprocessors: int) -> int:
        """Of a grid for ``n`` rows; those of ``assign_hopper.cu`` stay, one on each multiprocessor."""
        return min(blocks(n, _GROUP_ROWS), multiprocessors) if self.stages else blocks(n, self.rows)

    def padded(self, k: int) -> int:
        """Centroids, with others up to whole tiles; as they are where the tile has no rows."""
        return up(k, self.columns) if self.rows else k

    def width(self, d: int) -> int:
        """Features, with zeros up to whole pieces: of the ring, or of product.cu."""
        return up(d, DEPTH if self.rows and not self.stages else PIECE)

    @property
    def _stage_bytes(self) -> int:
        """A piece of the ring of ``assign_hopper.cu``, and low and slope of its centroids."""
        return self.columns * (2 * PIECE + 8)

    def shared_bytes(self, d: int) -> int:
        """Shared memory of a block for rows of width ``d``."""
        if self.stages:  # from the next multiple of 1024 on
            return 1024 + 2 * self.rows * self.width(d) + self.stages * self._stage_bytes
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

        most = min(column_tiles, 64, max(1, MOST_PARTS // r))
        return min(sorted({blocks(column_tiles, spans) for spans in range(1, most + 1)}), key=time)


def up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return blocks(value, step) * step


def blocks(values: int, size: int) -> int:
    """How many blocks of ``size`` hold so many values."""
    return -(-values // size)
