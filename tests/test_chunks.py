"""Chunks of rows that come anew in each pass: what they are, and an error where they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import rows
from cases_rows import Again, cut, same

from gpuclust import KMeans
from gpuclust.cluster.sources.arrays import to_rows
from gpuclust.cluster.sources.chunks import ChunksSource
from gpuclust.errors import InputError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little data passes in many chunks."""
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "700")


def test_large_chunks_of_a_re_iterable_are_cut_and_small_ones_put_together() -> None:
    x = rows("noise", 100, 5)
    whole = ChunksSource([x[:70], x[70:]], lambda chunk: chunk)  # type: ignore[arg-type, return-value]
    assert [(start, len(part)) for start, part in whole.chunks(30)] == [(0, 30), (30, 30), (60, 30), (90, 10)]
    views = [part.data_ptr() == x[start:].data_ptr() for start, part in whole.chunks(30)]
    assert views == [True, True, False, False], "a copy only where it must be"
    empty = ChunksSource([x[:0], x[:3], x[:0], x[3:]], lambda chunk: chunk)  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.cat([part.clone() for _, part in empty.chunks(40)]), x)


# ---- what is one array, what are chunks, and what is neither


def test_lists_of_rows_are_still_an_array() -> None:
    x = rows("blobs", 60, 3, torch.float64).numpy()
    wanted = KMeans(3, random_state=0).fit(x)

    class Sequence:
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> list[float]:
            return x[index].tolist()  # type: ignore[no-any-return]

        def __iter__(self) -> Iterator[list[float]]:
            return iter(x.tolist())

    for given in (x.tolist(), list(x), tuple(x), [tuple(row) for row in x], Sequence(), list(torch.from_numpy(x))):
        model = KMeans(3, random_state=0).fit(given)
        same(model, wanted)
        assert model.fit_report_.rows == "in memory"
    for given in ([x[:20], x[20:]], (x[:20], x[20:]), [x]):
        model = KMeans(3, random_state=0).fit(given)
        same(model, wanted)
        assert model.fit_report_.rows.startswith("chunks")


def test_what_can_be_read_once_is_refused() -> None:
    x = np.eye(4)
    for given in ((row for row in [x]), iter([x]), map(np.asarray, [x])):
        with pytest.raises(InputError, match="can be read once, and rows are read many times"):
            KMeans(2).fit(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([np.eye(3), np.eye(4)], "rows of one width; the first has 3 features, .* begins with row 3 has 4"),
        (
            [np.eye(3), np.eye(3, dtype="f4")],
            "of one type; the first is torch.float64, and the one .* row 3 is torch.fl",
        ),
        ([np.eye(3), np.ones(3)], r"of shape \(b, d\); got a ndarray of shape \(3,\)"),
        ([np.eye(3), [[1.0, 2, 3]]], r"of shape \(b, d\); got a list that is no array"),
        ([np.empty((0, 3))], r"0 sample\(s\)"),
        ([np.empty((3, 0))], r"0 feature\(s\)"),
        (Again([]), r"0 sample\(s\)"),
        (Again([[[1.0, 2.0]]]), r"gives a list that is no array: what is iterated over gives chunks"),
        (Again([np.ones(3)]), r"gives a ndarray of shape \(3,\): what is iterated over gives chunks"),
        ([np.eye(3) * 1j], "Complex data not supported"),
        ([np.eye(3), np.full((2, 3), np.nan)], r"NaN\. It is nan in row 3, column 0"),
        ([np.array([["a", "b"]])], "must hold numbers"),
    ],
    ids=range(12),
)
def test_chunks_that_do_not_fit_together_are_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        KMeans(2).fit(given)


def test_sparse_chunks_and_too_many_clusters_are_refused() -> None:
    from scipy import sparse

    for given in ([sparse.eye(3).tocsr()], [torch.eye(3), torch.eye(3).to_sparse()]):
        with pytest.raises(TypeError, match="Sparse data"):
            KMeans(2).fit(given)
    with pytest.raises(InputError, match="n_samples=6 should be >= n_clusters=7"):
        KMeans(7).fit([np.eye(3), np.eye(3)])
    with pytest.raises(InputError, match="X has 3 features, but KMeans is expecting 4"):
        KMeans(2).fit(np.eye(4)).predict([np.eye(3)])


# ---- rows that change


CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "a value": lambda chunks: [*chunks[:-1], chunks[-1] + np.float32(1e-6)],
    "the order of rows": lambda chunks: [chunks[0][::-1].copy(), *chunks[1:]],
    "the order of chunks": lambda chunks: chunks[::-1],
    "fewer": lambda chunks: chunks[:-1],
    "more": lambda chunks: [*chunks, chunks[0][:1]],
    "none": lambda chunks: [],
    "the width": lambda chunks: [chunk[:, 1:] for chunk in chunks],
    "the type": lambda chunks: [chunk.astype(np.float64) for chunk in chunks],
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("when", [1, 4])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_chunks_that_change_between_passes_are_an_error(change: str, when: int, init: str) -> None:
    x = rows("blobs", 120, 5).numpy()
    chunks = cut(x, (40,))
    given = Again(chunks, lambda at, known: CHANGES[change](known) if at >= when else known)
    with pytest.raises(
        InputError, match=r"X changed between two passes|chunks of X (have rows of one width|are of one)"
    ):
        KMeans(4, init=init, n_init=1, random_state=0).fit(given)
    assert given.passes >= when


def test_a_change_while_single_rows_are_taken_is_seen() -> None:
    x = rows("blobs", 120, 5).numpy()
    given = Again(cut(x, (40,)), lambda at, known: CHANGES["a value"](known) if at == 1 else known)
    source = ChunksSource(given, to_rows)  # type: ignore[arg-type]
    given.passes = 0
    with pytest.raises(InputError, match="X changed between two passes"):
        source.take(torch.tensor([0]))


def test_chunks_that_end_elsewhere_are_the_same_rows() -> None:
    x = rows("blobs", 120, 5).numpy()
    given = Again([x], lambda at, known: cut(known[0], (1 + at % 7, 30)))
    same(KMeans(4, random_state=0).fit(given), KMeans(4, random_state=0).fit(x))
