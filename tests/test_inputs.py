"""Rows of every kind that people hand over, results of the same kind back, and refusals in scikit-learn's words."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from cases_cluster import blobs
from sklearn.cluster import KMeans as Peer

from gpuclust import KMeans
from gpuclust.cluster.parameters import is_real, is_whole
from gpuclust.cluster.sources.arrays import read_array
from gpuclust.cluster.sources.base import TensorSource
from gpuclust.cluster.sources.inputs import find_device, read_rows, read_weights
from gpuclust.errors import InputError, UnavailableError

X = blobs(np.random.RandomState(0), 80, 3)


class Foreign:
    """An array of another library: it offers DLPack and its namespace, and is nothing else."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape = tuple(values.shape)
        self.dtype = values.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda result: Foreign(torch.from_dlpack(result)))

    def __len__(self) -> int:
        return self.shape[0]


def fit(x: Any, **options: Any) -> KMeans:
    return KMeans(4, random_state=0, **options).fit(x)


# ---- kinds


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_come_back_as_arrays(dtype: str) -> None:
    x = X.astype(dtype)
    model = fit(x)
    for result in (model.cluster_centers_, model.labels_, model.predict(x), model.transform(x)):
        assert type(result) is np.ndarray
    kept = np.float64 if dtype == "float64" else np.float32
    assert model.cluster_centers_.dtype == model.transform(x).dtype == kept
    assert model.labels_.dtype == model.predict(x).dtype == np.int32


def test_tensors_come_back_as_tensors_of_their_device() -> None:
    x = torch.from_numpy(X).requires_grad_()
    model = fit(x)
    for result in (model.cluster_centers_, model.labels_, model.predict(x), model.transform(x)):
        assert isinstance(result, torch.Tensor)
        assert result.device == x.device
        assert not result.requires_grad
    np.testing.assert_array_equal(model.labels_, fit(X).labels_)


@pytest.mark.gpu
def test_results_follow_the_device_of_the_rows_whatever_device_computes() -> None:
    x = torch.from_numpy(X)
    here = fit(x)
    for model in (fit(x.cuda()), fit(x, device="cuda"), fit(x.cuda(), device="cpu"), fit(X, device="auto")):
        assert torch.equal(torch.as_tensor(model.labels_).cpu(), here.labels_)
    assert fit(x, device="cuda").labels_.device.type == "cpu"
    assert fit(x.cuda(), device="cpu").predict(x.cuda()).device.type == "cuda"
    assert isinstance(fit(X, device="cuda").labels_, np.ndarray)


def test_what_speaks_dlpack_comes_back_as_its_own_kind() -> None:
    model = fit(Foreign(torch.from_numpy(X)))
    for result in (model.cluster_centers_, model.labels_, model.predict(Foreign(torch.from_numpy(X)))):
        assert isinstance(result, Foreign)
    np.testing.assert_array_equal(model.labels_.values, fit(X).labels_)
    np.testing.assert_array_equal(model.predict(X), fit(X).labels_)


def test_a_model_fitted_on_one_kind_predicts_on_another() -> None:
    tensor, array = fit(torch.from_numpy(X)), fit(X)
    assert isinstance(tensor.predict(X), np.ndarray)
    assert isinstance(array.predict(torch.from_numpy(X)), torch.Tensor)
    np.testing.assert_array_equal(tensor.predict(X), array.predict(torch.from_numpy(X)))
    half = array.transform(torch.from_numpy(X).half())
    assert half.dtype == torch.float64


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.tolist(),
        lambda x: tuple(map(tuple, x)),
        np.asfortranarray,
        lambda x: x[::-1][::-1],
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x.astype(">f8"),
        lambda x: x.astype(object),
        lambda x: x.astype(np.longdouble),
        lambda x: np.rec.fromarrays([np.zeros(80, "i1"), *x.T], names="a,b,c,d")[["b", "c", "d"]].tolist(),
        lambda x: np.ma.masked_array(x),
    ],
    ids=[
        "list",
        "tuples",
        "columns first",
        "reversed",
        "strided",
        "big endian",
        "objects",
        "long",
        "records",
        "masked",
    ],
)
def test_any_way_to_write_the_same_numbers_gives_the_same_clusters(change: Any) -> None:
    given = change(X)
    model, plain = fit(given), fit(X)
    np.testing.assert_array_equal(model.labels_, plain.labels_)
    np.testing.assert_array_equal(model.cluster_centers_, plain.cluster_centers_)


