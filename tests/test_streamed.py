"""The dual solver on rows that are streamed: the bits of rows on the device, and few passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import blobs, rows
from cases_rows import cut, mapped, peak_bytes
from cases_rows import same as same_models

from gpuclust import KMeans
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.gram import Gram, slice_width, wide_width
from gpuclust.cluster.lloyd import Weights
from gpuclust.cluster.memory import dual_needs
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.image import KnownImage, Pixels
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus
from gpuclust.cluster.seeding.scalable import choose_scalable
from gpuclust.cluster.solver import plan
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sources.host import HostSource

CPU = torch.device("cpu")


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


def test_given_centroids_empty_clusters_and_every_end_have_the_bits_of_the_primal_solver() -> None:
    x = rows("blobs", 120, 300)
    far = x.abs().amax() * 50
    for seed in range(4):
        start = torch.from_numpy(blobs(np.random.RandomState(seed), 6, 300)).float()
        start[:seed] += far
        for weights in (None, some_weights(120)):
            options: dict[str, Any] = {"init": [start, start.flip(0)], "n_init": 2, "weights": weights}
            same(
                fit_kmeans(Passes(x), 6, solver="dual", **options),
                fit_kmeans(TensorSource(x), 6, solver="primal", **options),
            )
    x = rows("relu", 150, 400)
    for max_iter in (1, 2, 5):
        for tol in (0.0, 1e-3, 0.5):
            options = {"n_init": 4, "max_iter": max_iter, "tol": tol}
            same(
                fit_kmeans(Passes(x), 5, solver="dual", **options),
                fit_kmeans(TensorSource(x), 5, solver="primal", **options),
            )


def test_single_rows_move_as_on_the_device() -> None:
    x = rows("noise", 150, 700)
    options: dict[str, Any] = {"algorithm": "hartigan-wong", "n_init": 2}
    first = fit_kmeans(TensorSource(x), 5, solver="primal", **options)
    same(fit_kmeans(Passes(x), 5, solver="dual", **options), first)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_files_and_chunks_of_any_limit_have_the_bits_of_an_array(tmp_path: Path, dtype: str) -> None:
    x = rows("relu", 150, 20_000).numpy().astype(dtype)
    parameters: dict[str, Any] = {"n_clusters": 5, "n_init": 3, "random_state": 0}
    model = KMeans(**parameters, solver="primal").fit(x)
    least = dual_needs(Problem(150, 20_000, 5, torch.from_numpy(x).dtype, CPU), 150, resident=False).least
    for given in (mapped(tmp_path, x), cut(x, (37, 1, 50))):
        for limit in (least * 4 // 3, None):
            other = KMeans(**parameters, solver="dual", memory_limit=limit).fit(given)
            assert other.fit_report_.solver == "dual"
            same_models(other, model)


# ---- the products


def test_the_matrix_is_to_the_bit_that_of_rows_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "50000")
    x = rows("relu", 120, 1001)
    moments = Moments.of(TensorSource(x))
    first = Gram(TensorSource(x), moments).values
    width = slice_width(120, 1001, CPU)
    for wide in (1, 3, 100):
        source = Passes(x)
        found = Gram(source, moments, 120 * 4 * width * wide, Pixels(source, moments))
        assert source.passes == math.ceil(1001 / min(1001, width * wide))
        assert torch.equal(found.values, first)
        image = Pixels(source, moments).of(x)
        assert found.image is not None
        assert torch.equal(found.image, image @ image.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["relu", "offset", "heavy tails", "duplicates", "one far row", "subnormal"])
def test_draws_from_known_products_are_those_from_rows(kind: str, dtype: torch.dtype) -> None:
    x = rows(kind, 90, 40, dtype)
    source = TensorSource(x)
    moments = Moments.of(source)
    pixels = Pixels(source, moments).of(x)
    image = KnownImage(pixels @ pixels.t())
    for weights in (None, Weights(some_weights(90))):
        values = None if weights is None else weights.values
        for k in (1, 7, 40):
            for known in (None, image):
                bits = [[RandomBits(3, restart) for restart in range(3)] for _ in range(2)]
                given = source if known is None else Passes(x)
                drawn = choose_plus_plus(given, moments, k, bits[0], values, 0, known)
                more = choose_scalable(given, moments, k, bits[1], weights, 0, known)
                if known is None:
                    wanted = drawn, more
            assert (drawn, more) == wanted


def test_seeding_from_known_products_reads_no_row() -> None:
    x = rows("relu", 90, 40)
    source = Passes(x)
    moments = Moments.of(TensorSource(x))
    pixels = Pixels(source, moments).of(x)
    choose_plus_plus(source, moments, 7, [RandomBits(0, 0)], None, 0, KnownImage(pixels @ pixels.t()))
    assert (source.passes, source.taken) == (0, [])


# ---- passes


@pytest.mark.parametrize(("n", "d", "k"), [(200, 20_000, 5), (150, 50_000, 3), (300, 9000, 10)])
def test_clear_rows_are_read_for_moments_slices_centroids_and_distances(n: int, d: int, k: int) -> None:
    x = torch.from_numpy(np.maximum(blobs(np.random.RandomState(0), n, d, k, apart=0.5), 0)).float()
    problem = Problem(n, d, k, x.dtype, CPU, restarts=10)
    needs = dual_needs(problem, n, resident=False)
    for limit in (needs.least, needs.least + (k - 1) * needs.sums, needs.least + 4_000_000, 1 << 30):
        source, share = Passes(x), needs.within(limit, 10)
        found = fit_kmeans(source, k, n_init=10, solver="dual", memory_limit=limit)
        width = slice_width(n, d, CPU, share.halvings)
        slices = math.ceil(d / wide_width(n, d, width, 4, share.slice_bytes))
        groups = math.ceil(k / share.summed)
        assert groups == (k if limit == needs.least else 1)
        assert source.passes <= 3 + slices + groups + 1
        assert len(source.taken) <= 3
        costs = plan(problem, limit, resident=False, asked=True)
        assert source.passes <= costs.dual_passes <= source.passes + 3
        same(found, fit_kmeans(TensorSource(x), k, n_init=10, solver="primal"))


def test_rows_without_groups_are_read_little_more_often() -> None:
    rng = np.random.RandomState(0)
    x = torch.from_numpy(np.maximum(rng.randn(400, 6) @ rng.randn(6, 5000) + 0.1 * rng.randn(400, 5000), 0)).float()
    source = Passes(x)
    found = fit_kmeans(source, 8, n_init=10, solver="dual")
    assert found.n_iter > 10
    assert source.passes + len(source.taken) <= 3 + 1 + 2 + 3


def test_what_is_open_in_an_iteration_is_read_for_all_restarts_at_once() -> None:
    x = rows("near ties", 200, 60)  # rows that are equally far from two centroids, over and over
    source = Passes(x)
    found = fit_kmeans(source, 6, n_init=10, solver="dual", init="random", tol=0.0)
    assert found.recheck_share > 1e-3
    assert found.n_iter > 4
    longest = max(fit_kmeans(TensorSource(x), 6, init="random", seed=0, tol=0.0, n_init=r).n_iter for r in range(1, 11))
    # In an iteration at most its rows, those that it begins with, and a pass for centroids; 40 % of them were needed.
    assert len(source.taken) <= longest + 3
    assert source.passes <= 4 + 2 * longest


def test_restarts_that_begin_with_equal_rows_take_them_once() -> None:
    x = rows("relu", 10, 3000).repeat(8, 1)
    source = Passes(x)
    found = fit_kmeans(source, 20, n_init=5, solver="dual", init="random")
    assert source.taken[:1]
    assert source.taken[0] > 20
    same(found, fit_kmeans(TensorSource(x), 20, n_init=5, solver="primal", init="random"))


# ---- memory


@pytest.mark.parametrize("spare", [0, 1_000_000, 30_000_000])
@pytest.mark.parametrize(
    ("n", "d", "k", "dtype", "weighted"),
    [
        (60, 90_000, 5, torch.float32, False),
        (60, 60_000, 3, torch.float64, False),
        (300, 9000, 20, torch.float32, True),
        (200, 20_000, 1, torch.float16, False),
        (400, 3000, 100, torch.float32, False),
    ],
)
def test_a_streamed_fit_stays_within_its_limit(
    n: int, d: int, k: int, dtype: torch.dtype, weighted: bool, spare: int
) -> None:
    x = rows("relu", n, d, dtype).numpy()
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0)).double() + 0.5 if weighted else None
    needs = dual_needs(Problem(n, d, k, dtype, CPU, weighted), n, 0.25 if weighted else None, resident=False)
    limit = needs.least + spare

    def fit() -> None:
        # A row at a time, as a file hands them out where memory is short.
        source = HostSource(x, CPU, 8 * d * x.itemsize)
        assert not source.resident
        fit_kmeans(source, k, n_init=6, solver="dual", memory_limit=limit, weights=weights, max_iter=4)

    assert peak_bytes(fit) <= limit


# ---- the choice


def test_a_pass_that_takes_long_is_what_decides() -> None:
    sizes = Problem(500, 193_600, 5, torch.float32, CPU, restarts=10)
    limit = 50_000_000
    quick = plan(sizes, limit, resident=False, pass_s=0.01)
    slow = plan(sizes, limit, resident=False, pass_s=20.0)
    assert slow.dual_passes == quick.dual_passes < 25 < slow.primal_passes
    assert slow.choose("auto")[0] == "dual"
    assert slow.dual_s == pytest.approx(20 * slow.dual_passes, rel=0.05)
    assert slow.primal_s - quick.primal_s == pytest.approx(slow.primal_passes * 19.99)
    assert f"{slow.dual_passes} passes; primal: " in str(slow)
    assert slow.dual_bytes <= limit
    many = Problem(50_000, 4096, 5, torch.float32, CPU)
    assert plan(many, 200_000_000, resident=False, pass_s=20.0).choose("auto")[0] == "primal"


def test_a_source_says_how_long_a_pass_takes() -> None:
    x = rows("blobs", 120, 3000)
    source = Passes(x)
    source.pass_s = 100.0  # type: ignore[attr-defined]
    found = fit_kmeans(source, 4, n_init=2, seed=1)
    assert found.solver == "dual"
    assert "passes" in found.plan
    same(found, fit_kmeans(TensorSource(x), 4, n_init=2, seed=1, solver="primal"))
