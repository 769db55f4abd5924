"""The checksum of rows: the same for any chunks, another for any other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_rows import peak_bytes

from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sources.checksum import Checksum, Sample, Unchanged
from gpuclust.errors import InputError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def checksum(x: torch.Tensor, size: int = 1 << 30, step: int = 1) -> int:
    made = Checksum(x.shape[1], step)
    for start in range(0, len(x), size):
        made.add(start, x[start : start + size])
    return made.value()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 7, 64])
def test_chunks_and_strides_make_no_difference(dtype: torch.dtype, step: int) -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum(x, step=step)
    assert [checksum(x, size, step) for size in (1, 3, 64, 199)] == [whole] * 4
    assert checksum(x.t().contiguous().t(), 11, step) == whole
    assert checksum(torch.stack([x, x], 2)[:, :, 1], 11, step) == whole
    one = x[:, :1]
    assert checksum(one.t().contiguous().t(), 9, step) == checksum(one.clone(), step=step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_whole_numbers_and_their_order_are_told_apart(dtype: torch.dtype) -> None:
    # Rows of few bits, at distances that are powers of two, are the hard case of a sum modulo a power of two.
    rng = np.random.RandomState(1)
    x = torch.from_numpy(rng.randint(-2, 3, size=(5000, 4))).to(dtype)
    known = {checksum(x)}
    for _ in range(300):
        i, j = rng.randint(5000), rng.randint(12)
        other = (i + 2**j) % 5000
        if not torch.equal(x[i], x[other]):
            changed = x.clone()
            changed[[i, other]] = x[[other, i]]
            known.add(checksum(changed))
            x = changed
    for column in range(3):
        changed = x.clone()
        changed[7, column] += 1
        changed[7, column + 1] -= 1
        known.add(checksum(changed))
    assert checksum(torch.zeros(5, 4, dtype=dtype)) != checksum(-torch.zeros(5, 4, dtype=dtype))
    assert len(known) > 200


def test_no_two_of_the_shuffled_are_the_same() -> None:
    x = torch.arange(64.0, dtype=torch.float64).view(32, 2)
    found = [checksum(x[torch.randperm(32, generator=torch.Generator().manual_seed(seed))]) for seed in range(500)]
    assert len(set(found)) == 500


def test_places_in_wide_rows_are_told_apart_within_little_memory() -> None:
    """Rows of several pieces: values that change places within a piece, between pieces, or with whole pieces."""
    x = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    piece = 1 << 16
    order = torch.arange(x.shape[1])
    changed = []
    for one, other in ((5, 9), (5, 5 + piece), (70_000, 199_999)):
        swapped = order.clone()
        swapped[one], swapped[other] = other, one
        changed.append(x[:, swapped])
    changed += [torch.cat([x[:, piece : 2 * piece], x[:, :piece], x[:, 2 * piece :]], 1), x.flip(0)]
    found = {checksum(one) for one in (x, *changed)}
    assert len(found) == 1 + len(changed)
    assert checksum(x, 1) == checksum(x)
    assert peak_bytes(lambda: checksum(x, 1)) < 4 << 20  # products of all values would take 16 bytes each, and 8 stay


def test_one_row_in_so_many_is_seen() -> None:
    x = torch.randn(300, 3)
    seen, unseen = x.clone(), x.clone()
    seen[128, 1] += 1
    unseen[129, 1] += 1
    assert checksum(seen, 50, 64) != checksum(x, 50, 64) == checksum(unseen, 50, 64)


def test_a_later_pass_must_find_what_the_first_found() -> None:
    unchanged = Unchanged(3)
    for _ in range(3):
        sums = unchanged.begin()
        sums.add(0, torch.ones(4, 3))
        unchanged.compare(sums)
    sums = unchanged.begin()
    sums.add(0, torch.zeros(4, 3))
    with pytest.raises(InputError, match="X changed between two passes"):
        unchanged.compare(sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (17, 3), (5000, 3), (40, 20_000)])
def test_a_sample_has_whole_rows_from_all_over(n: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, d).to(dtype)
    sample = Sample(TensorSource(x))
    seen = []
    for row in sorted({*range(0, n, max(1, n // 97)), n - 1}):
        kept = x[row, -1].clone()
        x[row, -1] = -kept
        try:
            sample.require_unchanged()
        except InputError:
            seen.append(row)
        x[row, -1] = kept
    sample.require_unchanged()
    assert len(seen) >= min(n, 4)
    assert n < 17 or (min(seen) < n // 10 and max(seen) > n * 9 // 10)


def test_a_sample_takes_no_number_for_itself_and_leaves_streamed_rows_alone() -> None:
    x = torch.full((5, 2), float("nan"))
    Sample(TensorSource(x)).require_unchanged()
    source = TensorSource(x)
    source.resident = False
    source.take = None  # type: ignore[assignment]
    Sample(source).require_unchanged()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_same_on_every_device(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 33).to(dtype)
    assert checksum(x.cuda(), 123) == checksum(x)