def test_rows_seen_backwards_and_unaligned_are_read_right() -> None:
    np.testing.assert_array_equal(fit(X[::-1, ::-1]).labels_, fit(X[::-1, ::-1].copy()).labels_)
    packed = np.zeros(80, dtype=[("pad", "i1"), ("x", "f8", 3)])
    packed["x"] = X
    np.testing.assert_array_equal(fit(packed["x"]).labels_, fit(X).labels_)
    np.testing.assert_array_equal(fit(np.broadcast_to(X[:, :1], (80, 5))).labels_, fit(np.tile(X[:, :1], 5)).labels_)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint16", "uint64", "bool"])
def test_whole_numbers_become_float64(dtype: str) -> None:
    x = X > 0 if dtype == "bool" else (np.abs(X) * 5).astype(dtype)
    model = fit(x)
    assert model.cluster_centers_.dtype == np.float64
    np.testing.assert_array_equal(model.labels_, fit(x.astype(np.float64)).labels_)
    assert fit(torch.from_numpy(x)).cluster_centers_.dtype == torch.float64


def test_read_only_arrays_and_mapped_files_are_read_in_place(tmp_path: Path) -> None:
    frozen = X.copy()
    frozen.flags.writeable = False
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    writable = np.load(tmp_path / "x.npy", mmap_mode="r+")
    for given in (frozen, mapped, writable):
        tensor, _ = read_array(given)
        assert tensor.data_ptr() == given.__array_interface__["data"][0], "not a copy"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = fit(given)
        np.testing.assert_array_equal(model.labels_, fit(X).labels_)
        assert type(model.labels_) is np.ndarray
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), X)


def test_tables_are_read_by_value() -> None:
    table = pandas.DataFrame(X, columns=list("abc"))
    table["c"] = table["c"].astype("float32")
    np.testing.assert_array_equal(fit(table).labels_, fit(table.to_numpy()).labels_)
    weights = pandas.Series(np.arange(80.0), index=np.arange(80)[::-1])
    weighted = KMeans(4, random_state=0).fit(table, sample_weight=weights)
    other = KMeans(4, random_state=0).fit(table.to_numpy(), sample_weight=np.arange(80.0))
    np.testing.assert_array_equal(weighted.labels_, other.labels_)


def test_a_chunk_source_is_taken_as_it_is() -> None:
    source = TensorSource(torch.from_numpy(X))
    assert read_rows(source).source is source
    model = fit(source)
    assert torch.equal(model.labels_, torch.from_numpy(fit(X).labels_))
    assert torch.equal(model.predict(source), model.labels_)


@pytest.mark.parametrize("kind", ["array", "tensor", "list"])
def test_given_centroids_may_be_of_any_kind(kind: str) -> None:
    init: Any = X[:4]
    init = {"array": init, "tensor": torch.from_numpy(init), "list": init.tolist()}[kind]
    np.testing.assert_array_equal(KMeans(4, init=init).fit(X).labels_, KMeans(4, init=X[:4]).fit(X).labels_)
    whole = KMeans(4, init=np.round(X[:4]).astype(int)).fit(X.astype(np.float32))
    assert whole.cluster_centers_.dtype == np.float32
    np.testing.assert_array_equal(X[:4], np.asarray(init))


