"""A sketch certifies no label that the reference distance would not give, and changes no bit of a fit."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases_cluster import KINDS, mislabelled, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuclust import KMeans
from gpuclust.cluster import sketch as module
from gpuclust.cluster.backends.torch import TorchBackend, propose
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.sketch import Sketch, Sketches
from gpuclust.cluster.sources.base import TensorSource


def images(n: int, d: int, seed: int = 0, rank: int = 6) -> torch.Tensor:
    """Rows that lie near a space of few dimensions, as pictures do."""
    rng = np.random.RandomState(seed)
    return torch.from_numpy(rng.randn(n, rank) @ rng.randn(rank, d) + 0.05 * rng.randn(n, d) + 1.0).float()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sketch for data of any size, however many rows it leaves open."""
    monkeypatch.setattr(module, "_LEAST_VALUES", 0)
    monkeypatch.setattr(module, "_LEAST_ROWS", 0)
    monkeypatch.setattr(module, "_WORTH", 100.0)
    monkeypatch.setattr(module, "_FEWEST", 1)


def open_and_certain(x: torch.Tensor, centroids: torch.Tensor, basis: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a pass over the sketch in the space of ``basis`` (1, m, d), and which of them are certain."""
    source = TensorSource(x)
    sketch = Sketch(source, Moments.of(source), basis, x.shape[1] // 8)
    sketch.read()
    labels = torch.full((1, len(x)), -1, dtype=torch.int32)
    row, _, _ = propose(sketch.rows, sketch.norms, sketch.operand(centroids), labels)
    certain = np.ones(len(x), bool)
    certain[row.numpy()] = False
    return labels[0].numpy(), certain


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    d=st.sampled_from([64, 100, 1030]),
    k=st.integers(1, 9),
    shaken=st.sampled_from([0.0, 1e-7, 1e-3, 0.3]),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_a_sketch_certifies_is_the_nearest(
    kind: str, dtype: torch.dtype, d: int, k: int, shaken: float, seed: int
) -> None:
    x = rows(kind, 60, d, dtype, seed)
    rng = np.random.RandomState(seed)
    near = x[torch.from_numpy(rng.randint(60, size=k))].to(centroid_dtype(dtype))
    centroids = (near * (1 + shaken * torch.from_numpy(rng.randn(k, d)))).to(near.dtype)
    basis = x[torch.from_numpy(rng.randint(60, size=max(2, k)))].to(near.dtype)[None]
    labels, certain = open_and_certain(x, centroids[None], basis)
    assert mislabelled(labels[certain], x[torch.from_numpy(certain)], centroids) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["noise", "relu", "offset", "heavy tails"])
@pytest.mark.parametrize("d", [64, 1030])
def test_what_forming_a_sketch_rounds_is_within_its_bound(d: int, kind: str, dtype: torch.dtype) -> None:
    x = rows(kind, 300, d, dtype)
    x[7] = x.double().mean(0).to(dtype)  # all that this row rounds comes from its offset, where it is used as stored
    source = TensorSource(x)
    known = Moments.of(source)
    for stored in (False, True) if dtype == torch.float32 else (False,):
        moments = replace(known, frame=replace(known.frame, stored=stored))
        sketch = Sketch(source, moments, x[None, :20].to(centroid_dtype(dtype)), 16)
        sketch.read()
        exact = moments.frame.moved(x) @ sketch.basis
        off = torch.linalg.vector_norm(sketch.rows.double() - exact, dim=1)
        far = moments.dist2.sqrt() * moments.frame.scale
        assert (off <= sketch.forming * (far + sketch.lift)).all()
        assert off.max() > 0
        left = torch.linalg.vector_norm(moments.frame.moved(x) - sketch.rows.double() @ sketch.basis.t(), dim=1)
        assert (left <= sketch.norms.double()).all()
        assert ((far + sketch.lift) / 16 <= sketch.norms.double()).all()  # what all else that rounds is a share of
        assert (sketch.norms.double() <= left + far / 16 + sketch.lift / 16 + 1e-2 * far.max()).all()


def test_centroids_in_their_own_space_leave_few_rows_open() -> None:
    x = images(2000, 256)
    centroids = x[:20][None]
    labels, certain = open_and_certain(x, centroids, centroids)
    assert certain.mean() > 0.9
    assert mislabelled(labels[certain], x[torch.from_numpy(certain)], centroids[0]) == 0


def test_a_space_that_has_nothing_to_do_with_the_centroids_certifies_little() -> None:
    x = images(2000, 256)
    _, certain = open_and_certain(x, x[:20][None], torch.randn(1, 20, 256, generator=torch.Generator().manual_seed(0)))
    assert certain.mean() < 0.5


@pytest.mark.parametrize("kind", [*sorted(KINDS), "images"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_fit_has_the_same_bits_with_a_sketch(
    kind: str, dtype: torch.dtype, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(700, 64).to(dtype) if kind == "images" else rows(kind, 700, 64, dtype)
    weights = torch.arange(700.0) % 4
    used = []

    class Seen(Sketch):
        def read(self) -> None:
            used.append(True)
            super().read()

    monkeypatch.setattr(module, "Sketch", Seen)
    model = KMeans(12, n_init=3, random_state=1, solver="primal", tol=0)
    with_sketch = deepcopy(model.fit(x, sample_weight=weights))
    times = len(used)
    monkeypatch.setattr(module, "_LEAST_ROWS", 1 << 60)
    without = model.fit(x, sample_weight=weights)
    assert len(used) == times
    assert times or without.n_iter_ <= 3
    assert torch.equal(with_sketch.labels_, without.labels_)
    assert torch.equal(with_sketch.cluster_centers_, without.cluster_centers_)
    assert (with_sketch.inertia_, with_sketch.n_iter_) == (without.inertia_, without.n_iter_)


def test_a_sketch_that_does_not_pay_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_VALUES", 0)
    monkeypatch.setattr(module, "_LEAST_ROWS", 0)
    for x, pays in ((rows("noise", 2000, 128), False), (images(2000, 128), True)):
        source = TensorSource(x)
        moments = Moments.of(source)
        norms = moments.frame.norms(moments.dist2)
        sketches, backend = Sketches(TorchBackend(), source, moments, norms, 1 << 30), TorchBackend()
        labels = torch.empty(1, 2000, dtype=torch.int32)
        found = [
            sketches.assign(backend.prepare(moments.frame, x[None, :30], x.dtype), labels, "exact") for _ in range(4)
        ]
        assert found[:2] == [None, None]
        assert [one is not None for one in found[2:]] == [pays, pays]
