"""The reference distance against exact arithmetic, and hunts for a row that the error bound certifies wrongly."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, mislabelled, reference_dist2, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuclust.cluster import exact
from gpuclust.cluster.backends.base import Candidates
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.exact import Frame, decide
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.sources.base import TensorSource

WIDTHS = [1, 2, 3, 127, 1000, 1025, 5000]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assign(x: torch.Tensor, centroids: torch.Tensor, frame: Frame | None = None) -> tuple[torch.Tensor, float]:
    """Labels (r, n) for centroids (r, k, d), and the share that was re-checked."""
    moments = Moments.of(TensorSource(x))
    frame = moments.frame if frame is None else frame
    labels = torch.full((len(centroids), len(x)), -1, dtype=torch.int32)
    operand = frame.operand(centroids, x.dtype)
    checked = TorchBackend().assign(x, frame.norms(moments.dist2), operand, labels, "exact")
    return labels, checked.item() / labels.numel()


def seen_as(stored: bool, x: torch.Tensor) -> Frame:
    """The frame of the rows, read as stored or converted whatever their offset."""
    return replace(Moments.of(TensorSource(x)).frame, stored=stored)


# ---- the reference distance


@pytest.mark.parametrize("d", WIDTHS)
def test_reference_is_the_documented_tree_of_float64(d: int) -> None:
    x, centre = rows("unequal features", 20, d), rows("noise", 1, d)[0]
    got = exact.reference_dist2(x, centre).numpy()
    np.testing.assert_array_equal(got, reference_dist2(x, centre[None])[:, 0])
    for value, row in zip(got[:3].tolist(), x.double().tolist(), strict=False):
        true = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(row, centre.tolist(), strict=True))
        assert abs(Fraction(value) - true) <= true * Fraction((math.log2(d) + 4) * 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_has_the_same_bits_for_any_number_of_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, centroids = rows("heavy tails", 300, 1025, dtype), rows("noise", 4, 1025)
    row, which = torch.randint(300, (700,)), torch.randint(4, (700,))
    whole = exact.reference_dist2(x, centroids, which, row)
    assert torch.equal(whole, torch.stack([exact.reference_dist2(x, c) for c in centroids])[which, row])
    one = torch.cat([exact.reference_dist2(x[i : i + 1], centroids[j]) for i, j in zip(row[:50], which, strict=False)])
    assert torch.equal(whole[:50], one)
    monkeypatch.setattr(exact, "block_rows", lambda d, device: 7)
    assert torch.equal(whole, exact.reference_dist2(x, centroids, which, row))
    wide = torch.zeros(300, 2050, dtype=dtype)
    wide[:, ::2] = x
    assert torch.equal(whole, exact.reference_dist2(wide[:, ::2], centroids, which, row))


# ---- the bound


def shaken(centroids: np.ndarray, rng: np.random.RandomState, dtype: type) -> np.ndarray:
    """Pairs of centroids that are a last place apart in a few features."""
    twin = centroids.astype(dtype)
    for row in twin:
        at = rng.randint(row.size, size=1 + rng.randint(3))
        row[at] = np.nextafter(row[at], dtype(rng.choice([-np.inf, np.inf])))
    return np.concatenate([centroids.astype(dtype), twin])


@settings(max_examples=120, deadline=None)
@given(
    d=st.sampled_from(WIDTHS),
    k=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["blobs", "noise", "relu", "heavy tails", "near ties", "unequal features", "duplicates"]),
    scale=st.integers(-140, 100),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1e4, -1e7]),
    close=st.sampled_from(["far", "a last place", "mirrored", "rows", "repeated"]),
    stored=st.sampled_from([None, True, False]),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_row_is_certified_for_a_centroid_that_is_not_its_nearest(
    d: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    scale: int,
    offset: float,
    close: str,
    stored: bool | None,
    seed: int,
) -> None:
    rng = np.random.RandomState(seed)
    n = 60 if d < 1000 else 20
    values = KINDS[kind](rng, n, d) + offset
    largest = np.abs(values).max()
    values *= 2.0**14 / largest if dtype == torch.float16 else min(2.0**scale, 2.0**120 / largest)
    x = torch.from_numpy(values).to(dtype)
    kept = np.float64 if dtype == torch.float64 else np.float32
    data = x.double().numpy()
    centres = data[rng.randint(n, size=k)].astype(kept)
    if close == "far":
        centres = (centres + np.abs(data).max() * rng.randn(k, d)).astype(kept)
    elif close == "a last place":
        centres = shaken(centres, rng, kept)
    elif close == "mirrored":
        # Equally far from row 0, but for rounding.
        step = np.std(data, axis=0) * rng.randn(k, d)
        centres = np.concatenate([data[0] + step, data[0] - step]).astype(kept)
    elif close == "repeated":
        centres = np.repeat(centres, 2, axis=0)[rng.permutation(2 * k)]
    centroids = torch.from_numpy(centres)[None]
    storable = dtype == torch.float32 and 2.0**-20 <= x.abs().amax() <= 2.0**40
    frame = None if stored is None or not storable else seen_as(stored, x)
    labels, _ = assign(x, centroids, frame)
    assert mislabelled(labels[0], x, centroids[0]) == 0
    found = nearest(TensorSource(x), centroids[0], TorchBackend())
    assert mislabelled(found, x, centroids[0]) == 0


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 2), (2, 3), (127, 2), (1025, 4)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rows_at=st.integers(-300, 300),
    centroids_at=st.integers(-300, 300),
    seed=st.integers(0, 2**31 - 1),
)
def test_centroids_of_quite_another_size_than_the_rows_are_no_escape(
    shape: tuple[int, int], dtype: torch.dtype, rows_at: int, centroids_at: int, seed: int
) -> None:
    (d, k), rng = shape, np.random.RandomState(seed)
    limit = 460 if dtype == torch.float64 else 120
    x = torch.from_numpy(rng.randn(40, d) * 2.0 ** max(-limit, min(limit, rows_at))).to(dtype)
    centroids = torch.from_numpy(rng.randn(k, d) * 2.0 ** max(-limit, min(limit, centroids_at))).to(dtype)
    centroids = torch.cat([centroids, centroids[:1]])
    assert mislabelled(nearest(TensorSource(x), centroids, TorchBackend()), x, centroids) == 0
    assert mislabelled(assign(x, centroids[None])[0][0], x, centroids) == 0


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("d", [1, 3, 1025])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("far", [0.0, 1.0, 1e4])
def test_rows_on_the_border_between_two_centroids_are_decided_to_the_last_place(
    d: int, stored: bool, offset: float, far: float
) -> None:
    rng = np.random.RandomState(d)
    for _ in range(10):
        ends = (rng.randn(2, d) + offset).astype(np.float32)
        one, two = ends.astype(float)
        along = (two - one) / np.linalg.norm(two - one)
        out = far * rng.randn(80, d)
        x = ((one + two) / 2 + out - np.outer(out @ along, along)).astype(np.float32)
        for row in x[::2]:
            at = rng.randint(d, size=3)
            row[at] = np.nextafter(row[at], np.float32(rng.choice([-np.inf, np.inf])))
        rows_, centroids = torch.from_numpy(x), torch.from_numpy(ends)
        labels, share = assign(rows_, centroids[None], seen_as(stored, rows_))
        assert mislabelled(labels[0], rows_, centroids) == 0
        # Rows far from zero are rounded more coarsely than the pass computes once their offset is taken away.
        assert share >= 0.4 or (not stored and offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 5, 300])
def test_equal_centroids_are_found_and_never_the_first_of_them(d: int, dtype: torch.dtype) -> None:
    rng = np.random.RandomState(d)
    found, equal = 0, 0
    for k in (1, 2, 9, 60):
        some = torch.from_numpy(rng.randint(-3, 4, (4, d))).to(dtype)
        points = torch.cat([some, -some, some.flip(0)])  # mirrored ones have one length
        centroids = torch.stack([points[torch.from_numpy(rng.randint(len(points), size=k))] for _ in range(3)])
        bias = centroids.double().square().sum(2).flatten()
        marked = exact.repeated_in(centroids, bias).view(3, k)
        for restart, marks in zip(centroids, marked, strict=True):
            before = [any(torch.equal(restart[j], restart[i]) for i in range(j)) for j in range(k)]
            assert not (marks & ~torch.tensor(before)).any()
            found, equal = found + int(marks.sum()), equal + sum(before)
    assert found == equal > 100


def test_restarts_are_assigned_apart_and_ties_go_to_the_lowest_index() -> None:
    x = rows("near ties", 400, 4)
    centroids = torch.stack([x[torch.randperm(400, generator=torch.Generator().manual_seed(s))[:12]] for s in range(5)])
    labels, share = assign(x, centroids)
    assert share > 0.05
    for found, given_ in zip(labels, centroids, strict=True):
        assert mislabelled(found, x, given_) == 0


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [("noise", torch.float32, 0.01), ("noise", torch.float64, 0.01), ("noise", torch.float16, 0.01)]
    + [(kind, torch.float32, 0.05) for kind in ("blobs", "offset", "relu", "tiny", "huge", "subnormal", "duplicates")],
    ids=str,
)
def test_few_rows_are_checked_again(kind: str, dtype: torch.dtype, most: float) -> None:
    x = rows(kind, 3000, 64, dtype)
    centroids = x[:40].to(centroid_dtype(dtype))[None] * 0.9 + x.to(centroid_dtype(dtype)).mean(0) * 0.1
    labels, share = assign(x, centroids)
    assert mislabelled(labels[0], x, centroids[0]) == 0
    assert share < most


# ---- fail closed


@pytest.mark.parametrize(
    ("field", "value", "all_possible"),
    [
        ("matrix", math.nan, True),
        ("high", math.nan, True),
        ("slope", math.nan, True),
        ("low", math.nan, False),
        ("low", -math.inf, False),
        ("high", math.inf, False),
        ("slope", math.inf, False),
    ],
)
def test_what_is_not_a_number_certifies_nothing_wrong(field: str, value: float, all_possible: bool) -> None:
    x = rows("blobs", 50, 3)
    centroids, moments = x[None, :4], Moments.of(TensorSource(x))
    operand = moments.frame.operand(centroids, x.dtype)
    spoiled = getattr(operand, field).clone()
    spoiled[2] = value
    labels, norms = torch.empty(1, 50, dtype=torch.int32), moments.frame.norms(moments.dist2)
    operand = replace(operand, **{field: spoiled})
    checked = TorchBackend().assign(x, norms, operand, labels, "exact")
    assert mislabelled(labels[0], x, x[:4]) == 0
    assert checked == 50 or not all_possible


@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_labels_are_in_range_whatever_became_of_the_rows(spoiled: float) -> None:
    x = rows("blobs", 50, 3)
    moments = Moments.of(TensorSource(x))
    operand = moments.frame.operand(x[None, :4], x.dtype)
    x[7, 1], x[9] = spoiled, spoiled
    labels = torch.full((1, 50), -1, dtype=torch.int32)
    TorchBackend().assign(x, moments.frame.norms(moments.dist2), operand, labels, "exact")
    assert ((labels >= 0) & (labels < 4)).all()
    # As a pass would leave them that had other rows before its eyes: one candidate has a distance, one has none.
    centroids = x[None, :4].clone()
    centroids[0, 2] = spoiled
    pairs = Candidates(torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    decide(x, centroids, pairs, labels)
    assert 0 <= int(labels[0, 1]) < 4


def test_rows_too_small_for_their_norms_are_all_decided_by_the_reference() -> None:
    x = rows("noise", 100, 5, torch.float64) * 1e-155
    labels, share = assign(x, x[None, :4])
    assert share == 1
    assert mislabelled(labels[0], x, x[:4]) == 0


def test_fast_differs_only_where_distances_agree_within_rounding() -> None:
    x = rows("near ties", 2000, 30) + 0.001 * rows("noise", 2000, 30, seed=1)
    moments = Moments.of(TensorSource(x))
    operand = moments.frame.operand(x[None, :25], x.dtype)
    labels = torch.empty(1, 2000, dtype=torch.int32)
    checked = TorchBackend().assign(x, moments.frame.norms(moments.dist2), operand, labels, "fast")
    assert checked == 0
    dist2 = reference_dist2(x, x[:25])
    excess = dist2[np.arange(2000), labels[0].numpy()] - dist2.min(1)
    assert excess.max() <= 1e-5 * dist2.max()


def test_margin_bounds_the_error_of_every_score() -> None:
    # The claim of the docstring itself, with the row's own constant taken out by differences to centroid 0.
    for kind, dtype in (("relu", torch.float32), ("offset", torch.float32), ("noise", torch.float16)):
        x = rows(kind, 300, 1500, dtype)
        moments = Moments.of(TensorSource(x))
        centroids = x[:10].float()[None]
        operand = moments.frame.operand(centroids, dtype)
        norms = moments.frame.norms(moments.dist2)
        values = x.float() if operand.shift is None else (x.float() * operand.scale - operand.shift)
        score = (operand.matrix @ values.t()).double() + (operand.high.double() + operand.low.double()) / 2
        margin = (operand.high.double() - operand.low.double()) / 2 + operand.slope.double() * norms.double()
        true = torch.from_numpy(reference_dist2(x, centroids[0]).T) * operand.scale**2
        error = ((score - score[:1]) - (true - true[:1])).abs()
        assert bool((error <= margin + margin[:1]).all())
        assert error.max() > 0
