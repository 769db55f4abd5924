"""Models that are pickled and copied, and read where the device that they were fitted on is missing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from cases_cluster import rows
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from gpuclust import KMeans
from gpuclust.cluster import portable
from gpuclust.cluster.portable import OnHost, device_of, from_host, has_moved, to_host
from gpuclust.errors import UnavailableError

X = rows("blobs", 80, 3)


def through_pickle(model: Any, tmp_path: Path) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_joblib(model: Any, tmp_path: Path) -> Any:
    joblib.dump(model, tmp_path / "model.joblib")
    return joblib.load(tmp_path / "model.joblib")


WAYS = {
    "pickle": through_pickle,
    "joblib": through_joblib,
    "deepcopy": lambda model, tmp_path: copy.deepcopy(model),
    "copy": lambda model, tmp_path: copy.copy(model),
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of this machine count as ones on a CUDA device, while models are written."""
    monkeypatch.setattr(
        portable, "device_of", lambda value: torch.device("cuda:7") if isinstance(value, torch.Tensor) else None
    )


def same(one: Any, other: Any) -> bool:
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all()) and type(one) is type(other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_model_comes_back_whole(way: str, kind: str, tmp_path: Path) -> None:
    x = X if kind == "tensor" else X.numpy()
    model = KMeans(4, random_state=0).fit(x)
    again = WAYS[way](model, tmp_path)
    assert same(again.cluster_centers_, model.cluster_centers_)
    assert same(again.labels_, model.labels_)
    assert same(again.predict(x), model.labels_)
    assert (again.inertia_, again.n_iter_, again.score(x)) == (model.inertia_, model.n_iter_, model.score(x))
    assert same(again.fit_report_.dist2, model.fit_report_.dist2)
    assert again.get_params() == model.get_params()
    check_is_fitted(again)
    assert same(again.fit(x[:50]).labels_, clone(model).fit(x[:50]).labels_)
    assert len(model.labels_) == 80, "the other is left alone"


@pytest.mark.parametrize("way", WAYS)
def test_a_model_from_a_missing_device_predicts_on_the_cpu(way: str, tmp_path: Path, elsewhere: None) -> None:
    model = KMeans(4, random_state=0).fit(X)
    again = WAYS[way](model, tmp_path)
    assert set(vars(again)["_away"]) == {"cluster_centers_", "labels_", "fit_report_"}
    check_is_fitted(again)
    assert again.n_features_in_ == 3
    twice = WAYS[way](again, tmp_path)  # before anything was asked for
    for each in (again, twice):
        assert torch.equal(each.predict(X), model.labels_)
        assert torch.equal(each.transform(X), model.transform(X))
        assert each.score(X) == model.score(X)
        assert torch.equal(each.labels_, model.labels_)
        assert each.cluster_centers_.device.type == each.fit_report_.dist2.device.type == "cpu"
        assert list(each.get_feature_names_out()) == ["kmeans0", "kmeans1", "kmeans2", "kmeans3"]
    assert isinstance(again.predict(X.numpy()), np.ndarray)
    assert torch.equal(again.fit(X[:50]).labels_, clone(model).fit(X[:50]).labels_)


def test_a_device_by_name_that_is_missing_here_warns_and_fit_refuses_it(elsewhere: None) -> None:
    model = KMeans(4, random_state=0).fit(X)
    labels = model.labels_
    model.device = "cuda:99"
    with pytest.raises(UnavailableError, match="cuda:99"):
        model.predict(X)  # it never was elsewhere
    again = pickle.loads(pickle.dumps(model))
    with pytest.warns(UserWarning, match="fitted on another machine with device='cuda:99'"):
        assert torch.equal(again.predict(X), labels)
    with pytest.raises(UnavailableError, match="cuda:99"):
        again.fit(X)
    assert torch.equal(again.set_params(device=None).predict(X), labels)


def test_reading_a_model_touches_no_device(elsewhere: None, tmp_path: Path) -> None:
    with (tmp_path / "model.pickle").open("wb") as file:
        pickle.dump(KMeans(4, random_state=0).fit(X), file)
    code = (
        "import pickle, sys, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        "assert not torch.cuda.is_initialized() and 'sklearn' not in sys.modules\n"
        "print(model.predict(torch.zeros(2, 3)).shape[0], model)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "2 KMeans(n_clusters=4, random_state=0)\n", ran.stderr


def test_a_fit_that_fails_loses_nothing_of_a_model_from_elsewhere(elsewhere: None) -> None:
    model = KMeans(4, random_state=0).fit(X)
    again = pickle.loads(pickle.dumps(model))

    def init(x: Any, k: int, random_state: Any) -> Any:
        assert again.labels_ is not None
        raise KeyboardInterrupt

    again.init = init
    with pytest.raises(KeyboardInterrupt):
        again.fit(X[:, :2])
    assert torch.equal(again.labels_, model.labels_)
    assert torch.equal(again.predict(X), model.labels_)


def test_what_a_model_lacks_is_still_missing() -> None:
    model = KMeans(4)
    for name in ("cluster_centers_", "labels_", "nothing"):
        assert not hasattr(model, name)
        assert not hasattr(pickle.loads(pickle.dumps(model)), name)
    with pytest.raises(AttributeError, match="'KMeans' object has no attribute 'nothing'"):
        _ = model.nothing
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(model)).predict(X)


def test_arrays_of_a_library_that_is_missing_become_numpys() -> None:
    kept = OnHost(X, "cuda:7", "cupy")
    assert isinstance(from_host(kept), np.ndarray)
    assert has_moved(kept)
    assert not has_moved(X)
    assert device_of(X) is device_of(X.numpy()) is device_of("text") is None
    assert to_host(X) is X


def test_arrays_go_back_where_they_were_as_what_they_were() -> None:
    back = from_host(OnHost(X, "cpu", "torch"))
    assert back is X
    # NumPy stands for any library that reads DLPack.
    assert isinstance(from_host(OnHost(X, "cpu", "numpy")), np.ndarray)
    assert isinstance(from_host(OnHost(X, "cpu", "no_such_library")), np.ndarray)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_model_from_cuda_goes_back_to_it(way: str, tmp_path: Path) -> None:
    model = KMeans(4, random_state=0).fit(X.cuda())
    again = WAYS[way](model, tmp_path)
    assert again.cluster_centers_.device == again.labels_.device == again.fit_report_.labels.device == X.cuda().device
    assert torch.equal(again.predict(X.cuda()), model.labels_)


@pytest.mark.gpu
def test_a_model_from_cuda_is_read_where_there_is_none(tmp_path: Path) -> None:
    model = KMeans(4, random_state=0, device="cuda").fit(X.cuda())
    torch.save(X, tmp_path / "x.pt")
    with (tmp_path / "model.pickle").open("wb") as file:
        pickle.dump(model, file)
    code = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import pickle, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "print(model.predict(x).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{model.labels_.tolist()}\n", ran.stderr


@pytest.mark.gpu
def test_cupys_arrays_come_back_as_cupys() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.asarray(X.numpy())
    model = KMeans(4, random_state=0).fit(x)
    again = pickle.loads(pickle.dumps(model))
    for each in (model, again):
        assert isinstance(each.cluster_centers_, cupy.ndarray)
        assert isinstance(each.predict(x), cupy.ndarray)
        assert isinstance(each.transform(x), cupy.ndarray)
    assert isinstance(model.predict(X.numpy()), np.ndarray)
    assert (again.labels_ == model.labels_).all()
