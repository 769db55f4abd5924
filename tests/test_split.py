"""Operands of two float16 parts: what `exact.SPLIT` claims, against a tensor core that cuts off what it can."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases_cluster import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import HostLauncher

from gpuclust.cluster.backends.base import SLICE
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.split import Split
from gpuclust.cluster.exact import SPLIT, summing_error
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.sources.base import TensorSource

U = 2.0**-24


def parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 values as the sum of two float16, here as float64."""
    high = values.astype(np.float16)
    low = (values - high.astype(np.float32)).astype(np.float16)
    return high.astype(float), low.astype(float)


def cut_sum(terms: np.ndarray) -> np.ndarray:
    """The sum over the last axis, each term and the sum cut to 24 bits: the coarsest tensor core that was measured."""
    largest = np.abs(terms).max(-1, keepdims=True)
    unit = np.exp2(np.frexp(largest)[1] - 24.0)
    total = np.trunc(terms / unit).sum(-1)
    last = np.exp2(np.maximum(np.frexp(total)[1] - 24.0, 0))
    return np.trunc(total / last) * last * unit[..., 0]


def multiplied(x: np.ndarray, c: np.ndarray, block: int) -> np.ndarray:
    """Products (p,) of float32 rows (p, d), summed as in ``rescore.cu``; a core takes ``block`` terms at once."""
    (x_high, x_low), (c_high, c_low) = parts(x), parts(c)
    p, d = x.shape
    whole = np.zeros(p, np.float32)
    for start in range(0, d, SLICE):
        total = np.zeros(p, np.float32)
        for first in range(start, min(d, start + SLICE), 16):
            run = np.zeros(p)
            for a, b in ((x_high, c_low), (x_low, c_high), (x_high, c_high)):
                for at in range(first, min(d, first + 16), block):
                    some = slice(at, min(at + block, first + 16))
                    run = cut_sum(np.concatenate([run[:, None], a[:, some] * b[:, some]], 1))
            total += run.astype(np.float32)
        whole += total
    return whole


def adversary(kind: str, rng: np.random.RandomState, p: int, d: int) -> np.ndarray:
    """Float32 values (p, d) of at most 128, as rows of a frame have them."""
    if kind == "one of 16":  # beside it the others are cut away, or nearly so
        values = np.where(np.arange(d) % 16 == rng.randint(16), 64.0, 64.0 * 2.0**-11.5 * (1 - 2.0**-12))
        values = np.broadcast_to(values, (p, d)) * (1 + 2.0**-13 * rng.rand(p, 1))
    elif kind == "long parts":  # the lower part is as long as it can be, and rounded as far
        values = 1 + 2.0**-10 * rng.randint(4, size=(p, d)) + 2.0**-11 - 2.0**-23 * rng.randint(8, size=(p, d))
    elif kind == "any size":
        values = np.exp2(rng.uniform(-40, 7, size=(p, d))) * rng.choice([-1, 1], size=(p, d))
    else:
        values = np.maximum(rng.randn(p, d) * 2, -100)
    return values.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    d=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 127, 1000, 1025, 3000]),
    kinds=st.tuples(*[st.sampled_from(["one of 16", "long parts", "any size", "noise"])] * 2),
    block=st.sampled_from([4, 8, 16]),
    signs=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_product_is_farther_off_than_its_bound(
    d: int, kinds: tuple[str, str], block: int, signs: bool, seed: int
) -> None:
    rng = np.random.RandomState(seed)
    x, c = (adversary(kind, rng, 8, d) for kind in kinds)
    if signs:
        c = np.copysign(c, x)  # no cancellation
    got = multiplied(x, c, block)
    g, tiny = summing_error(d, SPLIT), SPLIT.tiny * math.sqrt(d)
    rounding = SPLIT.rounding - U  # less the conversion to float32
    for value, row, centroid in zip(got, x.astype(float), c.astype(float), strict=True):
        exact = math.fsum(row * centroid)  # products of float32 are whole in float64
        lengths = np.linalg.norm(row), np.linalg.norm(centroid)
        relative = g * (1 + 4 * SPLIT.rounding) + 2 * rounding + rounding**2
        bound = relative * lengths[0] * lengths[1] + tiny * sum(lengths) + tiny**2
        assert abs(float(value) - exact) <= bound + 2.0**-50 * abs(exact)


def test_the_share_of_a_run_is_needed() -> None:
    rng = np.random.RandomState(0)
    x = np.abs(adversary("one of 16", rng, 200, 16))
    (high, low), worst = parts(x), {}
    exact = (high * high).sum(1) + 2 * (high * low).sum(1)
    for block in (4, 8, 16):
        worst[block] = (np.abs(multiplied(x, x, block) - exact) / (x.astype(float) ** 2).sum(1)).max()
    assert 0.4 * summing_error(16, SPLIT) < max(worst.values()) < summing_error(16, SPLIT)


