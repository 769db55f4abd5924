"""What the looks of the CuPy backend leave open, and that nothing escapes their bounds, on a GPU and on a processor."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, mislabelled, rows
from cases_cupy import (
    DTYPES,
    H100,
    HOPPER,
    LITTLE,
    NARROW,
    TOO_LITTLE,
    WAYS,
    Make,
    Spy,
    all_open,
    assigned,
    line,
    seeds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import HostLauncher

from gpuclust.cluster.backends import cupy_wide
from gpuclust.cluster.backends.cupy import CupyBackend
from gpuclust.cluster.backends.looks import Looks
from gpuclust.cluster.exact import FLOAT16, SPLIT
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.sources.base import TensorSource


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("d", "width"), [(36, 48), (300, 304), (37, 41), (2090, 2096)])
def test_the_first_look_leaves_open_what_its_bound_says_and_reads_nothing_beside_the_rows(
    d: int, width: int, dtype: torch.dtype, device: torch.device, make: Make
) -> None:
    # What is not a number would open the rows whose scores it gets into.
    whole = torch.full((101, width), math.nan, dtype=dtype, device=device)
    x = whole[:100, :d]
    x.copy_(rows("blobs", 100, d, dtype))
    frame, norms = (moments := Moments.of(TensorSource(x))).frame, moments.frame.norms(moments.dist2).double()
    narrow = (5, {}), (50, {}), (70, {}), (70, {"shared_bytes": TOO_LITTLE}), (5, HOPPER), (70, HOPPER)
    for k, way in narrow if d < 1024 else ((20, {"shared_bytes": LITTLE}),):
        backend = make(**way)
        spy = backend.launch = Spy(backend.launch)
        centroids = seeds(x, 2, k)
        labels, _ = assigned(backend, x, centroids)
        assert mislabelled(labels[0], x, centroids[0]) == 0
        operand = frame.operand(centroids, dtype, FLOAT16)
        assert operand.shift is not None
        seen = (x.to(operand.shift.dtype) * operand.scale - operand.shift).half().double()
        products = operand.matrix.double() @ seen.t()
        bounds = operand.slope.double() * norms
        upper, lower = operand.high.double() + products + bounds, operand.low.double() + products - bounds
        least = upper.view(2, k, -1).amin(1, keepdim=True)
        expected = ((lower.view(2, k, -1) <= least).sum(1) > 1).sum(1)
        assert (spy.opened[0].cpu() - expected.cpu()).abs().max() <= 1, (k, way)
        assert expected.max() < (60 if d < 1024 else 75)


SECOND = [
    # n, d, k, r, kind, dtype, KiB of shared memory: of 5000 features, say, a block then holds 32, 192 or 576 at a time.
    (1, 1, 2, 1, "noise", torch.float32, None),
    (65, 1, 40, 2, "noise", torch.float32, None),
    (150, 33, 100, 2, "tight", torch.float32, None),
    (200, 64, 33, 3, "tight", torch.float16, None),
    (130, 100, 65, 1, "tight", torch.float64, None),
    (70, 300, 129, 1, "tight", torch.bfloat16, None),
    (66, 600, 130, 1, "relu", torch.float32, 99),
    (63, 1024, 20, 2, "tight", torch.float32, None),
    (40, 1056, 40, 1, "offset", torch.float32, TOO_LITTLE >> 10),
    (30, 2048, 7, 1, "tight", torch.float32, 99),
    (20, 5000, 3, 1, "tight", torch.float32, TOO_LITTLE >> 10),
]


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize(("n", "d", "k", "r", "kind", "dtype", "kib"), SECOND, ids=str)
def test_the_second_look_has_the_scores_that_its_bound_says(
    n: int,
    d: int,
    k: int,
    r: int,
    kind: str,
    dtype: torch.dtype,
    kib: int | None,
    falling: bool,
    device: torch.device,
    make: Make,
) -> None:
    # Not one row is certain in the first two looks, so that the list holds them all, with the second's upper ends.
    x = (tight(n, d, dtype) if kind == "tight" else rows(kind, n, d, dtype)).to(device)
    centroids = seeds(x, r, k) if n >= k else seeds(x.repeat(k, 1) * (1 + torch.rand(n * k, 1, device=device)), r, k)
    backend = make(kib and kib << 10, falling)
    spy = backend.launch = Spy(backend.launch)
    spy.decides = False  # it would take every centroid for a candidate
    width = 0.0

    def spoil(operand: Looks) -> Looks:
        nonlocal width
        finer = operand.finer
        norms = moments.frame.norms(moments.dist2).double()
        known = moments.frame.operand(centroids, dtype, SPLIT)
        width = float((known.high.double().abs() + known.slope.double() * norms).max()) * 2**6 + 1
        return all_open(replace(operand, finer=replace(finer, reach=torch.full_like(finer.reach, width))))

    moments = Moments.of(TensorSource(x))
    labels, decided = assigned(backend, x, centroids, spoil)
    assert decided == n * r
    finer = moments.frame.operand(centroids, dtype, SPLIT)
    assert finer.shift is not None
    seen = (x.to(finer.shift.dtype) * finer.scale - finer.shift).float().double()
    norms = moments.frame.norms(moments.dist2).double()
    bounds = finer.slope.double() * norms
    lower = (finer.low.double() + finer.matrix.double() @ seen.t() - bounds).view(r, k, n)
    least, index = lower.min(1)
    upper = (least + 2 * bounds.view(r, k, n).gather(1, index[:, None])[:, 0] + width).cpu()
    slack = bounds.view(r, k, n).amax(1).cpu() + 2.0**-22 * width
    counts, places, ends_ = spy.left[0]
    assert counts.tolist() == [n] * r
    for restart in range(r):
        assert places[restart].sort().values.tolist() == list(range(n))
        error = (ends_[restart].double() - upper[restart][places[restart].long()]).abs()
        assert bool((error <= slack[restart][places[restart].long()]).all())
    labelled = lower.gather(1, labels.to(device).long()[:, None])[:, 0]
    assert bool((labelled - least <= bounds.view(r, k, n).amax(1)).all())


def tight(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows in tight groups: differences between those of a group are beneath what float16 sees."""
    random = torch.Generator().manual_seed(d)
    centres = torch.randn(4, d, generator=random, dtype=torch.float64)
    return (
        centres[torch.arange(n) % 4] + 0.02 * d**0.25 * torch.randn(n, d, generator=random, dtype=torch.float64)
    ).to(dtype)


