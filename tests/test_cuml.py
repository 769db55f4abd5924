"""The cuml backend: how cuML is called, and what is made of its results; a small stand-in plays its part here."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import mislabelled, rows

from gpuclust.capture.store import LayerStore
from gpuclust.cluster import KMeans
from gpuclust.cluster.backends import choose, survey
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.cuml import CAVEATS, CumlBackend
from gpuclust.cluster.fit import fit_kmeans
from gpuclust.cluster.sources.base import TensorSource, WatchedSource
from gpuclust.errors import InputError, UnavailableError

CUDA = torch.device("cuda", 0)


class StandIn:
    """``cuml.cluster.KMeans`` as far as it is used: one Lloyd step in float32, from the first rows or what is given."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, *, output_type: str, init: Any, n_clusters: int, n_init: int, max_iter: int, tol: float,
                 random_state: int) -> None:  # fmt: skip
        self.options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, convert_dtype: bool = True) -> StandIn:
        given = self.options["init"]
        self.calls.append({**self.options, "X": X, "sample_weight": sample_weight, "convert_dtype": convert_dtype})
        k = self.options["n_clusters"]
        before = X[:k] if isinstance(given, str) else np.asarray(given)
        labels = ((X[:, None] - before) ** 2).sum(-1).argmin(1)
        weights = np.ones(len(X), X.dtype) if sample_weight is None else sample_weight
        self.cluster_centers_ = np.stack(
            [np.average(X[labels == j], axis=0, weights=weights[labels == j]) for j in range(k)]
        ).astype(np.float32 if convert_dtype else X.dtype)
        self.labels_, self.n_iter_ = labels.astype(np.int64), self.options["max_iter"] + 1
        return self


