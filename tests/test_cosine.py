"""metric="cosine": spherical k-means beside a plain one in NumPy, and the promises of the other metric kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import as_float64, blobs, mislabelled, relu, rows
from cases_rows import tight
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize

from gpuclust.cluster import KMeans
from gpuclust.cluster.cosine import UnitRows, unit_means, unit_rows
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.errors import InputError, UnavailableError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def spherical(
    x: np.ndarray, init: np.ndarray, weights: np.ndarray, most: int = 300
) -> tuple[np.ndarray, np.ndarray, float]:
    """Dhillon and Modha's algorithm as it is written, until labels repeat: labels, concept vectors, sum of 1 - cos."""
    x, centroids = normalize(x), normalize(init)
    labels = np.full(len(x), -1)
    for _ in range(most):
        found = (x @ centroids.T).argmax(1)
        if (found == labels).all():
            break
        labels = found
        sums = np.stack([(weights[labels == j, None] * x[labels == j]).sum(0) for j in range(len(centroids))])
        centroids = normalize(sums)
    return labels, centroids, float((weights * (1 - (x * centroids[labels]).sum(1))).sum())


def cosine(k: int, **options: Any) -> KMeans:
    return KMeans(k, metric="cosine", **{"random_state": 0, **options})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d", "k"), [(400, 3, 6), (600, 50, 8), (160, 1500, 4)])
def test_it_is_spherical_k_means_from_the_same_start(n: int, d: int, k: int, dtype: str, weighted: bool) -> None:
    rng = np.random.RandomState(n)
    x = (blobs(rng, n, d) * rng.exponential(size=(n, 1))).astype(dtype)
    weights = rng.exponential(size=n) if weighted else np.ones(n)
    init = x[np.random.RandomState(3).permutation(n)[:k]]
    ours = cosine(k, init=init, tol=0).fit(x, sample_weight=weights if weighted else None)
    labels, centroids, inertia = spherical(x.astype(np.float64), init.astype(np.float64), weights)
    assert len(np.unique(labels)) == k, "the plain one fills no empty clusters"
    np.testing.assert_array_equal(ours.labels_, labels)
    np.testing.assert_allclose(ours.cluster_centers_, centroids, atol=1e-6 if dtype == "float32" else 1e-13)
    assert ours.inertia_ == pytest.approx(inertia, rel=1e-5 if dtype == "float32" else 1e-12)
    assert ours.cluster_centers_.dtype == x.dtype


def test_its_own_seeds_find_what_k_means_of_unit_rows_finds() -> None:
    x = relu(np.random.RandomState(0), 500, 20)
    x = x[x.any(1)]
    found = [cosine(6, random_state=seed, n_init=4).fit(x).inertia_ for seed in range(10)]
    plain = [KMeans(6, random_state=seed, n_init=4).fit(normalize(x)) for seed in range(10)]
    best = [
        len(x) - sum(np.linalg.norm(normalize(x)[fit.labels_ == j].sum(0)) for j in range(6)) for fit in plain
    ]  # the objective of spherical k-means at the partition of the other
    assert np.median(found) <= np.median(best) * 1.005


