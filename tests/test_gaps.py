"""Gaps certify no label that the reference distance would not give, and change no bit of a fit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, mislabelled, reference_dist2, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuclust import KMeans
from gpuclust.cluster import gaps as module
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.gaps import Gaps
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.sources.base import TensorSource

DTYPES = [torch.float16, torch.float32, torch.float64]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps for data of any size, however many rows they leave open."""
    monkeypatch.setattr(module, "_LEAST_SCORES", 0)
    monkeypatch.setattr(module, "_WORTH", 100.0)


class Watched(Gaps):
    """Gaps that keep the share of labels which each pass read, and know what they should have been."""

    shares: list[float]

    def _read(self, open_rows: list[torch.Tensor], operand: Any, precision: str) -> int:
        self.shares.append(sum(map(len, open_rows)) / self.labels.numel())
        return super()._read(open_rows, operand, precision)


def gaps_for(x: torch.Tensor, spare_bytes: int = 1 << 30) -> tuple[Watched, Any]:
    """Gaps over the rows, and a pass with some centroids (r, k, d): its labels (r, n), or None."""
    source, backend = TensorSource(x), TorchBackend()
    moments = Moments.of(source)
    gaps = Watched(backend, source, moments, moments.frame.norms(moments.dist2), spare_bytes)
    gaps.shares = []

    def assign(centroids: torch.Tensor) -> torch.Tensor | None:
        labels = torch.full((len(centroids), len(x)), -1, dtype=torch.int32)
        done = gaps.assign(backend.prepare(moments.frame, centroids, x.dtype), labels, "exact")
        return None if done is None else labels

    return gaps, assign


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(DTYPES),
    d=st.sampled_from([1, 2, 17, 90]),
    k=st.integers(2, 9),
    step=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 0.3]),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_label_is_the_nearest_while_centroids_wander(
    kind: str, dtype: torch.dtype, d: int, k: int, step: float, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_SCORES", 0)
        patch.setattr(module, "_WORTH", 100.0)
        x = rows(kind, 60, d, dtype, seed)
        rng = np.random.RandomState(seed)
        centroids = x[torch.from_numpy(rng.choice(60, (2, k)))].to(centroid_dtype(dtype))
        _, assign = gaps_for(x)
        for _ in range(8):
            noise = torch.from_numpy(rng.randn(*centroids.shape)) * x.double().std()
            # A far step of one centroid alone, now and then: the others lose its way, too.
            noise[rng.randint(2), rng.randint(k)] *= 3
            centroids = (centroids + step * noise).to(centroids.dtype)
            labels = assign(centroids)
            if labels is not None:
                for one, centres in zip(labels, centroids, strict=True):
                    assert mislabelled(one, x, centres) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "blobs", "offset", "unequal features", "near ties"])
def test_a_gap_is_at_most_what_lies_between_the_distances(kind: str, dtype: torch.dtype, always: None) -> None:
    x = rows(kind, 500, 17, dtype)
    centroids = x[None, 7:14].to(centroid_dtype(dtype)) * 1.001
    gaps, assign = gaps_for(x)
    for _ in range(3):
        labels = assign(centroids)
    assert labels is not None
    assert gaps.gaps is not None
    distance = np.sort(np.sqrt(reference_dist2(x, centroids[0])), 1)
    scale = TorchBackend().prepare(gaps.moments.frame, centroids, x.dtype).scale
    true = (distance[:, 1] - distance[:, 0]) * scale
    found = gaps.gaps[0].double().numpy()
    assert (found <= true + 2.0**-22 * distance[:, 1] * scale).all()
    if kind != "near ties":
        assert np.median(found[true > 0] / true[true > 0]) > 0.9


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_fit_has_the_same_bits_with_gaps(
    kind: str, dtype: torch.dtype, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(kind, 700, 6, dtype)
    weights = torch.arange(700.0) % 4
    Watched.shares = []
    monkeypatch.setattr("gpuclust.cluster.lloyd.Gaps", Watched)
    model = KMeans(9, n_init=3, random_state=1, solver="primal", tol=0)
    with_gaps = deepcopy(model.fit(x, sample_weight=weights))
    assert Watched.shares or with_gaps.n_iter_ <= 4
    monkeypatch.setattr(module, "_LEAST_SCORES", 1 << 60)
    times = len(Watched.shares)
    without = model.fit(x, sample_weight=weights)
    assert len(Watched.shares) == times
    assert torch.equal(with_gaps.labels_, without.labels_)
    assert torch.equal(with_gaps.cluster_centers_, without.cluster_centers_)
    assert (with_gaps.inertia_, with_gaps.n_iter_) == (without.inertia_, without.n_iter_)


def test_rows_that_stay_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_SCORES", 0)
    Watched.shares = []
    monkeypatch.setattr("gpuclust.cluster.lloyd.Gaps", Watched)
    x = torch.from_numpy(np.random.RandomState(0).rand(20_000, 2))
    KMeans(8, n_init=1, random_state=0, tol=0).fit(x)
    assert len(Watched.shares) > 20
    assert np.mean(Watched.shares) < 0.15


def test_gaps_that_do_not_pay_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_SCORES", 0)
    x = rows("noise", 2000, 90)  # all distances are alike
    gaps, assign = gaps_for(x)
    moved = torch.from_numpy(np.random.RandomState(0).randn(8, 1, 30, 90)).float()
    assert [assign(x[None, :30] + 0.3 * step) for step in moved] == [None] * 8
    assert gaps.passes == 8


def test_they_end_where_centroids_leap_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_SCORES", 0)
    x = rows("blobs", 2000, 3)
    _, assign = gaps_for(x)
    near, far = x[None, :5], x[None, 5:10]
    found = [assign(centroids) is not None for centroids in (near, near, near, near, far, far, far, far)]
    assert found == [False, False, True, True, False, False, False, True]


def test_equal_centroids_which_may_part_have_none(always: None) -> None:
    x = rows("blobs", 300, 3)
    _, assign = gaps_for(x)
    apart = x[None, :4]
    equal = apart.clone()
    equal[0, 3] = equal[0, 2]
    found = [assign(centroids) is not None for centroids in (equal, equal, equal, apart, equal, apart)]
    assert found == [False, False, False, True, False, True]


def test_without_memory_to_spare_there_are_none(always: None) -> None:
    x = rows("blobs", 300, 3)
    assert [gaps_for(x, 1000)[1](x[None, :4]) for _ in range(3)] == [None] * 3


def test_memory_that_runs_out_while_rows_are_read_leaves_the_bits(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows("noise", 900, 4)
    model = KMeans(7, n_init=2, random_state=0, tol=0)
    expected = deepcopy(model.fit(x))
    Watched.shares = []

    class Short(Watched):
        def _read(self, open_rows: list[torch.Tensor], operand: Any, precision: str) -> int:
            done = super()._read(open_rows, operand, precision)
            if len(self.shares) == 3:
                self.shares.append(0.0)
                raise torch.OutOfMemoryError("out of memory")
            return done

    monkeypatch.setattr("gpuclust.cluster.lloyd.Gaps", Short)
    found = model.fit(x)
    assert len(Watched.shares) > 6
    assert any("memory" in note for note in found.fit_report_.notes)
    assert torch.equal(found.labels_, expected.labels_)
    assert torch.equal(found.cluster_centers_, expected.cluster_centers_)
    assert found.inertia_ == expected.inertia_