@pytest.mark.parametrize("shared_bytes", [None, TOO_LITTLE], ids=["fused", "wide"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("n", "d", "k", "r"), [(300, 16, 50, 2), (200, 70, 20, 1), (100, 1100, 12, 1)])
def test_of_rows_in_tight_groups_the_first_look_leaves_most_and_the_second_few(
    n: int, d: int, k: int, r: int, offset: float, shared_bytes: int | None, device: torch.device, make: Make
) -> None:
    x = (tight(n, d, torch.float32) + offset).to(device)
    backend = make(shared_bytes)
    spy = backend.launch = Spy(backend.launch)
    centroids = torch.stack([x[i * k : (i + 1) * k] for i in range(r)])
    labels, decided = assigned(backend, x, centroids)
    assert [mislabelled(labels[i], x.cpu(), centroids[i].cpu()) for i in range(r)] == [0] * r
    assert spy.opened[0].sum() > 0.7 * n * r
    assert decided < 0.05 * n * r


def test_centroids_out_of_all_proportion_certify_nothing_wrong(device: torch.device, make: Make) -> None:
    x = rows("noise", 60, 5, torch.float32).to(device)
    far = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    for scale in (1e3, 1e5, 1e8, 1e20, 1e30):
        for centroids in (far * scale, torch.cat([x[:3], far[:3] * scale]), far + scale):
            for way in NARROW:
                found = nearest(TensorSource(x), centroids, make(**way))
                assert mislabelled(found.cpu(), x, centroids) == 0


@pytest.mark.compiler
@settings(max_examples=40, deadline=None)
@given(
    d=st.sampled_from([1, 3, 37, 200, 1030]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["blobs", "noise", "relu", "heavy tails", "unequal features"]),
    scale=st.integers(-140, 100),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    beside=st.integers(0, 26),
    seed=st.integers(0, 2**31 - 1),
)
def test_rows_near_the_border_of_two_centroids_are_no_escape(
    d: int, dtype: torch.dtype, kind: str, scale: int, offset: float, beside: int, seed: int
) -> None:
    rng = np.random.RandomState(seed)
    values = KINDS[kind](rng, 40, d) + offset
    step = np.std(values, axis=0) * rng.randn(3, d)
    # Between a centroid and its mirror image, and 2**-beside of the way to one of them, with what lies across that way.
    along = step[0] / np.linalg.norm(step[0]) if step[0].any() else step[0]
    middle = values - np.outer((values - values[0]) @ along, along)
    values[1:] = (middle + np.outer(rng.choice([-1, 1], 40) * 2.0**-beside, step[0]))[1:]
    centres = np.concatenate([values[0] + step, values[0] - step])
    largest = max(np.abs(values).max(), np.abs(centres).max())
    unit = 2.0**14 / largest if dtype == torch.float16 else min(2.0**scale, 2.0**120 / largest)
    x = torch.from_numpy(values * unit).to(dtype)
    centroids = torch.from_numpy(centres * unit).to(centroid_dtype(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_wide, "multiplied", lambda a, b: a.float() @ b.float())
        for launcher in (HostLauncher(), HostLauncher(TOO_LITTLE), HostLauncher(H100, hopper=True)):
            backend = CupyBackend(launcher)
            labels, _ = assigned(backend, x, centroids[None])
            assert mislabelled(labels[0], x, centroids) == 0
            assert mislabelled(nearest(TensorSource(x), centroids, backend), x, centroids) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("padded", math.nan),  # what is infinite there has a slope that is no number: `Frame.operand` sees to it
        ("low", math.nan),
        ("low", -math.inf),
        ("slope", math.nan),
        ("slope", math.inf),
        ("reach", math.nan),
        ("reach", math.inf),
    ],
)
def test_what_is_not_a_number_certifies_nothing_wrong(
    field: str, value: float, device: torch.device, make: Make
) -> None:
    def first(operand: Looks) -> Looks:
        if field in ("low", "slope"):
            terms = operand.terms.clone()
            terms[0, 2, field == "slope"] = value
            return replace(operand, terms=terms)
        spoiled = getattr(operand, field).clone()
        spoiled[line(operand, 2) if field == "padded" else (0, 2)] = value
        return replace(operand, **{field: spoiled})

    def second(operand: Looks) -> Looks:
        finer = operand.finer
        if field in ("low", "slope"):
            terms = finer.terms.clone()
            terms[0, 2, field == "slope"] = value
            return all_open(replace(operand, finer=replace(finer, terms=terms)))
        name = {"padded": "parts"}.get(field, field)
        spoiled = getattr(finer, name).clone()
        spoiled[0, 2] = value
        return all_open(replace(operand, finer=replace(finer, **{name: spoiled})))

    def third(operand: Looks) -> Looks:
        name, at = {"padded": ("matrix", 2), "reach": ("terms", (0, 2))}.get(field, ("terms", (0, 2, field == "slope")))
        spoiled = getattr(operand.finer, name).clone()
        spoiled[at] = value
        nothing_certain = torch.full_like(operand.finer.reach, math.nan)
        return all_open(replace(operand, finer=replace(operand.finer, reach=nothing_certain, **{name: spoiled})))

    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        for spoil in (first, second, third):
            labels, _ = assigned(make(**way), x, x[None, :4], spoil)
            assert mislabelled(labels[0], x, x[:4]) == 0


