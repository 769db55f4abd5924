"""Rows that are streamed give the same bits as the same rows in one tensor, and files that change are an error."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import rows
from cases_rows import Again, OneBuffer, cut, mapped, same, tight

from gpuclust import KMeans
from gpuclust.cluster.sources.arrays import to_rows
from gpuclust.cluster.sources.base import TensorSource, WatchedSource
from gpuclust.cluster.sources.chunks import ChunksSource
from gpuclust.cluster.sources.host import HostSource
from gpuclust.cluster.sources.inputs import read_rows
from gpuclust.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little data passes in many chunks."""
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "700")


# ---- the same bits

DATA = [("blobs", torch.float16), ("relu", torch.float32), ("blobs", torch.float64), ("duplicates", torch.float32)]


@pytest.mark.parametrize(("kind", "dtype"), DATA, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("weighted", [False, True])
def test_streamed_and_chunked_and_resident_rows_are_one(
    tmp_path: Path, kind: str, dtype: torch.dtype, init: str, weighted: bool
) -> None:
    x = rows(kind, 211, 7, dtype).numpy()
    weights = np.random.RandomState(1).randint(0, 4, 211).astype(float) if weighted else None
    other = rows(kind, 50, 7, dtype, seed=3).numpy()
    parameters = {"n_clusters": 5, "init": init, "n_init": 2, "random_state": 4}
    resident = KMeans(**parameters).fit(x, sample_weight=weights)
    least = tight(x, 5, 0.25 if weighted else None)
    for given, other_given, limit in (
        (mapped(tmp_path, x), other, least),
        (mapped(tmp_path, x), other, None),
        (cut(x, (40, 1, 63)), cut(other, (50,)), None),
        (Again(cut(x, (300,))), Again(cut(other, (7,))), None),
        (OneBuffer(x, 17), OneBuffer(other, 60), least),
    ):
        model = KMeans(**parameters, memory_limit=limit).fit(given, sample_weight=weights)
        same(model, resident)
        for result in (model.cluster_centers_, model.labels_):
            assert type(result) is np.ndarray
        np.testing.assert_array_equal(model.predict(other_given), resident.predict(other))
        # Products in float64, whose last bit is the library's: it may depend on the number of rows.
        np.testing.assert_allclose(model.transform(other_given), resident.transform(other), rtol=2**-50)
        assert model.score(given, sample_weight=weights) == resident.score(x, sample_weight=weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x * 100).astype("i2"),
        lambda x: x > 3,
        lambda x: x.astype(">f4"),
        lambda x: x.astype(">f8"),
        lambda x: x.astype(np.longdouble),
        np.asfortranarray,
        lambda x: (x * 100).astype("u8"),
    ],
    ids=["int16", "bool", "big endian", "big endian double", "long", "columns first", "uint64"],
)
def test_a_file_of_any_type_and_order_is_streamed(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    x = change(np.abs(rows("blobs", 211, 6, torch.float64).numpy()))
    given = mapped(tmp_path, x)
    model = KMeans(4, random_state=0, memory_limit=tight(x, 4)).fit(given)
    assert model.fit_report_.rows.startswith("streamed from a mapped file: ")
    same(model, KMeans(4, random_state=0).fit(x))
    for some in (np.s_[3:200:2], np.s_[::-1, 1:]):
        limited = KMeans(4, random_state=0, memory_limit=tight(x[some], 4)).fit(given[some])
        assert limited.fit_report_.rows.startswith("streamed from a mapped file: ")
        same(limited, KMeans(4, random_state=0).fit(x[some]))


def test_tensors_come_back_for_chunks_of_tensors() -> None:
    x = rows("blobs", 120, 5)
    model = KMeans(4, random_state=0).fit(cut(x, (50, 13)))
    same(model, KMeans(4, random_state=0).fit(x))
    for result in (model.labels_, model.predict(Again(cut(x, (9,)))), model.transform(cut(x, (9,)))):
        assert isinstance(result, torch.Tensor)


def test_where_the_rows_were_is_in_the_report(tmp_path: Path) -> None:
    x = rows("blobs", 120, 5).numpy()
    whole = (x * 9).astype("i4")
    for given, limit, says in (
        (x, None, "in memory"),
        (torch.from_numpy(x), tight(x, 3), "in memory"),
        (mapped(tmp_path, x), None, "in a mapped file"),
        (mapped(tmp_path, x), tight(x, 3), r"streamed from a mapped file: 2.4 kB, and there is room for 1.4 kB"),
        (mapped(tmp_path, x), tight(x, 3) + 1001, "in a mapped file"),
        (whole, None, "copied to cpu (4.8 kB)"),
        (whole, tight(whole, 3), "streamed from memory: 4.8 kB, and there is room for 1.4 kB"),
        (cut(x, (50,)), None, "chunks, read anew in each pass"),
        (TensorSource(torch.from_numpy(x)), None, "a chunk source"),
    ):
        assert KMeans(3, random_state=0, memory_limit=limit).fit(given).fit_report_.rows == says


def test_a_file_that_memory_holds_is_clustered_as_an_array_is(tmp_path: Path) -> None:
    x = rows("blobs", 30, 700).numpy()
    expected = KMeans(4, solver="dual", random_state=0).fit(x)
    for order, limit in (("C", None), ("F", 10**8)):
        given = mapped(tmp_path, np.array(x, order=order))
        model = KMeans(4, random_state=0, memory_limit=limit).fit(given)
        assert model.fit_report_.rows == "in a mapped file"
        assert model.fit_report_.solver == KMeans(4, random_state=0, memory_limit=limit).fit(x).fit_report_.solver
        model = KMeans(4, solver="dual", random_state=0, memory_limit=limit).fit(given)
        assert model.fit_report_.solver == "dual"
        same(model, expected)


def test_a_callable_init_gets_what_was_given(tmp_path: Path) -> None:
    x = rows("blobs", 120, 5, torch.float64).numpy()
    seen: list[Any] = []

    def init(given: Any, k: int, random_state: np.random.RandomState) -> np.ndarray:
        seen.append(given)
        return x[:k]

    wanted = KMeans(4, init=init, n_init=1).fit(x)
    chunks = cut(x, (30,))
    for given in (chunks, mapped(tmp_path, x)):
        same(KMeans(4, init=init, n_init=1, memory_limit=tight(x, 4)).fit(given), wanted)
    assert seen[1] is chunks
    np.testing.assert_array_equal(seen[2], x)


# ---- the sources themselves


def sources(folder: Path, x: np.ndarray) -> list[Any]:
    return [
        HostSource(mapped(folder, x), CPU),
        HostSource(x.astype(">f4"), CPU),
        HostSource(np.asfortranarray(x), CPU),
        HostSource(torch.from_numpy(x), CPU),
        ChunksSource(cut(x, (40, 3)), to_rows),  # type: ignore[arg-type]
        ChunksSource([torch.from_numpy(x)], lambda chunk: chunk),  # type: ignore[arg-type, return-value]
        WatchedSource(TensorSource(torch.from_numpy(x)), lambda start, count: None),
    ]


def test_chunks_are_all_rows_in_order_and_rows_come_as_they_were_asked_for(tmp_path: Path) -> None:
    x = rows("noise", 211, 7).numpy()
    for source in sources(tmp_path, x):
        assert (source.shape, source.dtype, source.device) == ((211, 7), torch.float32, CPU)
        for size in (1, 10, 24, 211, 1000):
            found = [(start, part.clone()) for start, part in source.chunks(size)]
            assert max(len(part) for _, part in found) <= size
            assert [start for start, _ in found] == np.cumsum([0, *(len(part) for _, part in found)])[:-1].tolist()
            np.testing.assert_array_equal(torch.cat([part for _, part in found]), x)
        for wanted in ([5, 210, 0, 5, 100, 39, 40, 43], [3], []):
            np.testing.assert_array_equal(source.take(torch.tensor(wanted, dtype=torch.int64)), x[wanted])


def test_a_watched_source_tells_of_every_chunk() -> None:
    told: list[tuple[int, int]] = []
    x = rows("noise", 25, 3)
    source = WatchedSource(TensorSource(x), lambda start, count: told.append((start, count)))
    assert len(list(source.chunks(10))) == 3
    assert told == [(0, 10), (10, 10), (20, 5)]


# ---- rows that change


@pytest.mark.parametrize("limit", [1000, None])
def test_a_file_that_is_written_to_meanwhile_is_an_error(tmp_path: Path, limit: int | None) -> None:
    x = rows("blobs", 200, 5).numpy()
    given = mapped(tmp_path, x)
    source = read_rows(given, memory_limit=limit).source
    assert len(list(source.chunks(50))) >= 4
    with open(tmp_path / "x.npy", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(tmp_path / "x.npy", ns=(1, 1))  # clocks of file systems may be coarse
    with pytest.raises(InputError, match=r"the file '.*x.npy' changed while it was read"):
        list(source.chunks(50))


def test_a_file_that_is_replaced_or_deleted_is_still_what_was_opened(tmp_path: Path) -> None:
    x = rows("blobs", 200, 5).numpy()
    given = mapped(tmp_path, x)
    source = read_rows(given, memory_limit=1000).source
    np.save(tmp_path / "new.npy", x + 1)
    (tmp_path / "new.npy").rename(tmp_path / "x.npy")
    np.testing.assert_array_equal(torch.cat([part.clone() for _, part in source.chunks(50)]), x)
    (tmp_path / "x.npy").unlink()
    np.testing.assert_array_equal(torch.cat([part.clone() for _, part in source.chunks(50)]), x)


def test_host_memory_that_is_shuffled_between_passes_is_an_error() -> None:
    x = (rows("blobs", 200, 5, torch.float64) * 100).to(torch.int32).numpy()
    source = read_rows(x, memory_limit=1000).source
    assert isinstance(source, HostSource)
    list(source.chunks(50))
    np.random.RandomState(0).shuffle(x)
    with pytest.raises(InputError, match="X changed between two passes"):
        list(source.chunks(50))


def test_pages_of_a_writable_file_keep_what_was_written(tmp_path: Path) -> None:
    x = rows("blobs", 200, 5).numpy()
    given = mapped(tmp_path, x, "r+")
    given[0] += 1
    source = HostSource(given, CPU)
    np.testing.assert_array_equal(torch.cat([part.clone() for _, part in source.chunks(50)])[0], x[0] + 1)
    private = mapped(tmp_path, x, "c")
    private[0] += 2
    assert read_rows(private, memory_limit=1).how == "in memory", "what was written to a private map is nowhere else"
    for _ in range(2):
        source = HostSource(private, CPU)
        np.testing.assert_array_equal(torch.cat([part.clone() for _, part in source.chunks(50)])[0], x[0] + 2)


# ---- a fit that is interrupted


@pytest.mark.parametrize("kind", ["file", "converted", "chunks"])
@pytest.mark.parametrize("at", [3, 40, 200])
def test_an_interrupted_fit_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, at: int
) -> None:
    x = rows("blobs", 211, 7).numpy()
    given = cut(x, (50,)) if kind == "chunks" else mapped(tmp_path, x.astype(">f4" if kind == "converted" else "f4"))
    before = threading.active_count()
    calls = 0

    def interrupt(start: int, count: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    read = read_rows(given, memory_limit=2000)
    least = tight(x, 5)
    with pytest.raises(KeyboardInterrupt):
        KMeans(5, random_state=0, memory_limit=least).fit(WatchedSource(read.source, interrupt))
    for thread in threading.enumerate():
        if thread.name == "gpuclust-staging":
            thread.join(10)
    assert threading.active_count() == before
    gc.collect()
    same(KMeans(5, random_state=0, memory_limit=least).fit(given), KMeans(5, random_state=0).fit(x))


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_in_host_memory_stream_to_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "20000")
    x = rows("blobs", 611, 37, dtype)
    parameters = {"n_clusters": 7, "n_init": 2, "max_iter": 5, "random_state": 1, "device": "cuda"}
    resident = KMeans(**parameters).fit(x)
    assert resident.fit_report_.rows.startswith("copied to cuda:0")
    for given in (x, x.pin_memory(), x.numpy(), mapped(tmp_path, x.numpy()), cut(x, (500, 3)), cut(x.cuda(), (500,))):
        model = KMeans(**parameters, memory_limit=tight(x, 7)).fit(given)
        assert "streamed" in model.fit_report_.rows or "chunks" in model.fit_report_.rows
        same_on_host(model, resident)
        for result, wanted in (
            (model.predict(given), resident.labels_),
            (model.transform(given), resident.transform(x)),
        ):
            assert torch.equal(torch.as_tensor(result).cpu(), torch.as_tensor(wanted).cpu())


@pytest.mark.gpu
def test_any_change_of_streamed_host_memory_is_seen_on_a_gpu() -> None:
    x = rows("blobs", 2000, 37)
    source = read_rows(x, "cuda", memory_limit=160_000).source
    list(source.chunks(100))
    x[1777, 3] += 1
    with pytest.raises(InputError, match="X changed between two passes"):
        list(source.chunks(100))


@pytest.mark.gpu
def test_an_interrupted_pass_leaves_the_gpu_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "20000")
    x = rows("blobs", 2000, 37)
    stream = read_rows(x, "cuda", memory_limit=160_000).source.chunks(100)
    assert isinstance(stream, Generator)
    next(stream)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    model = KMeans(4, random_state=0, device="cuda", memory_limit=tight(x, 4)).fit(x)
    same_on_host(model, KMeans(4, random_state=0, device="cuda").fit(x))


def same_on_host(model: KMeans, other: KMeans) -> None:
    for name in ("labels_", "cluster_centers_"):
        one, two = (torch.as_tensor(getattr(fitted, name)).cpu() for fitted in (model, other))
        assert torch.equal(one, two)
    assert model.inertia_ == other.inertia_