@pytest.mark.parametrize("kind", ["blobs", "noise", "offset", "heavy tails", "near ties", "unequal features"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_labels_are_the_nearest_of_the_returned_centroids_to_the_unit_rows(kind: str, dtype: torch.dtype) -> None:
    x = rows(kind, 400, 7, dtype)
    x = x[x.any(1) & x.isfinite().all(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # rounded to few bits, few directions stay distinct
        fit = cosine(6, max_iter=4).fit(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert fit.cluster_centers_.dtype == wide
    units = unit_rows(x, wide)
    assert mislabelled(fit.labels_, units, fit.cluster_centers_) == 0
    assert torch.equal(fit.predict(x), fit.labels_)
    lengths = np.linalg.norm(as_float64(fit.cluster_centers_), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2.0**-23 if wide == torch.float32 else 2.0**-51)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_count_by_their_direction_alone(dtype: torch.dtype) -> None:
    x = rows("blobs", 300, 9, dtype)
    rng = np.random.RandomState(0)
    powers = torch.from_numpy(np.exp2(rng.randint(-60, 60, size=(300, 1)))).to(dtype)
    plain, scaled = cosine(5).fit(x), cosine(5).fit(x * powers)
    assert torch.equal(plain.labels_, scaled.labels_)
    assert torch.equal(plain.cluster_centers_, scaled.cluster_centers_)
    assert plain.inertia_ == scaled.inertia_
    other = cosine(5, init=plain.cluster_centers_ * 7.3).fit(x * torch.from_numpy(rng.rand(300, 1) + 0.1).to(dtype))
    assert torch.equal(other.labels_, plain.labels_)


def test_transform_score_and_inertia_are_one_minus_cosine() -> None:
    x = rows("relu", 300, 12, torch.float64)
    x = x[x.any(1)].numpy()
    weights = np.random.RandomState(1).exponential(size=len(x))
    model = cosine(4, n_init=2).fit(x, sample_weight=weights)
    expected = 1 - normalize(x) @ model.cluster_centers_.T
    np.testing.assert_allclose(model.transform(x), expected, atol=1e-13)
    np.testing.assert_array_equal(model.transform(x).argmin(1), model.labels_)
    assert model.inertia_ == pytest.approx((weights * expected.min(1)).sum(), rel=1e-12)
    assert model.score(x, sample_weight=weights) == pytest.approx(-model.inertia_, rel=1e-14)
    assert model.fit_report_.inertia == model.inertia_


def test_no_bit_depends_on_chunks_or_on_where_the_rows_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = rows("blobs", 700, 30).numpy()
    weights = np.random.RandomState(1).exponential(size=700)
    plain = cosine(6, n_init=3).fit(x, sample_weight=weights)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "3KiB")
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    least = tight(x, 6, 2.0**-20, buffers=6)
    for given, limit in ((x, None), (x, least), (mapped, least), ([x[:100], x[100:150], x[150:]], None)):
        found = cosine(6, n_init=3, memory_limit=limit).fit(given, sample_weight=weights)
        np.testing.assert_array_equal(found.labels_, plain.labels_)
        np.testing.assert_array_equal(found.cluster_centers_, plain.cluster_centers_)
        assert found.inertia_ == plain.inertia_
        np.testing.assert_array_equal(found.predict(given), plain.labels_)
        np.testing.assert_array_equal(found.transform(given), plain.transform(x))
        assert found.score(given) == plain.score(x)


def test_a_sketch_of_unit_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("blobs", 6000, 256)
    sketched = cosine(10, init="random", tol=0, n_init=1).fit(x)
    assert UnitRows(TensorSource(x)).resident
    monkeypatch.setattr(UnitRows, "resident", False, raising=False)
    monkeypatch.setattr("gpuclust.cluster.sketch.Sketches.assign", lambda *arguments: None)
    plain = cosine(10, init="random", tol=0, n_init=1).fit(x)
    assert torch.equal(sketched.labels_, plain.labels_)
    assert torch.equal(sketched.cluster_centers_, plain.cluster_centers_)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_any_size_become_unit_rows(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    info = torch.finfo(dtype)
    for value in (info.max, info.smallest_normal, info.smallest_normal * info.eps, 3.0):
        x = torch.tensor([[value, -value, 0.0], [0.0, 0.0, value]], dtype=dtype)
        expected = torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [0, 0, 1]], dtype=torch.float64).to(wide)
        torch.testing.assert_close(unit_rows(x, wide), expected, rtol=torch.finfo(wide).eps, atol=0)
    x = rows("unequal features", 100, 40, dtype)
    alone = torch.cat([unit_rows(row[None], wide) for row in x])
    assert torch.equal(alone, unit_rows(x, wide))


def test_a_mean_without_direction_leaves_the_centroid() -> None:
    before = torch.eye(2)
    means = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert torch.equal(unit_means(means, before), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    fit = cosine(1, init=np.array([[1.0, 0.0]])).fit(np.array([[0.0, 2.0], [0.0, -1.0]]))
    np.testing.assert_array_equal(fit.cluster_centers_, [[1.0, 0.0]])
    assert fit.inertia_ == 2


def test_clusters_that_run_empty_get_a_row_of_unit_length() -> None:
    x = np.abs(blobs(np.random.RandomState(0), 200, 4)) + 0.1
    init = np.concatenate([x[:2], -np.eye(4)[:3]])
    fit = cosine(5, init=init).fit(x)
    assert len(np.unique(fit.labels_)) == 5
    np.testing.assert_allclose(np.linalg.norm(fit.cluster_centers_, axis=1), 1, rtol=1e-15)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(1\)"):
        cosine(2).fit(np.arange(1.0, 5)[:, None])


def test_a_callable_gets_the_rows_as_they_are() -> None:
    x = blobs(np.random.RandomState(0), 50, 3)
    seen = []

    def init(rows: np.ndarray, k: int, random_state: Any) -> np.ndarray:
        seen.append(rows)
        return rows[:k]

    fit = cosine(3, init=init, n_init=1).fit(x)
    assert seen[0] is x or np.array_equal(seen[0], x)
    np.testing.assert_array_equal(fit.labels_, cosine(3, init=x[:3]).fit(x).labels_)


def test_rows_without_direction_are_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(np.random.RandomState(0), 300, 3)
    model = cosine(3).fit(x)
    x[[217, 250]] = 0
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "1KiB")
    for method in ("fit", "predict", "transform", "score"):
        with pytest.raises(InputError, match=r"row of zeros: row 217 \(counted from 0\) has no direction"):
            getattr(model, method)(x)
    x[230, 1] = np.nan
    x[217] = 1
    x[250] = 1
    with pytest.raises(InputError, match=r"NaN.* in row 230, column 1"):
        model.fit(x)
    x[230, 1] = -np.inf
    with pytest.raises(InputError, match=r"infinity.* in row 230, column 1"):
        model.predict(x)
    with pytest.raises(InputError, match=r"initial centers contain one of zeros: number 1 "):
        cosine(2, init=np.array([[1.0, 0, 0], [0, 0, 0]])).fit(np.eye(3))


@pytest.mark.parametrize("option", [{"solver": "dual"}, {"algorithm": "hartigan-wong"}, {"backend": "cuml"}])
def test_what_knows_euclidean_distances_alone_is_refused(option: dict[str, str]) -> None:
    with pytest.raises(UnavailableError, match=r"metric='cosine' and .* do not go together"):
        cosine(2, **option).fit(np.eye(3))


@pytest.mark.gpu
def test_a_gpu_finds_the_same_bits() -> None:
    x = rows("blobs", 2000, 50)
    here, there = cosine(6).fit(x), cosine(6).fit(x.cuda())
    assert torch.equal(there.labels_.cpu(), here.labels_)
    assert torch.equal(there.cluster_centers_.cpu(), here.cluster_centers_)
    assert there.inertia_ == here.inertia_