def test_every_row_is_left_open_where_one_score_is_no_number(device: torch.device, make: Make) -> None:
    def spoil(operand: Looks) -> Looks:
        parts, padded = operand.finer.parts.clone(), operand.padded.clone()
        parts[0, 3, 0, 1, 2] = padded[line(operand, 3)] = math.nan  # of the lower parts
        return replace(operand, padded=padded, finer=replace(operand.finer, parts=parts))

    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        labels, decided = assigned(make(**way), x, x[None, :4], spoil)
        assert decided == 50
        assert mislabelled(labels[0], x, x[:4]) == 0


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_labels_are_in_range_whatever_became_of_the_rows(
    spoiled: float, precision: str, device: torch.device, make: Make
) -> None:
    for d, way in WAYS:
        x = rows("blobs", 50, d).to(device)
        moments = Moments.of(TensorSource(x))
        centroids = x[None, :4].clone()
        x[7, 0], x[9] = spoiled, spoiled
        backend = make(**way)
        labels = torch.full((1, 50), -1, dtype=torch.int32, device=device)
        operand = backend.prepare(moments.frame, centroids, x.dtype)
        backend.assign(x, moments.frame.norms(moments.dist2), operand, labels, precision)
        assert ((labels >= 0) & (labels < 4)).all()


def test_fast_takes_the_least_score(device: torch.device, make: Make) -> None:
    for d, way in (*((30, way) for way in NARROW), (1100, {"shared_bytes": LITTLE})):
        x = rows("blobs", 200, d).to(device)
        centroids = seeds(x, 1, 40)
        operand = Moments.of(TensorSource(x)).frame.operand(centroids, x.dtype, FLOAT16)
        assert operand.shift is not None
        seen = (x * operand.scale - operand.shift).half().double()
        scores = seen @ operand.matrix.double().t() + (operand.high[:, 0].double() + operand.low[:, 0].double()) / 2
        least = scores.amin(1)
        labels, decided = assigned(make(**way), x, centroids, precision="fast")
        assert decided == 0
        excess = scores.gather(1, labels[0].long().to(device)[:, None])[:, 0] - least
        assert excess.max() <= 1e-5 * scores.abs().max()
