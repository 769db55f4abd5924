"""KMeans beside scikit-learn's, and what it promises beyond: exact labels, the same bits, nothing else touched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from cases_cluster import KINDS, blobs, mislabelled, reference_dist2, relu, rows
from sklearn.base import clone
from sklearn.cluster import KMeans as Peer
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from gpuclust import KMeans
from gpuclust.errors import InputError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def start(x: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    distinct = np.unique(x, axis=0)
    return distinct[np.random.RandomState(seed).permutation(len(distinct))[:k]]


def pair(x: np.ndarray, k: int, weight: np.ndarray | None = None, **options: Any) -> tuple[KMeans, Peer]:
    """Ours and scikit-learn's, from the same centroids; scikit-learn's in float64, where it is most exact."""
    init = options.pop("init", None)
    init = start(x, k) if init is None else init
    ours = KMeans(k, init=init, **options).fit(x, sample_weight=weight)
    theirs = Peer(k, init=init.astype(np.float64), n_init=1, **options)
    return ours, theirs.fit(x.astype(np.float64), sample_weight=weight)


# ---- beside scikit-learn


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["blobs", "noise", "relu", "offset", "duplicates", "heavy tails"])
@pytest.mark.parametrize(("n", "d", "k"), [(400, 3, 7), (1000, 64, 20), (150, 1500, 4), (90, 1, 5)])
def test_inertia_is_scikit_learns_from_the_same_centroids(kind: str, dtype: str, n: int, d: int, k: int) -> None:
    x = KINDS[kind](np.random.RandomState(n), n, d).astype(dtype)
    ours, theirs = pair(x, k)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    assert ours.cluster_centers_.dtype == x.dtype
    assert ours.labels_.dtype == np.int32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_mean_what_they_mean_in_scikit_learn(dtype: str) -> None:
    rng = np.random.RandomState(3)
    x = relu(rng, 500, 12).astype(dtype)
    weight = rng.exponential(size=500) * (rng.rand(500) > 0.2)
    ours, theirs = pair(x, 6, weight)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.score(x, sample_weight=weight) == pytest.approx(theirs.score(x.astype(float), sample_weight=weight))


def test_whole_weights_are_repeated_rows() -> None:
    rng = np.random.RandomState(0)
    x, weight = blobs(rng, 120, 4), rng.randint(0, 4, size=120)
    init = start(x, 5)
    weighted = KMeans(5, init=init, tol=0).fit(x, sample_weight=weight)
    repeated = KMeans(5, init=init, tol=0).fit(np.repeat(x, weight, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, rtol=1e-12)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-12)


def test_empty_clusters_are_refilled_as_in_scikit_learn() -> None:
    x = blobs(np.random.RandomState(1), 300, 5)
    init = np.concatenate([x[:3], np.full((3, 5), 1e3) + np.arange(3)[:, None]])
    ours, theirs = pair(x, 6, init=init)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9)
    np.testing.assert_allclose(np.sort(ours.cluster_centers_[:, 0]), np.sort(theirs.cluster_centers_[:, 0]))
    assert len(np.unique(ours.labels_)) == 6


@pytest.mark.parametrize("kind", ["blobs", "relu", "noise"])
def test_own_seeds_are_as_good_as_scikit_learns(kind: str) -> None:
    # 20 seeds of 8 restarts each: n = 400 and the medians are stable to 1e-3.
    x = KINDS[kind](np.random.RandomState(7), 400, 6)
    ours = [KMeans(8, random_state=seed, n_init=8).fit(x).inertia_ for seed in range(20)]
    theirs = [Peer(8, random_state=seed, n_init=8).fit(x).inertia_ for seed in range(20)]
    assert np.median(ours) <= np.median(theirs) * 1.001


@pytest.mark.parametrize(("n", "d", "k"), [(200, 6, 5), (50, 3, 1), (30, 4, 30), (80, 1, 4)])
def test_predict_transform_and_score_agree_with_scikit_learn(n: int, d: int, k: int) -> None:
    rng = np.random.RandomState(n)
    x, new = blobs(rng, n, d), blobs(rng, 40, d)
    ours, theirs = pair(x, k)
    theirs.cluster_centers_ = ours.cluster_centers_.copy()
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
    np.testing.assert_array_equal(ours.predict(x), ours.labels_)
    np.testing.assert_allclose(ours.transform(new), theirs.transform(new), rtol=1e-9, atol=1e-9)
    assert ours.score(new) == pytest.approx(theirs.score(new), rel=1e-9)
    assert ours.score(x) == pytest.approx(-ours.inertia_, rel=1e-12, abs=1e-12)
    np.testing.assert_array_equal(clone(ours).fit_predict(x), ours.labels_)
    np.testing.assert_array_equal(clone(ours).fit_transform(x), ours.transform(x))
    assert list(ours.get_feature_names_out()) == list(theirs.get_feature_names_out())


def test_every_row_its_own_cluster_has_no_inertia() -> None:
    x = blobs(np.random.RandomState(0), 40, 3)
    fit = KMeans(40, random_state=0).fit(x)
    assert fit.inertia_ == 0
    assert sorted(fit.labels_) == list(range(40))
    assert fit.transform(x).min(1).max() == 0


def test_one_cluster_is_the_mean() -> None:
    x = relu(np.random.RandomState(0), 300, 7)
    fit = KMeans(1, random_state=0).fit(x)
    np.testing.assert_allclose(fit.cluster_centers_[0], x.mean(0), rtol=1e-13)
    assert fit.inertia_ == pytest.approx(((x - x.mean(0)) ** 2).sum(), rel=1e-12)


# ---- exact labels


BEYOND_HALF = ("huge", "tiny", "subnormal")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS for dtype in FLOATS if dtype != torch.float16 or kind not in BEYOND_HALF],
    ids=str,
)
def test_no_row_is_mislabelled(kind: str, dtype: torch.dtype) -> None:
    for n, d, k in ((500, 6, 7), (60, 700, 9)):
        x = rows(kind, n, d, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # rounded to few bits, few rows stay distinct
            fit = KMeans(k, random_state=0, max_iter=5).fit(x)
        assert fit.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert mislabelled(fit.labels_, x, fit.cluster_centers_) == 0
        assert torch.equal(fit.predict(x), fit.labels_)


@pytest.mark.parametrize("view", [lambda x: x.T.contiguous().T, lambda x: x[::3], lambda x: x[:, 1::2]])
def test_rows_of_any_strides_are_read_where_they_lie(view: Any) -> None:
    x = view(rows("offset", 600, 20))
    assert not x.is_contiguous()
    fit, packed = KMeans(5, random_state=0).fit(x), KMeans(5, random_state=0).fit(x.contiguous())
    assert mislabelled(fit.labels_, x, fit.cluster_centers_) == 0
    assert torch.equal(fit.labels_, packed.labels_)
    assert torch.equal(fit.cluster_centers_, packed.cluster_centers_)
    assert fit.inertia_ == packed.inertia_


def test_fast_precision_is_as_good_up_to_rounding() -> None:
    x = rows("blobs", 2000, 30)
    exact, fast = (KMeans(5, random_state=0, precision=name).fit(x) for name in ("exact", "fast"))
    assert fast.inertia_ == pytest.approx(exact.inertia_, rel=1e-4)
    assert fast.fit_report_.recheck_share == 0
    assert fast.fit_report_.precision == "fast"


# ---- parameters


def test_n_init_auto_is_one_for_plus_plus_and_arrays_and_ten_for_random_and_callables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = blobs(np.random.RandomState(0), 60, 3)
    seen = []

    def choose(x: np.ndarray, k: int, random_state: np.random.RandomState) -> np.ndarray:
        seen.append(x.shape)
        return x[random_state.permutation(len(x))[:k]]

    for init, restarts in (("k-means++", 1), ("k-means||", 1), (x[:4], 1), ("random", 10), (choose, 10)):
        KMeans(4, init=init, random_state=0, verbose=1).fit(x)
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("restart ") for line in lines) == restarts
    assert seen == [(60, 3)] * 10
    KMeans(4, init=choose, random_state=0, n_init=3).fit(x)
    assert len(seen) == 13


def test_a_callable_starts_the_same_with_the_same_seed() -> None:
    x = blobs(np.random.RandomState(0), 200, 3)
    fits = [
        KMeans(6, init=lambda x, k, random_state: random_state.randn(k, 3), random_state=5, max_iter=2).fit(x)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(fits[0].cluster_centers_, fits[1].cluster_centers_)


@pytest.mark.parametrize("kind", ["table", "list", "array", "tensor"])
def test_a_callable_gets_the_rows_as_an_array(kind: str) -> None:
    x = blobs(np.random.RandomState(0), 40, 3)
    given = {"table": pandas.DataFrame(x), "list": x.tolist(), "array": x, "tensor": torch.from_numpy(x)}[kind]
    fit = KMeans(4, init=lambda rows, k, random_state: rows[np.arange(k)], n_init=1).fit(given)
    expected = KMeans(4, init=x[:4]).fit(x)
    np.testing.assert_array_equal(np.asarray(fit.cluster_centers_), expected.cluster_centers_)


def test_given_centroids_with_more_restarts_warn() -> None:
    x = blobs(np.random.RandomState(0), 60, 3)
    with pytest.warns(RuntimeWarning, match="performing only one init"):
        KMeans(4, init=x[:4], n_init=3).fit(x)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_fewer_distinct_rows_than_clusters_warn(init: str) -> None:
    x = np.repeat(np.arange(3.0)[:, None], 5, axis=0)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(3\) found smaller than n_clusters \(4\)"):
        fit = KMeans(4, init=init, random_state=0).fit(x)
    assert fit.inertia_ == 0


def test_iterations_stop_at_max_iter_with_labels_of_the_returned_centroids() -> None:
    x = rows("noise", 2000, 8)
    for limit in (1, 2, 3):
        fit = KMeans(12, random_state=0, max_iter=limit, tol=0).fit(x)
        assert fit.n_iter_ == limit
        assert len(fit.fit_report_.trace) == limit
        assert mislabelled(fit.labels_, x, fit.cluster_centers_) == 0


def test_without_tolerance_it_ends_in_a_fixed_point() -> None:
    x = blobs(np.random.RandomState(0), 500, 4)
    fit = KMeans(6, random_state=0, tol=0).fit(x)
    means = np.stack([x[fit.labels_ == j].mean(0) for j in range(6)])
    np.testing.assert_allclose(fit.cluster_centers_, means, rtol=1e-12)
    assert fit.n_iter_ < 300


def test_the_same_seed_gives_the_same_bits() -> None:
    x = rows("relu", 700, 9)
    state = np.random.RandomState
    for seeds in ((3, 3), (state(3), state(3)), (np.int64(3), 3)):
        one, two = (KMeans(5, random_state=seed, n_init=2, max_iter=2).fit(x) for seed in seeds)
        assert torch.equal(one.labels_, two.labels_)
        assert torch.equal(one.cluster_centers_, two.cluster_centers_)
        assert one.inertia_ == two.inertia_
    state = np.random.RandomState(3)
    firsts = [KMeans(5, random_state=state, max_iter=1).fit(x).cluster_centers_ for _ in range(2)]
    assert not torch.equal(*firsts), "a RandomState goes on"


def test_no_seed_draws_from_numpys_global_state() -> None:
    x = rows("noise", 200, 9)
    found = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        found.append(KMeans(5, max_iter=1).fit(x).cluster_centers_)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- refusals


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        *(("n_clusters", value) for value in (0, -1, 2.0, "3", None, True)),
        *(("n_init", value) for value in (0, "often", 1.5)),
        *(("max_iter", value) for value in (0, 2.5)),
        *(("tol", value) for value in (-1e-3, float("nan"), "small")),
        *(("memory_limit", value) for value in (0, "1 GiB")),
        *((name, "none") for name in ("init", "algorithm", "metric", "precision", "solver", "backend")),
        *(("random_state", value) for value in (-1, "seed", 0.5)),
        *(("verbose", value) for value in (-1, 0.5, "yes", None)),
        *(("copy_x", value) for value in (1, "yes", None)),
        *(("init", value) for value in (None, 3, {}, [1.0, 2.0], np.ones(3), [[1.0], [1.0, 2.0]], torch.ones(()))),
        *(("init", value) for value in (np.ones((1, 2, 3)), torch.ones(2), {"a": [1]}, object())),
        *((name, np.array(["lloyd", "auto"])) for name in ("n_clusters", "n_init", "max_iter", "tol", "verbose")),
        *((name, np.array(["lloyd", "auto"])) for name in ("algorithm", "metric", "precision", "solver", "backend")),
        *((name, np.array([1, 2])) for name in ("init", "copy_x", "random_state", "memory_limit", "n_init")),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # the same in each process
)
def test_a_parameter_out_of_range_is_named(parameter: str, value: Any) -> None:
    class Named(KMeans):
        pass

    x = blobs(np.random.RandomState(0), 30, 3)
    for kind in (KMeans, Named):
        model = kind(**{"n_clusters": 2, parameter: value})
        for error in (ValueError, TypeError):  # as scikit-learn's InvalidParameterError is both
            with pytest.raises(
                error, match=rf"(?s)^The '{parameter}' parameter of {kind.__name__} must be .* Got .* ins"
            ):
                model.fit(x)


@pytest.mark.parametrize("parameter", ["n_clusters", "n_init", "max_iter", "tol", "verbose", "copy_x", "random_state"])
def test_parameters_are_refused_where_scikit_learn_refuses_them(parameter: str) -> None:
    x = blobs(np.random.RandomState(0), 30, 3)
    values = [None, -1, 0, 1, 2, 0.5, "auto", "x", [1], np.ones(2), np.int8(3), np.float32(1)]
    for value in values + [True, False] * (parameter in ("verbose", "copy_x")):
        refused = []
        for kind in (KMeans, Peer):
            try:
                kind(**{"n_clusters": 2, "n_init": 1, parameter: value}).fit(x)
                refused.append(False)
            except ValueError as error:
                refused.append(f"'{parameter}' parameter of KMeans must be" in str(error))
        assert refused[0] == refused[1], value


def test_a_generator_is_drawn_from() -> None:
    x = rows("noise", 200, 9)
    found = []
    for generator in (np.random.default_rng(1), np.random.default_rng(1), np.random.default_rng(2)):
        model = KMeans(5, max_iter=1, random_state=generator)
        found.append([model.fit(x).cluster_centers_ for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_more_clusters_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="n_samples=3 should be >= n_clusters=4"):
        KMeans(4).fit(np.eye(3))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_given_centroids_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"shape of the initial centers \(\d, \d\) does not match"):
        KMeans(2, init=np.zeros(shape)).fit(np.eye(3))
    with pytest.raises(ValueError, match="initial centers contain NaN"):
        KMeans(2, init=np.full((2, 3), np.nan)).fit(np.eye(3))


@pytest.mark.parametrize("method", ["predict", "transform", "score", "get_feature_names_out"])
def test_before_fit_there_is_nothing_to_ask(method: str) -> None:
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(KMeans(), method)(np.eye(3))


@pytest.mark.parametrize("method", ["predict", "transform", "score"])
def test_rows_of_another_width_and_bad_values_are_refused_after_the_fit(method: str) -> None:
    model = KMeans(2, random_state=0).fit(np.eye(3))
    with pytest.raises(ValueError, match="X has 4 features, but KMeans is expecting 3 features as input"):
        getattr(model, method)(np.eye(4))
    bad = np.eye(3)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"NaN.* in row 2, column 1"):
        getattr(model, method)(bad)


@pytest.mark.parametrize("method", ["fit", "predict", "transform", "score"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_values_whose_squares_overflow_are_refused_by_all_methods(method: str, precision: str) -> None:
    x = rows("blobs", 500, 3, torch.float64)
    model = KMeans(4, random_state=0, precision=precision).fit(x)
    far = x.clone()
    far[321] *= 1e200  # one row is enough
    for given in (x * 1e200, far, [far[:400], far[400:]]):
        with pytest.raises(InputError, match=r"values up to .*e\+20\d are too large: squared distances overflow"):
            getattr(model, method)(given)


@pytest.mark.parametrize("kind", ["blobs", "offset", "one far row"])
def test_what_fit_takes_all_methods_take_up_to_the_end_of_the_range(kind: str) -> None:
    x, taken = rows(kind, 60, 3, torch.float64), []
    x /= x.abs().amax()
    for exponent in range(504, 526):
        for k in (1, 2, 7):
            model = KMeans(k, random_state=0, n_init=1)
            try:
                model.fit(x * 2.0**exponent)
            except InputError:
                continue
            taken.append(exponent)
            given, centroids = x * 2.0**exponent, model.cluster_centers_
            assert 0 < model.inertia_ < math.inf
            assert model.score(given) == -model.inertia_
            assert mislabelled(model.predict(given), given, centroids) == 0
            np.testing.assert_allclose(model.transform(given) ** 2, reference_dist2(given, centroids), rtol=1e-12)
    assert 504 in taken
    assert max(taken) < 525


@pytest.mark.parametrize("scale", [1.0, 1e60, 1e-60])
@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_labels_are_exact_where_rows_and_centroids_are_of_different_types(types: Any, scale: float) -> None:
    fitted, asked = types
    x, new = (
        rows("blobs", 300, 3, dtype, seed) * (scale if dtype == torch.float64 else 1.0)
        for seed, dtype in enumerate(types)
    )
    model = KMeans(20, random_state=0).fit(x)
    assert (model.cluster_centers_.dtype, new.dtype) == (fitted, asked)
    dist2 = reference_dist2(new, model.cluster_centers_)
    assert mislabelled(model.predict(new), new, model.cluster_centers_) == 0
    assert model.score(new) == pytest.approx(-dist2.min(1).sum(), rel=1e-13)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("fitted", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("asked", [np.float16, np.float32, np.float64, np.int64])
def test_distances_are_float64_where_rows_or_centroids_are(fitted: Any, asked: Any, metric: str) -> None:
    x = 1 + 9 * np.random.RandomState(0).rand(60, 3)
    model = KMeans(4, random_state=0, metric=metric).fit(x.astype(fitted))
    new = (2 * x[::-1]).astype(asked)
    found = model.transform(new)
    wide = {np.float64, np.int64}
    assert found.dtype == (np.float64 if {fitted, asked} & wide else np.float32)
    centroids = model.cluster_centers_.astype(np.float64)
    if metric == "euclidean":
        expected = np.sqrt(reference_dist2(new, centroids))
    else:
        expected = 1 - new @ centroids.T / np.linalg.norm(new.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    if metric == "euclidean" and {fitted, asked} <= {np.float32, np.float64}:  # its types of rows
        theirs = Peer(4, init=model.cluster_centers_, n_init=1, max_iter=1).fit(x.astype(fitted))
        assert theirs.transform(new).dtype == found.dtype


def test_distances_beyond_float32_are_finite_where_rows_are_float64() -> None:
    x = rows("blobs", 60, 3)
    model = KMeans(4, random_state=0).fit(x)
    far = x.double() * 1e60
    found = model.transform(far)
    np.testing.assert_allclose(found**2, reference_dist2(far, model.cluster_centers_), rtol=1e-12)
    assert mislabelled(model.predict(far), far, model.cluster_centers_) == 0


def test_sums_that_overflow_are_refused_though_no_distance_does() -> None:
    model = KMeans(1, init=np.zeros((1, 1)), n_init=1).fit(np.array([[-1.0], [1.0]]))
    x = np.full((1000, 1), 1e153)
    assert np.isfinite(model.transform(x)).all()
    with pytest.raises(InputError, match=r"distances up to 1e\+153 are too large"):
        model.score(x)
    assert model.score(x / 100) == pytest.approx(-1e305)


def test_rows_of_any_size_have_a_direction() -> None:
    x = rows("noise", 60, 3, torch.float64)
    model = KMeans(4, metric="cosine", random_state=0).fit(x)
    assert torch.equal(model.predict(x * 2.0**700), model.labels_)
    assert torch.equal(model.transform(x * 2.0**700), model.transform(x))


# ---- what is left alone


def surroundings() -> list[Any]:
    backends: Any = torch.backends
    random = np.random.get_state()
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch says so where the caller used its newer names
        legacy = "mixed"
    return [
        legacy,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        torch.get_rng_state().tolist(),
        random[1].tolist(),
        random[2],
        warnings.filters[:],
    ]


@pytest.fixture(params=["default", "legacy high", "bf16 products"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Settings of torch that a caller may have made."""
    matmul: Any = torch.backends.mkldnn.matmul
    if request.param == "legacy high":
        torch.set_float32_matmul_precision("high")
    elif request.param == "bf16 products":
        matmul.fp32_precision = "bf16"
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "none"


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_everything_else_as_it_was(fails: bool) -> None:
    x = rows("blobs", 300, 4)
    if fails:
        x[200, 2] = float("inf")
    x.requires_grad_()
    kept, before = x.detach().clone(), surroundings()
    model = KMeans(3, random_state=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if fails:
            with pytest.raises(InputError, match="row 200, column 2"):
                model.fit(x)
        else:
            assert mislabelled(model.fit(x).predict(x), x.detach(), model.cluster_centers_) == 0
            model.transform(x)
    assert surroundings() == before
    assert torch.equal(x, kept)
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_torchs_default_type_does_not_matter(dtype: torch.dtype) -> None:
    x = rows("relu", 300, 7)
    usual = KMeans(4, random_state=0, n_init=2).fit(x)
    torch.set_default_dtype(dtype)
    try:
        other = KMeans(4, random_state=0, n_init=2).fit(x)
        assert torch.equal(other.predict(x), usual.labels_)
        assert torch.equal(other.transform(x), usual.transform(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other.labels_, usual.labels_)
    assert torch.equal(other.cluster_centers_, usual.cluster_centers_)
    assert other.inertia_ == usual.inertia_


# ---- weights of any size


@pytest.mark.parametrize("ratio", [1e-30, 1e-12, 1e3, 1e20, 1e25, 1e30])
def test_light_rows_keep_their_digits_beside_heavy_ones(ratio: float) -> None:
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.randn(50, 2), rng.randn(50, 2) + 10])
    weights = np.concatenate([np.full(50, ratio), np.linspace(1, 2, 50)])
    init = x[[0, 60]]
    ours = KMeans(2, init=init).fit(x, sample_weight=weights)
    theirs = Peer(2, init=init, n_init=1).fit(x, sample_weight=weights)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-12)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-12)
    assert ours.score(x, sample_weight=weights) == pytest.approx(-ours.inertia_, rel=1e-12)


def test_weights_that_no_sum_can_tell_apart_are_refused() -> None:
    x = rows("noise", 50, 2)
    with pytest.raises(InputError, match=r"weights of 50 rows differ by a factor of 2\*\*1074, and sums tell at most"):
        KMeans(2).fit(x, sample_weight=[1e-300, *[1.0] * 48, 1e300])


@pytest.mark.parametrize("unit", [2.0**-1000, 2.0**-40, 2.0**7, 2.0**900])
def test_the_unit_of_the_weights_scales_the_inertia_alone(unit: float) -> None:
    x = rows("relu", 300, 5)
    weights = np.random.RandomState(1).exponential(size=300)
    plain, scaled = (
        KMeans(4, random_state=0, n_init=2).fit(x, sample_weight=weights * factor) for factor in (1.0, unit)
    )
    assert torch.equal(scaled.labels_, plain.labels_)
    assert torch.equal(scaled.cluster_centers_, plain.cluster_centers_)
    assert scaled.inertia_ == plain.inertia_ * unit
    assert scaled.score(x, sample_weight=weights * unit) == plain.score(x, sample_weight=weights) * unit
