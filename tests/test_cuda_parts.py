"""Parts of the CUDA kernels, compiled for a processor: the summation tree, the two least scores, float16."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from on_host import library

from gpuclust.cluster.sums import tree_sum

PARTS = """
extern "C" double host_tree_sum(long long d, int held, const double* terms) {
  static double values[4096];
  const int p = held_level(d, held);
  int length = (int)level_length(d, p);
  for (int i = 0; i < length; ++i) values[i] = subtree<LEVELS>(d, p, i, [&](int64 f) { return terms[f]; });
  while (length > 1) {
    const int half = (length + 1) / 2;
    for (int i = 0; i < length - half; ++i) values[i] = sum_of(values[i], values[half + i]);
    length = half;
  }
  return values[0];
}
extern "C" void host_best(int count, int parts, const float* lower, Best* out) {
  out->clear();
  for (int part = 0; part < parts; ++part) {
    Best some;
    some.clear();
    for (int i = part; i < count; i += parts) some.take(lower[i], i);
    out->merge(some);
  }
}
extern "C" int host_certain(const Best* best, float upper) { return best->certain(upper); }
extern "C" unsigned short host_float16(float value) { return to_float16(value).bits; }
extern "C" float host_float(unsigned short bits) { return to_float(Float16{bits}); }
"""


class BestStruct(ctypes.Structure):
    _fields_ = (("least", ctypes.c_float), ("second", ctypes.c_float), ("index", ctypes.c_int))


@pytest.fixture
def parts() -> ctypes.CDLL:
    found = library("decide.cu", ("-DROW=float", "-DCENTRE=float"), PARTS)
    found.host_tree_sum.restype = ctypes.c_double
    found.host_float.restype = ctypes.c_float
    found.host_float16.restype = ctypes.c_ushort
    return found


@pytest.mark.compiler
@pytest.mark.parametrize("held", [1024, 1, 5])
def test_the_tree_of_the_kernels_is_that_of_the_reference_distance(held: int, parts: ctypes.CDLL) -> None:
    random = np.random.RandomState(held)
    lengths = [*range(1, 70), 1023, 1024, 1025, 2047, 2048, 2049, 4097, 70_001] + ([193_600] if held > 1 else [])
    differs = 0
    for length in lengths:
        terms = random.randn(length) ** 2 * np.exp(5 * random.randn(length))
        expected = tree_sum(torch.from_numpy(terms.copy())[None]).item()
        got = parts.host_tree_sum(ctypes.c_longlong(length), held, terms.ctypes.data_as(ctypes.c_void_p))
        assert got == expected, length
        differs += got != sum(terms.tolist())
    assert differs > 20  # another order has other bits


@pytest.mark.compiler
@pytest.mark.parametrize("split", [1, 2, 7])
def test_the_two_least_and_where_the_first_is(split: int, parts: ctypes.CDLL) -> None:
    random = np.random.RandomState(split)
    for count in (1, 2, 3, 20, 100):
        for special in ([], [np.nan], [np.inf], [-np.inf], [np.inf, np.nan], [-np.inf, np.nan]):
            lower = np.round(random.randn(count), 1).astype(np.float32)  # with ties
            for value in special[:count]:
                lower[random.randint(count)] = value
            best = BestStruct()
            parts.host_best(count, split, lower.ctypes.data_as(ctypes.c_void_p), ctypes.byref(best))
            numbers = np.where(np.isnan(lower), np.inf, lower)
            if not np.isnan(lower).any():
                ordered = np.sort(np.append(numbers, np.inf))
                assert (best.least, best.second) == (ordered[0], ordered[1])
                assert best.index == numbers.argmin()
            else:
                assert np.isnan(best.second)
            for upper in (best.least, float(np.nextafter(np.float32(best.least), np.float32(np.inf))), np.nan, np.inf):
                expected = not np.isnan(lower).any() and np.isfinite(best.least) and best.second > upper
                assert bool(parts.host_certain(ctypes.byref(best), ctypes.c_float(upper))) == bool(expected)


@pytest.mark.compiler
def test_float16_on_the_processor_is_float16(parts: ctypes.CDLL) -> None:
    random = np.random.RandomState(0)
    values = np.concatenate(
        [
            random.randn(500) * 2.0 ** random.randint(-30, 18, 500),
            [0, -0.0, 65504, 65519, 65520, 2.0**-25, 3 * 2.0**-25],
        ]
    ).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert [parts.host_float16(ctypes.c_float(value)) for value in values] == expected.tolist()
    every = np.arange(1 << 16, dtype=np.uint16)
    got = np.array([parts.host_float(int(bits)) for bits in every], dtype=np.float32)
    np.testing.assert_array_equal(got, every.view(np.float16).astype(np.float32))


NEAR = """
extern "C" void host_near(int tiles, const float* scores, long long k, Best* out) {
  Near near;
  near.clear();
  for (int tile = 0; tile < tiles; ++tile) {
    float sums[2 * SCORES];
    for (int i = 0; i < SCORES; ++i) {
      sums[i / 2 * 4 + 2 + i % 2] = scores[tile * SCORES + i];
      sums[i / 2 * 4 + i % 2] = NAN;  // of the other row
    }
    near.take(sums, 1, tile, ~NUMBERS);
  }
  *out = near.best(0);
  out->widen(k);
}
"""


@pytest.mark.compiler
def test_numbers_in_the_last_bits_never_widen_the_gap_between_the_two_least_scores() -> None:
    near = library("assign_hopper.cu", ("-DROW=float", "-DCOLUMNS=128", "-DGROUPS=1"), NEAR).host_near
    random = np.random.RandomState(0)
    columns = np.array([tile * 128 + i // 2 * 8 + i % 2 for tile in range(3) for i in range(32)])
    best = BestStruct()
    for turn in range(3000):
        scores = random.randn(96) * 10.0 ** random.randint(-30, 30, 96 if turn % 3 else 1)
        scores = (scores + random.choice([0, 1, 1e4, -1e4])).astype(np.float32)
        if turn % 4 == 0:  # so near to each other that bits decide
            scores[:] = np.float32(random.randn()) * (1 + random.randint(-40, 40, 96) * 2.0**-23)
        near(3, scores.ctypes.data_as(ctypes.c_void_p), ctypes.c_longlong(384), ctypes.byref(best))
        chosen = int(np.flatnonzero(columns == best.index)[0])
        other = np.delete(scores, chosen).min()
        gap, share = float(other) - float(scores[chosen]), 2.0**-15 * (abs(float(scores[chosen])) + abs(float(other)))
        assert scores[chosen] <= best.least
        assert gap - share <= best.second - best.least <= gap
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 1, 40, 95):
            scores = random.randn(96).astype(np.float32)
            scores[place] = bad
            near(3, scores.ctypes.data_as(ctypes.c_void_p), ctypes.c_longlong(384), ctypes.byref(best))
            certain = best.second > best.least > -3e38
            assert certain <= (bad == np.inf)
            assert 0 <= best.index < 384
    # The least is no centroid: those that are have no score.
    near(3, np.ones(96, np.float32).ctypes.data_as(ctypes.c_void_p), ctypes.c_longlong(0), ctypes.byref(best))
    assert best.index == 0
    assert np.isnan(best.least)