@pytest.fixture
def cuml(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in as cuml, NumPy as cupy, and this machine's CPU where cuML wants CUDA: the calls that were made."""
    package, cluster = types.ModuleType("cuml"), types.ModuleType("cuml.cluster")
    cluster.KMeans = StandIn  # type: ignore[attr-defined]
    package.cluster = cluster  # type: ignore[attr-defined]
    cupy = types.ModuleType("cupy")
    cupy.from_dlpack = np.from_dlpack  # type: ignore[attr-defined]
    for module in (package, cluster, cupy):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(CumlBackend, "unavailable", lambda self: None)
    supports = CumlBackend.supports
    monkeypatch.setattr(
        CumlBackend,
        "supports",
        lambda self, problem: supports(self, Problem(**{**vars(problem), "device": CUDA})),
    )
    monkeypatch.setattr(StandIn, "calls", [])
    return StandIn.calls


def problem(**changes: Any) -> Problem:
    return Problem(**{"n": 10, "d": 3, "k": 2, "dtype": torch.float32, "device": CUDA, **changes})


def test_parameters_reach_cuml_by_its_names(cuml: list[dict[str, Any]]) -> None:
    x = rows("blobs", 200, 4)
    KMeans(5, n_init=3, max_iter=17, tol=1e-3, random_state=2**31 + 5, backend="cuml").fit(x)
    KMeans(5, init="k-means||", random_state=0, backend="cuml").fit(x)
    KMeans(5, init="random", random_state=0, backend="cuml").fit(x)
    assert len(cuml) == 3
    call = cuml[0]
    np.testing.assert_array_equal(call.pop("X"), x)
    assert call == {
        "output_type": "cupy",
        "init": "k-means++",
        "n_clusters": 5,
        "n_init": 3,
        "max_iter": 17,
        "tol": 1e-3,
        "random_state": 5,
        "sample_weight": None,
        "convert_dtype": False,
    }
    assert [call["init"] for call in cuml[1:]] == ["scalable-k-means++", "random"]
    assert [call["n_init"] for call in cuml[1:]] == [1, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_its_result_becomes_a_fit_that_says_whose_it_is(
    kind: str, dtype: torch.dtype, cuml: list[dict[str, Any]]
) -> None:
    x = rows("blobs", 300, 4, dtype)
    given = x if kind == "tensor" else x.numpy()
    weights = np.random.RandomState(0).exponential(size=300)
    model = KMeans(4, init=given[:4], backend="cuml", max_iter=9).fit(given, sample_weight=weights)
    assert cuml[0]["sample_weight"].dtype == cuml[0]["init"].dtype == cuml[0]["X"].dtype
    report = model.fit_report_
    assert (report.backend, report.solver, report.precision, report.notes) == ("cuml", "cuml", "cuml", CAVEATS)
    assert any("tol itself" in note for note in report.notes)
    assert report.rejected == dict.fromkeys(("cupy", "triton", "torch"), "backend='cuml' was asked for")
    assert report.rows == "in memory"
    assert set(report.times) == {"iterate_s"}
    assert type(model.labels_) is type(given)
    assert torch.as_tensor(model.labels_).dtype == torch.int32
    assert torch.as_tensor(model.cluster_centers_).dtype == dtype
    assert model.n_iter_ == 9
    labels, centroids = np.asarray(model.labels_), np.asarray(model.cluster_centers_, np.float64)
    inertia = (weights * ((x.double().numpy() - centroids[labels]) ** 2).sum(1)).sum()
    assert model.inertia_ == pytest.approx(inertia, rel=1e-12)


def test_what_it_fitted_is_asked_with_the_exact_code(cuml: list[dict[str, Any]]) -> None:
    x = rows("near ties", 300, 4)
    model = KMeans(4, random_state=0, backend="cuml").fit(x)
    assert mislabelled(model.predict(x), x, model.cluster_centers_) == 0
    plain = KMeans(4, init=model.cluster_centers_, max_iter=1).fit(x)
    plain.cluster_centers_ = model.cluster_centers_
    assert torch.equal(model.transform(x), plain.transform(x))
    assert model.score(x) == plain.score(x)
    assert len(cuml) == 1


def test_several_given_starts_are_several_fits_of_which_the_best_is_kept(cuml: list[dict[str, Any]]) -> None:
    x = rows("blobs", 200, 3)
    seen = []

    def init(rows: torch.Tensor, k: int, random_state: np.random.RandomState) -> torch.Tensor:
        seen.append(rows[random_state.permutation(len(rows))[:k]])
        return seen[-1]

    model = KMeans(4, init=init, n_init=5, random_state=0, backend="cuml").fit(x)
    assert [call["n_init"] for call in cuml] == [1] * 5
    alone = [KMeans(4, init=start, backend="cuml").fit(x).inertia_ for start in seen]
    assert model.inertia_ == min(alone) < max(alone)


def test_a_cuml_that_takes_no_convert_dtype_is_called_without(
    cuml: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = StandIn.fit
    monkeypatch.setattr(StandIn, "fit", lambda self, X, y=None, sample_weight=None: whole(self, X, y, sample_weight))
    x = rows("blobs", 200, 3, torch.float64)
    model = KMeans(4, random_state=0, backend="cuml").fit(x)
    assert cuml[0]["convert_dtype"] is True
    assert model.cluster_centers_.dtype == torch.float64
    assert model.fit_report_.notes == (*CAVEATS, "this cuML computed torch.float64 rows in torch.float32")


def test_rows_that_lie_on_the_device_reach_it_through_any_source(cuml: list[dict[str, Any]]) -> None:
    x = rows("blobs", 200, 3)
    heard: list[int] = []
    watched = WatchedSource(TensorSource(x), lambda start, count: heard.append(count))
    store = LayerStore(200, 3, torch.float32, "cpu")
    store.append(x)
    for source in (TensorSource(x), watched, store):
        found = KMeans(4, random_state=0, backend="cuml").fit(source)
        assert torch.equal(found.labels_, KMeans(4, random_state=0, backend="cuml").fit(x).labels_)
    assert sum(heard) > 200
    assert np.shares_memory(cuml[0]["X"], x.numpy()), "no copy"


def test_bad_rows_never_reach_it(cuml: list[dict[str, Any]]) -> None:
    x = rows("blobs", 200, 3)
    x[150, 1] = float("nan")
    with pytest.raises(InputError, match=r"NaN.* in row 150, column 1"):
        KMeans(4, backend="cuml").fit(x)
    with pytest.raises(UnavailableError, match="these rows are streamed"):
        KMeans(4, backend="cuml").fit([x[:50], x[50:]])
    assert not cuml


def test_it_says_what_it_cannot_do() -> None:
    backend = CumlBackend()
    assert backend.supports(problem()) is backend.supports(problem(dtype=torch.float64)) is None
    for changes, reason in (
        ({"device": torch.device("cpu")}, "computes on CUDA, and the rows are on cpu"),
        ({"dtype": torch.float16}, "takes float32 and float64, and the rows are torch.float16"),
        ({"ranks": 2}, "several processes"),
    ):
        assert reason in str(backend.supports(problem(**changes)))


def test_without_cuml_or_cuda_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*modules: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in modules else None)

    installed()
    assert CumlBackend().unavailable() == "cuml is not installed (pip install cuml-cu13 brings both)"
    assert survey()["cuml"] == CumlBackend().unavailable()
    with pytest.raises(UnavailableError, match=r"backend 'cuml' cannot run here \(cuml: cuml is not installed"):
        fit_kmeans(TensorSource(rows("noise", 30, 2)), 2, backend="cuml")
    installed("cuml")
    assert str(CumlBackend().unavailable()).startswith("cupy is not installed")
    installed("cuml", "cupy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(CumlBackend().unavailable())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert CumlBackend().unavailable() is None


def test_auto_never_takes_it(cuml: list[dict[str, Any]]) -> None:
    backend, rejected = choose("auto", problem(device=torch.device("cpu")))
    assert backend.name != "cuml"
    assert rejected["cuml"] == "auto never takes it: its labels are not exact"
    KMeans(3, random_state=0).fit(rows("noise", 30, 2))
    assert not cuml


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_real_one_finds_clusters_that_are_as_good(dtype: torch.dtype) -> None:
    pytest.importorskip("cuml")
    x = rows("blobs", 5000, 20, dtype).cuda()
    weights = torch.rand(5000, dtype=torch.float64, device="cuda")
    model = KMeans(5, init="k-means||", n_init=3, random_state=0, backend="cuml").fit(x, sample_weight=weights)
    ours = KMeans(5, n_init=5, random_state=0).fit(x, sample_weight=weights)
    assert model.fit_report_.notes == CAVEATS
    assert model.labels_.device == model.cluster_centers_.device == x.device
    assert model.cluster_centers_.dtype == dtype
    assert model.inertia_ == pytest.approx(ours.inertia_, rel=0.01)
    assert mislabelled(model.predict(x).cpu(), x, model.cluster_centers_) == 0
    given = KMeans(5, init=ours.cluster_centers_, backend="cuml").fit(x, sample_weight=weights)
    assert given.inertia_ == pytest.approx(ours.inertia_, rel=1e-3)
