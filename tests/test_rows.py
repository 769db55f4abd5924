"""k-means on a file of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases_rows import tight

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
    np.save(tmp_path / "none.npy", x[:0])
    np.save(tmp_path / "narrow.npy", x[:, :0])
    np.save(tmp_path / "deep.npy", x.reshape(20, 10, 7))
    np.save(tmp_path / "complex.npy", x * 1j)
    np.save(tmp_path / "dates.npy", np.zeros((4, 2), "M8[D]"))
    np.save(tmp_path / "nan.npy", np.where(np.arange(200)[:, None] == 7, np.nan, x))
    for name, message in (
        ("gone.npy", "there is no file"),
        ("several.npz", "holds several arrays"),
        ("objects.npy", "is not a .npy file of numbers"),
        ("words.npy", "is not a .npy file of numbers"),
        ("empty.npy", "is not a .npy file of numbers"),
        ("cut.npy", "is not a .npy file of numbers"),
        ("flat.npy", "Expected 2D array, got 1D array"),
        ("none.npy", r"(0 sample\(s\)|is not a .npy file of numbers)"),
        ("narrow.npy", r"(0 feature\(s\)|is not a .npy file of numbers)"),
        ("deep.npy", "Expected 2D array, got 3D array"),
        ("complex.npy", "Complex data not supported"),
        ("dates.npy", "must hold numbers"),
        ("nan.npy", r"NaN\. It is nan in row 7, column 0"),
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
    with pytest.raises(InputError, match="is a folder"):
        cluster_file(tmp_path / "x.npy", tmp_path, 2, force=True)


def test_labels_never_replace_the_rows(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "link.npy").symlink_to("x.npy")
    for out in ("x.npy", "link.npy"):
        with pytest.raises(InputError, match="holds the rows"):
            cluster_file(tmp_path / "x.npy", tmp_path / out, 2, force=True)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x)


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


def test_the_memory_limit_of_the_environment_counts_where_none_is_given(
    tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "700")
    monkeypatch.setenv("GPUCLUST_MEMORY_LIMIT", str(tight(x, 2)))
    assert cluster_file(tmp_path / "x.npy", tmp_path / "one.npy", 2, random_state=0)[0].rows == (
        "streamed from a mapped file: 11.2 kB, and there is room for 1.4 kB"
    )
    fit, _ = cluster_file(tmp_path / "x.npy", tmp_path / "two.npy", 2, random_state=0, memory_limit=10**6)
    assert fit.rows == "in a mapped file"
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))


FLAT = """
import json, sys
from pathlib import Path
from gpuclust.rows import cluster_file

def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def cluster(name):
    files = Path(f"{name}.npy"), Path(f"{name}.labels.npy")
    fit, _ = cluster_file(*files, 2, max_iter=1, random_state=0, device="cpu", memory_limit=16 << 20)
    return fit.rows

cluster("small")
before = peak_bytes()
how = cluster("large")
print(json.dumps([peak_bytes() - before, how]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["f4", ">f4", "columns first"])
def test_a_file_of_many_times_the_memory_limit_takes_no_more_than_the_limit(tmp_path: Path, kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((2200, 8000), dtype=np.float32)
    rows = np.asfortranarray(rows) if kind == "columns first" else rows.astype(kind)
    np.save(tmp_path / "large.npy", rows)
    np.save(tmp_path / "small.npy", rows[:200])
    size = rows.nbytes
    shown = subprocess.run(
        [sys.executable, "-c", FLAT],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    grown, how = json.loads(shown.stdout)
    assert how.startswith("streamed from a mapped file")
    assert grown < 16 << 20 < size / 4
    expected = KMeans(2, max_iter=1, random_state=0).fit(rows)
    np.testing.assert_array_equal(np.load(tmp_path / "large.labels.npy"), expected.labels_)