def test_two_parts_miss_what_the_rounding_says_and_no_less() -> None:
    # Without summing: the product of one feature in exact arithmetic.
    rng = np.random.RandomState(0)
    rounding, worst = Fraction(SPLIT.rounding - U), Fraction(0)
    for kind in ("long parts", "any size", "noise"):
        x, c = adversary(kind, rng, 1, 3000)[0], adversary(kind, rng, 1, 3000)[0]
        for a, b, *four in zip(
            x.tolist(), c.tolist(), *(part.tolist() for part in (*parts(x), *parts(c))), strict=True
        ):
            a_high, a_low, b_high, b_low = map(Fraction, four)
            error = abs(Fraction(a) * Fraction(b) - a_high * b_high - a_high * b_low - a_low * b_high)
            size, tiny = abs(Fraction(a) * Fraction(b)), Fraction(SPLIT.tiny)
            assert error <= (2 * rounding + rounding**2) * size + tiny * (abs(Fraction(a)) + abs(Fraction(b))) + tiny**2
            worst = max(worst, error / size) if kind == "long parts" else worst
    assert worst > Fraction(95, 100) * 2 * rounding


@pytest.mark.parametrize("d", [1, 2, 3, 5, 16, 17, 31, 32, 33, 64, 500, 1024, 1025, 2048, 70_001, 193_600, 3_211_264])
def test_the_float32_sums_of_the_last_look_are_within_the_bound(d: int) -> None:
    # decide.cu: lanes across the features, slice after slice, then the lanes; adding to nothing rounds nothing.
    additions = math.ceil(min(d, SLICE) / 32) + math.ceil(d / SLICE) - 1 + min(5, math.ceil(math.log2(d)))
    assert additions * U / (1 - additions * U) <= summing_error(d, SPLIT)
    assert SPLIT.rounding >= U  # of a centroid, and of a row


# ---- its scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [-300, -140, -125, -30, 0, 60, 120, 300])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_rows_of_any_size_are_in_the_range_of_float16(
    dtype: torch.dtype, scale: int, offset: float, spread: float
) -> None:
    least, most = {torch.float16: (-20, 0), torch.float64: (-900, 900)}.get(dtype, (-140, 110))
    x = ((rows("noise", 50, 6).double() * spread + offset) * 2.0 ** min(most, max(least, scale))).to(dtype)
    moments = Moments.of(TensorSource(x))
    operand = moments.frame.operand(x[None, :3].to(centroid_dtype(dtype)), dtype, SPLIT)
    assert operand.shift is not None
    wide = operand.shift.dtype
    seen = (x.to(wide) * torch.tensor(operand.scale, dtype=wide) - operand.shift).float()
    assert bool(torch.isfinite(seen).all())
    assert seen.abs().max() <= 128
    assert bool(torch.isfinite(operand.slope).all())
    assert operand.scale >= 2**6 * moments.frame.scale
    if spread and offset and dtype in (torch.float32, torch.float64) and scale in (-30, 0, 60):
        # What float16 keeps after the point does not depend on the offset.
        assert seen.abs().max() >= 1


# ---- what the kernel reads


@pytest.mark.compiler
@pytest.mark.parametrize(("k", "d"), [(1, 1), (32, 32), (33, 40), (65, 31), (200, 1100)])
def test_parts_are_two_float16_of_the_float32_operand(k: int, d: int) -> None:
    x = rows("noise", 2 * k + 2, d)
    centroids = torch.stack([x[:k], x[k : 2 * k]])
    made = CupyBackend(HostLauncher()).prepare(Moments.of(TensorSource(x)).frame, centroids, x.dtype).finer
    pieces = -(-d // 32)
    assert made.warps == (1 if k <= 32 else 2 if k <= 64 else 4)
    assert made.parts.shape == (2, k, pieces, 2, 32)
    flat = made.parts.double().transpose(2, 3).reshape(2, k, 2, pieces * 32)
    high, low = flat[:, :, 0, :d], flat[:, :, 1, :d]
    matrix = made.matrix.view(2, k, d).double()
    assert torch.equal(high, matrix.half().double())
    assert bool(((high + low - matrix).abs() <= 2.0**-23 * matrix.abs() + 2.0**-25).all())
    assert bool((low != 0).any())


@pytest.mark.parametrize("most_kib", [99, 163, 227])
@pytest.mark.parametrize("k", [5, 64, 100])
@pytest.mark.parametrize("d", [1, 128, 256, 600, 1024, 1025, 5000])
def test_a_block_has_room_on_every_device(most_kib: int, k: int, d: int) -> None:
    x = rows("noise", k, d)
    made = Split.empty(Moments.of(TensorSource(x)).frame.bound(x.dtype, SPLIT), x[None])
    held, shared_bytes = made.room(most_kib << 10)
    pieces = made.parts.shape[2]
    assert 1 <= held <= pieces
    assert shared_bytes <= (most_kib - 8) << 10
    # All of a row where it fits; else half of the memory, but for one piece.
    assert held == pieces or shared_bytes + (8 << 10) <= (most_kib << 10) // 2 or held == 1
    assert held == pieces or d > 128
