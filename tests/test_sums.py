"""Sums that are free of the order of their terms, and how far they are from the exact sum."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuclust.cluster.backends import torch as torch_backend
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.sums import SUMMED, Grid, power_above, total, tree_sum

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def column_sums(x: torch.Tensor, labels: torch.Tensor, k: int, grid: Grid, weights: torch.Tensor | None, size: int):
    """Sums (levels, r, k, d) and counts (r, k) of clusters, chunk by chunk."""
    r = len(labels)
    sums = torch.zeros(grid.levels, r, k, x.shape[1], dtype=torch.float64)
    counts = torch.zeros(r, k, dtype=torch.float64)
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        share = None if weights is None else weights[part]
        TorchBackend().accumulate(x[part], share, grid, labels[:, part], None, sums, counts)
    return sums, counts


def grid_of(x: torch.Tensor, dtype: torch.dtype | None = None, heaviest: float = 1.0) -> Grid:
    return Grid.of(x.double().abs().amax(0) * heaviest, len(x), dtype or x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "relu", "heavy tails", "offset", "unequal features"])
def test_sums_have_the_same_bits_in_any_order_and_any_chunks(kind: str, dtype: torch.dtype) -> None:
    n, k = 1000, 6
    x = rows("noise" if dtype == torch.float16 else kind, n, 5, dtype)
    labels = torch.from_numpy(np.random.RandomState(0).randint(k, size=(3, n)).astype(np.int32))
    weights = torch.from_numpy(np.random.RandomState(1).exponential(size=n))
    for share, grid in ((None, grid_of(x)), (weights, grid_of(x, torch.float64, weights.amax().item()))):
        whole = column_sums(x, labels, k, grid, share, n)
        for seed, size in enumerate((1, 7, 333)):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            mixed = column_sums(x[order], labels[:, order], k, grid, None if share is None else share[order], size)
            assert torch.equal(mixed[0], whole[0])
            assert torch.equal(mixed[1], whole[1])


def test_one_level_serves_floats_of_few_rows_and_two_serve_doubles() -> None:
    largest = torch.ones(1, dtype=torch.float64)
    assert [Grid.of(largest, 1000, dtype).levels for dtype in DTYPES] == [1, 1, 1, 2]
    assert Grid.of(largest, 2**24, torch.float32).levels == 2
    assert Grid.of(largest, 2**24, torch.bfloat16).levels == 1


@pytest.mark.parametrize("products_per_add", [0, 1 << 60])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_and_single_additions_give_the_same_bits(
    dtype: torch.dtype, weighted: bool, products_per_add: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k, r = 900, 40, 2
    rng = np.random.RandomState(0)
    x = rows("relu", n, 11, dtype)
    weights = torch.from_numpy(rng.exponential(size=n)) if weighted else None
    grid = grid_of(x, torch.float64, 10.0) if weighted else grid_of(x)
    old = torch.from_numpy(rng.randint(k, size=(r, n)).astype(np.int32))
    new = torch.where(torch.from_numpy(rng.rand(r, n) < 0.3), torch.from_numpy(rng.randint(k, size=(r, n))), old).int()
    expected = column_sums(x, new, k, grid, weights, n)
    monkeypatch.setattr(torch_backend, "_PRODUCTS_PER_ADD", products_per_add)
    sums, counts = column_sums(x, old, k, grid, weights, 100)
    TorchBackend().accumulate(x, weights, grid, new, old, sums, counts)
    assert torch.equal(sums, expected[0])
    assert torch.equal(counts, expected[1])
    plain = torch.stack([torch.bincount(row.long(), minlength=k) for row in new])
    assert torch.equal(counts, plain.double())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["noise", "relu", "heavy tails", "offset", "unequal features", "one far row"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n=st.integers(2, 400),
    scale=st.integers(-100, 90),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_sum_is_within_the_stated_error_of_the_exact_sum(
    kind: str, dtype: torch.dtype, n: int, scale: int, seed: int
) -> None:
    x = torch.from_numpy(KINDS[kind](np.random.RandomState(seed), n, 3) * 2.0**scale).to(dtype)
    grid = grid_of(x)
    found = column_sums(x, torch.zeros(1, n, dtype=torch.int32), 1, grid, None, n)[0][:, 0, 0].sum(0)
    bits = 51 - math.ceil(math.log2(n + 1))
    for value, column in zip(found.tolist(), x.double().T, strict=True):
        step = Fraction(2) ** (math.frexp(column.abs().amax().item())[1] - bits * grid.levels)
        exact = sum(map(Fraction, column.tolist()))
        rounding = abs(exact) * Fraction(2) ** -52 if grid.levels == 2 else 0
        assert abs(Fraction(value) - exact) <= n * step / 2 + rounding


def test_every_term_lies_on_the_grid_and_the_levels_add_up() -> None:
    x = rows("heavy tails", 500, 4, torch.float64)
    grid = grid_of(x)
    steps = [magic / (1.5 * 2**52) for magic in grid.magic]
    first, second = grid.split(x)
    assert bool(((first / steps[0]).round() == first / steps[0]).all())
    assert bool(((second / steps[1]).round() == second / steps[1]).all())
    assert bool(((x - first - second).abs() <= steps[1] / 2).all())
    middle = grid.split(x[:, 1:3], 1)
    assert torch.equal(middle[0], first[:, 1:3])
    assert torch.equal(middle[1], second[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_subnormal_and_huge_columns_sum_beside_each_other(dtype: torch.dtype) -> None:
    n = 300
    largest = 3e38 if dtype == torch.float32 else 1e300
    columns = torch.tensor([0.0, 1e-44, 1e-38, 1.0, largest], dtype=torch.float64)
    x = (columns * torch.from_numpy(np.random.RandomState(0).rand(n, 5))).to(dtype)
    sums = column_sums(x, torch.zeros(1, n, dtype=torch.int32), 1, grid_of(x), None, 7)[0][:, 0, 0].sum(0)
    exact = [math.fsum(column) for column in x.double().T.tolist()]
    np.testing.assert_allclose(sums.numpy(), exact, rtol=1e-9)
    assert sums[0] == 0


def test_what_is_below_the_range_of_the_grid_counts_as_zero_and_not_as_noise() -> None:
    x = torch.full((10, 1), 5e-324, dtype=torch.float64)
    assert torch.equal(sum(grid_of(x).split(x)), torch.zeros(10, 1, dtype=torch.float64))
    assert total(torch.full((10,), 5e-324, dtype=torch.float64)) == 0
    assert total(torch.zeros(3, dtype=torch.float64)) == 0


def test_power_above_is_strictly_above() -> None:
    values = torch.tensor([0.0, 1.0, 0.75, 2.0**-1074, 2.0**1000, 3.0], dtype=torch.float64)
    assert power_above(values).tolist() == [-1000, 1, 0, -1073, 1001, 2]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e200, 1e200, allow_subnormal=True), min_size=1, max_size=300),
    seed=st.integers(0, 2**31 - 1),
)
def test_total_is_free_of_the_order_and_near_the_exact_sum(values: list[float], seed: int) -> None:
    given_ = torch.tensor(values, dtype=torch.float64)
    found = total(given_)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    assert total(given_[order]) == found
    largest = max(map(abs, values))
    assert abs(found - math.fsum(values)) <= 2.0**-50 * largest * len(values) + len(values) * 2.0**-1010


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1))
def test_tree_sum_rounds_once_for_each_level_whatever_stands_beside(length: int, seed: int) -> None:
    values = torch.from_numpy(np.random.RandomState(seed).standard_cauchy(size=(3, length)))
    exact = [math.fsum(row) for row in values.tolist()]
    apart = torch.stack([tree_sum(row.clone()) for row in values])
    size = values.abs().sum(1)
    together = tree_sum(values)
    assert torch.equal(together, apart)
    bound = math.ceil(math.log2(length) + 1) * 2.0**-53 * size
    assert bool(((together - torch.tensor(exact, dtype=torch.float64)).abs() <= bound).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 60, 4096])
def test_a_total_is_in_range_where_its_terms_are(n: int) -> None:
    most = sys.float_info.max / SUMMED / n
    assert total(torch.full((n,), most, dtype=torch.float64)) == pytest.approx(most * n, rel=1e-12)


def test_sums_do_not_depend_on_threads() -> None:
    x = rows("relu", 20000, 30)
    labels = torch.from_numpy(np.random.RandomState(0).randint(8, size=(1, 20000)).astype(np.int32))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(column_sums(x, labels, 8, grid_of(x), None, 20000)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