def test_strict_arrays_come_back_as_strict_arrays() -> None:
    strict = pytest.importorskip("array_api_strict")
    x, weights = strict.asarray(X), strict.asarray(np.arange(80.0))
    model = KMeans(4, init=x[:4, :]).fit(x, sample_weight=weights)
    plain = KMeans(4, init=X[:4]).fit(X, sample_weight=np.arange(80.0))
    for result in (model.cluster_centers_, model.labels_, model.predict(x), model.transform(x)):
        assert type(result) is type(x)
    np.testing.assert_array_equal(np.from_dlpack(model.labels_), plain.labels_)
    np.testing.assert_array_equal(np.from_dlpack(model.transform(x)), plain.transform(X))
    assert model.score(x, sample_weight=weights) == plain.score(X, sample_weight=np.arange(80.0))
    assert len(model.get_feature_names_out()) == 4
    np.testing.assert_array_equal(model.predict(X), np.from_dlpack(model.predict(x)))
    called = KMeans(4, init=lambda rows, k, random_state: rows[:k, :], n_init=1).fit(x)
    assert type(called.fit_transform(x)) is type(called.fit_predict(x)) is type(x)


# ---- refusals


def raised(model: Any, x: Any) -> Exception:
    with pytest.raises((ValueError, TypeError)) as caught:
        model.fit(x)
    return caught.value


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.empty((0, 3)), r"0 sample\(s\)"),
        (np.empty((3, 0)), r"0 feature\(s\)"),
        (np.arange(5.0), "Expected 2D array, got 1D array instead"),
        (np.float64(3), "Expected 2D array, got scalar array instead"),
        (np.zeros((3, 2, 2)), "got 3D array"),
        (np.eye(3) * 1j, "Complex data not supported"),
        ([["a", "b"], ["c", "d"]], "must hold numbers"),
        (np.array([["1", "x"]]), "must hold numbers"),
        (np.array([[1, None]], dtype=object), "NaN.* row 0, column 1"),
        (np.array([["2020-01-01"]], dtype="M8[D]"), "must hold numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_table_of_numbers_is_refused_as_scikit_learn_does(x: Any, says: str) -> None:
    error = raised(KMeans(1), x)
    with pytest.raises(type(error), match=says):
        KMeans(1).fit(x)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "M":  # scikit-learn takes dates for numbers
        assert isinstance(error, type(raised(Peer(1), x)))
    if isinstance(x, np.ndarray) and x.dtype.kind in "fc":
        with pytest.raises(InputError, match=says):
            KMeans(1).fit(torch.from_numpy(np.asarray(x)))


def test_ragged_lists_are_refused() -> None:
    raised(KMeans(1), [[1.0, 2.0], [3.0]])


@pytest.mark.parametrize(
    "x",
    [scipy.sparse.csr_matrix(np.eye(3)), scipy.sparse.coo_array(np.eye(3)), torch.eye(3).to_sparse()],
    ids=["matrix", "array", "tensor"],
)
def test_sparse_rows_are_a_clear_error(x: Any) -> None:
    with pytest.raises(TypeError, match="Sparse data was passed"):
        KMeans(2).fit(x)
    model = KMeans(2, random_state=0).fit(np.eye(3))
    with pytest.raises(TypeError, match="Sparse data was passed"):
        model.predict(x)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (np.ones(79), r"sample_weight.shape == \(79,\), expected \(80,\)"),
        (np.ones((80, 2)), "1D array or scalar, got 2D"),
        (np.full(80, np.nan), "NaN"),
        (np.full(80, np.inf), "infinity"),
        (-np.ones(80), "Negative values in data passed to `sample_weight`"),
        (np.zeros(80), "sample_weight is zero for every row"),
        (["a"] * 80, "sample_weight must hold numbers; got a list: could not convert"),
        (np.array(["a"] * 80), "sample_weight must hold numbers; got a ndarray"),
        ([{}] * 80, "sample_weight must hold numbers"),
        (np.array([object()] * 80), "sample_weight must hold numbers"),
        ([[1.0], [1.0, 2.0]], "sample_weight must hold numbers"),
        ({"a": 1}, "sample_weight must hold numbers; got a dict"),
        (np.ones(80) * 1j, "Complex data not supported"),
        (torch.ones(80) * 1j, "Complex data not supported"),
    ],
)
def test_weights_out_of_range_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KMeans(2).fit(X, sample_weight=weights)
    with pytest.raises(ValueError, match=says):
        fit(X).score(X, sample_weight=weights)


