"""The operands that ``prepare.cu`` makes, beside those of `Frame.operand` in torch operations."""

from __future__ import annotations

import math

import pytest
import torch
from cases_cluster import KINDS, rows
from on_host import HostLauncher

from gpuclust.cluster.backends.looks import Looks
from gpuclust.cluster.backends.tile import Tile
from gpuclust.cluster.exact import FLOAT16, SPLIT, Bounded
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.kernels.launch import Launcher

MOST = torch.finfo(torch.float32).max
SHAPES = [(1, 1, 1), (2, 5, 3), (1, 33, 40), (2, 65, 300), (1, 130, 33), (1, 3, 1100), (3, 1, 7), (1, 2, 4100)]


@pytest.fixture(
    params=[
        pytest.param("rising", marks=pytest.mark.compiler),
        pytest.param("falling", marks=pytest.mark.compiler),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.nvrtc]),
    ]
)
def launch(request: pytest.FixtureRequest) -> HostLauncher | Launcher:
    return Launcher() if request.param == "cuda" else HostLauncher(falling=request.param == "falling")


def on(launch: HostLauncher | Launcher) -> torch.device:
    return torch.device("cpu" if isinstance(launch, HostLauncher) else "cuda")


def close_to(found: torch.Tensor, expected: torch.Tensor, unit: torch.Tensor) -> bool:
    """Float32 numbers that differ by no more than two roundings; `unit` has the size of what they are made of."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found - expected).abs() <= 2.0**-22 * unit)).all())


def check_ends(terms: torch.Tensor, reach: torch.Tensor, k: int, wanted: Bounded, never: float = math.inf) -> None:
    """Lower ends, slopes and how far the upper ends are from there; of what is no centroid ``never`` and 0."""
    r = len(terms)
    low, slope, high = (part.view(r, k) for part in (wanted.low, wanted.slope, wanted.high))
    assert close_to(terms[:, :k, 0], low, low.abs() + high.abs())
    assert close_to(terms[:, :k, 1], slope, slope.abs())
    assert close_to(reach[:, :k], high - low, low.abs() + high.abs())
    assert bool((terms[:, k:, 0] == never).all())
    assert not bool(terms[:, k:, 1].any())
    assert not bool(reach[:, k:].any())


def check(looks: Looks, wanted: Bounded, split: Bounded) -> None:
    """All of it: operands to the bit, bounds but for the order of their sums."""
    r, k, d = looks.centroids.shape
    padded = looks.padded.double().nan_to_num(0.5)
    assert torch.equal(padded[:, :k, :d], wanted.matrix.view(r, k, d).double().nan_to_num(0.5))
    assert not bool(padded[:, k:].any())
    assert not bool(padded[..., d:].any())
    check_ends(looks.terms, looks.reach, k, wanted)
    fine = looks.finer
    assert torch.equal(fine.matrix.nan_to_num(0.5), split.matrix.nan_to_num(0.5))
    pieces = fine.parts.shape[2]
    flat = fine.parts.transpose(2, 3).reshape(r, k, 2, pieces * 32)
    high = split.matrix.view(r, k, d).half()
    low = (split.matrix.view(r, k, d) - high.float()).half()
    assert torch.equal(flat[:, :, 0, :d].nan_to_num(0.5), high.nan_to_num(0.5))
    assert torch.equal(flat[:, :, 1, :d].nan_to_num(0.5), low.nan_to_num(0.5))
    assert not bool(flat[..., d:].any())
    check_ends(fine.terms, fine.reach, k, split)
    assert (looks.scale, fine.scale) == (wanted.scale, split.scale)
    assert looks.shift is not None
    assert fine.shift is not None
    assert torch.equal(looks.shift, wanted.shift)  # type: ignore[arg-type]
    assert torch.equal(fine.shift, split.shift)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows_of_tile", [128, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("r", "k", "d"), SHAPES)
def test_operands_are_those_of_torch(
    r: int, k: int, d: int, dtype: torch.dtype, rows_of_tile: int, launch: HostLauncher | Launcher
) -> None:
    x = rows("offset" if k % 2 else "blobs", r * k + 3, d, dtype).to(on(launch))
    frame = Moments.of(TensorSource(x)).frame
    centroids = x[: r * k].to(centroid_dtype(dtype)).view(r, k, d)
    tile = Tile(32 if k <= 32 else 64 if k <= 64 else 128, rows_of_tile)
    looks = Looks.of(launch, frame, centroids, dtype, tile)
    columns, width = (-(-k // tile.columns) * tile.columns, -(-d // 32) * 32) if rows_of_tile else (k, -(-d // 64) * 64)
    assert looks.padded.shape == (r, columns, width)
    assert looks.finer.terms.shape[1] == -(-k // (32 * looks.finer.warps)) * 32 * looks.finer.warps
    check(looks, frame.operand(centroids, dtype, FLOAT16), frame.operand(centroids, dtype, SPLIT))
    assert bool((looks.finer.parts[..., 1, :] != 0).any()) or d == 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_of_every_kind_of_rows(kind: str, launch: HostLauncher | Launcher) -> None:
    for dtype in (torch.float32, torch.float64):
        x = rows(kind, 60, 9, dtype).to(on(launch))
        frame = Moments.of(TensorSource(x)).frame
        for scale in (1.0, 2.0**12, 2.0**60, 2.0**120):  # out of the range of the operands
            centroids = (x[:20] * scale).clamp(-MOST, MOST).view(2, 10, 9)
            looks = Looks.of(launch, frame, centroids, dtype, Tile(32, 128))
            wanted, split = (frame.operand(centroids, dtype, arithmetic) for arithmetic in (FLOAT16, SPLIT))
            check(looks, wanted, split)


def test_rows_too_small_for_their_norms_certify_nothing(launch: HostLauncher | Launcher) -> None:
    x = rows("noise", 30, 5, torch.float64).to(on(launch)) * 1e-155
    frame = Moments.of(TensorSource(x)).frame
    looks = Looks.of(launch, frame, x[None, :4], x.dtype, Tile(32, 128))
    for one in (looks, looks.finer):
        assert bool((one.reach[:, :4] == math.inf).all())
        assert bool((one.terms[:, :4, 0] == -math.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 5, 300])
def test_equal_centroids_are_kept_out_but_the_first_of_them(
    d: int, dtype: torch.dtype, launch: HostLauncher | Launcher
) -> None:
    device, random = on(launch), torch.Generator().manual_seed(d)
    x = rows("noise", 50, d, dtype)
    x -= x.mean(0)  # near zero, so that mirrored centroids have nearly the same length
    frame = Moments.of(TensorSource(torch.cat([x, -x]).to(device))).frame
    some = torch.randint(-3, 4, (4, d), generator=random).to(dtype)
    points = torch.cat([some, -some, some.flip(0), -0.0 * some[:1]])
    equal = 0
    for k in (1, 2, 60, 300):
        centroids = points[torch.randint(len(points), (2, k), generator=random)]
        looks = Looks.of(launch, frame, centroids.to(device), dtype, Tile(32, 128))
        for restart in range(2):
            seen: set[tuple[float, ...]] = set()
            expected = []
            for values in centroids[restart].tolist():
                key = tuple(value + 0.0 for value in values)  # -0 is 0
                expected.append(key in seen)
                seen.add(key)
            for one in (looks, looks.finer):
                assert (one.terms[restart, :k, 0] == MOST).tolist() == expected
                assert (one.reach[restart, :k] == 0).tolist() == expected
            equal += sum(expected)
    assert equal > 500


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize(("r", "k", "d"), [(1, 1, 1), (2, 130, 70), (1, 300, 128), (2, 5, 1000)])
def test_swizzled_tiles_are_a_permutation(
    r: int, k: int, d: int, columns: int, launch: HostLauncher | Launcher
) -> None:
    x = rows("blobs", r * k + 3, d, torch.float32).to(on(launch))
    frame = Moments.of(TensorSource(x)).frame
    centroids = x[: r * k].view(r, k, d)
    plain = Looks.of(launch, frame, centroids, x.dtype, Tile(128, 128))
    looks = Looks.of(launch, frame, centroids, x.dtype, Tile(columns, 256, stages=4))
    tiles, pieces = -(-k // columns), -(-d // 64)
    assert looks.padded.shape == (r, tiles, pieces, columns, 64)
    whole = torch.zeros(r, tiles * columns, pieces * 64, dtype=torch.float16, device=x.device)
    whole[:, :k, :d] = plain.padded[:, :k, :d]
    # (r, tile, piece, centroid, eighth, feature), with the eighths of a centroid in the order of its place in the tile.
    expected = whole.view(r, tiles, columns, pieces, 8, 8).permute(0, 1, 3, 2, 4, 5)
    order = torch.arange(8)[None] ^ (torch.arange(columns) % 8)[:, None]
    expected = expected.gather(4, order.to(x.device)[None, None, None, :, :, None].expand(r, tiles, pieces, -1, -1, 8))
    assert torch.equal(looks.padded.view(r, tiles, pieces, columns, 8, 8), expected)
    check_ends(looks.terms, looks.reach, k, frame.operand(centroids, x.dtype, FLOAT16), torch.finfo(torch.float32).max)
