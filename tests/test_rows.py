"""k-means on a file of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuclust import KMeans
from gpuclust.errors import GpuclustError, InputError
from gpuclust.rows import cluster_file


@pytest.fixture
def x() -> np.ndarray:
    return np.random.RandomState(0).randn(200, 7)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int16", "fortran", "big endian"])
def test_labels_are_those_of_kmeans(tmp_path: Path, x: np.ndarray, kind: str) -> None:
    rows = {"fortran": np.asfortranarray(x), "big endian": x.astype(">f4")}.get(kind)
    rows = (x * 100).astype(kind) if rows is None else rows
    np.save(tmp_path / "x.npy", rows)
    fit, seconds = cluster_file(tmp_path / "x.npy", tmp_path / "labels.npy", 4, random_state=3, n_init=2)
    expected = KMeans(4, random_state=3, n_init=2).fit(rows)
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected.labels_)
    assert (fit.inertia, fit.n_iter) == (expected.inertia_, expected.n_iter_)
    assert seconds > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["labels.npy", "x.npy"]


def test_what_is_no_file_of_rows(tmp_path: Path, x: np.ndarray) -> None:
    out = tmp_path / "labels.npy"
    np.savez(tmp_path / "several.npz", x)
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", x[0])
    (tmp_path / "words.npy").write_text("words")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:300])
    for name, message in (
        ("gone.npy", "there is no file"),
        ("several.npz", "holds several arrays"),
        ("objects.npy", "is not a .npy file of numbers"),
        ("words.npy", "is not a .npy file of numbers"),
        ("empty.npy", "is not a .npy file of numbers"),
        ("cut.npy", "is not a .npy file of numbers"),
        ("flat.npy", "Expected 2D array, got 1D array"),
    ):
        with pytest.raises(InputError, match=message):
            cluster_file(tmp_path / name, out, 2)
    assert not out.exists()


def test_where_labels_may_go(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "labels.npy"
    out.write_text("mine")
    with pytest.raises(InputError, match="is there already: --force overwrites it"):
        cluster_file(tmp_path / "x.npy", out, 2)
    assert out.read_text() == "mine"
    cluster_file(tmp_path / "x.npy", out, 2, force=True)
    assert np.load(out).shape == (200,)
    with pytest.raises(InputError, match="is no folder"):
        cluster_file(tmp_path / "x.npy", tmp_path / "nowhere/labels.npy", 2)


def test_no_room_for_the_labels(tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", x)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", fail)
    with pytest.raises(GpuclustError, match=r"cannot write .*: No space left on device"):
        cluster_file(tmp_path / "x.npy", tmp_path / "labels.npy", 2)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_the_device_of_the_environment_counts_for_auto(
    tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setenv("GPUCLUST_DEVICE", "cuda:97")
    with pytest.raises(InputError, match="cuda:97"):
        cluster_file(tmp_path / "x.npy", tmp_path / "labels.npy", 2, device="auto")
    cluster_file(tmp_path / "x.npy", tmp_path / "labels.npy", 2, device="cpu")