def test_weights_of_any_kind_are_read() -> None:
    source = TensorSource(torch.from_numpy(X))
    assert read_weights(None, source) is None
    assert read_weights(np.ones(80), source) is None
    foreign = Foreign(torch.full((80,), 2.0))
    for given in ([2] * 80, 2, np.float32(2), torch.full((80,), 2), np.full(80, 2, np.uint8), foreign):
        found = read_weights(given, source)
        assert found is not None
        assert found.dtype == torch.float64
        assert found.tolist() == [2.0] * 80
    weights = torch.arange(80.0).requires_grad_()
    before = weights.detach().clone()
    KMeans(3, random_state=0).fit(X, sample_weight=weights)
    assert torch.equal(weights.detach(), before)


def test_devices_are_named_and_missing_ones_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UnavailableError, match="CUDA devices"):
        find_device("cuda:99")
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        find_device("gpu")
    for unknown in ("nowhere", 1.5):
        with pytest.raises(InputError, match="auto, cpu, cuda"):
            fit(X, device=unknown)


@pytest.mark.parametrize("device", ["meta", "mps", "mtia", "opengl", torch.device("meta")], ids=str)
def test_devices_that_cannot_compute_in_float64_are_refused_by_name(device: Any) -> None:
    with pytest.raises(UnavailableError, match=rf"^device '{device}' .*float64 there \(.+\): use device='auto'"):
        fit(X, device=device)
    with pytest.raises(UnavailableError, match=f"device '{device}'"):
        fit(X).set_params(device=device).predict(X)


def test_a_device_that_can_is_asked_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = torch.zeros

    def zeros(*shape: Any, device: Any, **options: Any) -> torch.Tensor:
        asked.append(device)
        return plain(*shape, device="cpu", **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    assert find_device("xpu:1") == torch.device("xpu:1")
    assert asked == [torch.device("xpu:1")]


def test_numbers_are_told_from_what_only_looks_like_them() -> None:
    assert is_whole(3, 1)
    assert is_whole(np.int16(1), 1)
    assert not any(is_whole(value, 1) for value in (True, 0, 1.0, "1", None, np.float64(1)))
    assert is_real(0, 0)
    assert is_real(np.float32(0.5), 0)
    assert not any(is_real(value, 0) for value in (True, -1, float("inf"), float("nan"), "1", None))


def test_a_table_with_missing_values_names_the_first() -> None:
    table = pandas.DataFrame({"a": [1.0, 2.0, 3.0], "b": pandas.array([1, None, 3], dtype="Int64")})
    assert bool(read_array(table)[0][1, 1].isnan())
    assert read_array(table.dropna())[0].tolist() == [[1.0, 1.0], [3.0, 3.0]]


@pytest.mark.parametrize("column", [pandas.date_range("2020", periods=3), pandas.to_timedelta([1, 2, 3]), [1j, 2, 3]])
def test_a_table_with_a_column_that_only_looks_like_numbers_is_refused(column: Any) -> None:
    table = pandas.DataFrame({"a": [1.0, 2.0, 3.0], "b": column, "c": ["1", "2", "3"]})
    with pytest.raises(InputError, match=r"X must hold numbers; got .* in column 'b'"):
        read_array(table)
    assert read_array(table.drop(columns="b"))[0].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_a_view_of_memory_is_an_array() -> None:
    x = np.arange(6.0).reshape(3, 2)
    assert read_rows(memoryview(x)).source.take(torch.tensor([2])).tolist() == [[4.0, 5.0]]


def test_a_tensor_without_values_is_refused() -> None:
    with pytest.raises(InputError, match="X is on the device meta"):
        read_rows(torch.empty(3, 2, device="meta"))
