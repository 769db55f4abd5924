"""The tiles of the first look: what fits a device, and how blocks share the centroids."""

from __future__ import annotations

import pytest
from cases_cupy import (
    A100,
    H100,
    L4,
    TOO_LITTLE,
)

from gpuclust.cluster.backends.tile import Tile


@pytest.mark.parametrize(
    ("k", "d", "shared_bytes", "multiprocessors", "expected"),
    [
        (5, 64, H100, 132, Tile(32, 128)),
        (64, 600, H100, 132, Tile(64, 128)),
        (4096, 1024, H100, 132, Tile(128, 64)),
        (4096, 1024, A100, 108, Tile(128, 192, True)),  # 64 whole rows do not fit
        (4096, 1025, H100, 132, Tile(128, 192, True)),
        (4096, 4096, H100, 132, Tile(128, 192, True)),
        (4096, 4096, L4, 58, Tile(128, 96, True)),
        (4096, 4097, H100, 132, Tile(128, 0)),
        (1000, 4096, H100, 132, Tile(128, 192, True)),  # 16 x 8 tiles of a chunk
        (500, 4096, H100, 132, Tile(128, 0)),  # 16 x 4: half of the device would wait
        (100, 1025, H100, 132, Tile(128, 0)),
        (4096, 2000, TOO_LITTLE, 132, Tile(128, 0)),
    ],
    ids=str,
)
def test_the_tile_fits_the_device(k: int, d: int, shared_bytes: int, multiprocessors: int, expected: Tile) -> None:
    tile = Tile.of(k, d, shared_bytes, multiprocessors)
    assert tile == expected
    assert tile.rows == 0 or tile.shared_bytes(d) + (8 << 10) <= shared_bytes


@pytest.mark.parametrize(
    ("k", "d", "expected"),
    [
        (5, 64, Tile(32, 256, stages=16)),
        (64, 128, Tile(64, 256, stages=16)),
        (4096, 128, Tile(128, 256, stages=9)),
        (4096, 256, Tile(128, 256, stages=5)),
        (4096, 300, Tile(128, 192, stages=6)),
        (4096, 512, Tile(128, 128, stages=5)),
        (4096, 704, Tile(128, 128, stages=2)),
        (4096, 1024, Tile(128, 64, stages=5)),
        (4096, 1025, Tile(128, 192, True)),
    ],
    ids=str,
)
def test_the_tile_of_warpgroups_has_room_for_its_ring(k: int, d: int, expected: Tile) -> None:
    tile = Tile.of(k, d, H100, 132, hopper=True)
    assert tile == expected
    assert tile.shared_bytes(d) + (1 << 10) <= H100
    assert tile.blocks(10**6, 132) == (132 if tile.stages else 5209)
    assert tile.blocks(130, 132) == (3 if tile.stages else 1)


def test_a_chunk_of_streamed_rows_is_whole_tiles_and_its_blocks_end_together() -> None:
    tile = Tile(128, 192, True)
    assert [tile.chunk_rows(d) for d in (1025, 2048, 4096)] == [11904, 6144, 3072]
    assert tile.span(3072, 32, 1, 132) == 4  # 16 x 8 blocks for 132
    assert tile.span(3072, 33, 1, 132) == 1  # 5 by 8 would be 112 blocks, 1 tile each ends as early
    assert tile.span(192, 8, 1, 132) == 1
    assert tile.span(11904, 2, 1, 132) == 1
    assert tile.span(100_000, 3, 1, 58) == 3
    assert 5000 * -(-32 // tile.span(192, 32, 5000, 132)) <= 65535  # blocks of a grid's second dimension
