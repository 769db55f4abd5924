"""Memory that runs out in mid-fit: smaller chunks, the same bits, and nothing left half done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from cases_cluster import rows

from gpuclust.cluster import KMeans
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.relief import relief, relieved
from gpuclust.cluster.sources.base import TensorSource, block_rows, chunk_rows, piece_rows, tile_rows

CPU = torch.device("cpu")
ERRORS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": lambda: MemoryError(),
    "torch on a CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
}


class Scarce(TensorSource):
    """Rows of which the chunks numbered in ``fail`` (of all that are handed out) find no memory."""

    def __init__(self, x: torch.Tensor, fail: Callable[[int, int], Exception | None]) -> None:
        super().__init__(x)
        self.fail, self.handed, self.sizes = fail, 0, list[int]()

    def chunks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start, x in super().chunks(rows):
            self.handed += 1
            self.sizes.append(len(x))
            if error := self.fail(self.handed, len(x)):
                raise error
            yield start, x


def same(one: KMeans, other: KMeans) -> bool:
    return (
        torch.equal(one.labels_, other.labels_)
        and torch.equal(one.cluster_centers_, other.cluster_centers_)
        and one.inertia_ == other.inertia_
        and one.n_iter_ == other.n_iter_
        and one.fit_report_.trace == other.fit_report_.trace
        and one.fit_report_.recheck_share == other.fit_report_.recheck_share
    )


def fit(x: Any, weights: Any = None, **options: Any) -> KMeans:
    return KMeans(6, random_state=0, n_init=2, **options).fit(x, sample_weight=weights)


@pytest.mark.parametrize("error", ERRORS)
def test_wherever_memory_runs_out_the_bits_are_the_same(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "2KiB")
    x = rows("relu", 900, 40)
    weights = np.random.RandomState(0).exponential(size=900)
    plain, source = fit(x, weights), Scarce(x, lambda number, size: None)
    assert same(fit(source, weights), plain)
    assert plain.fit_report_.notes == ()
    # In moments, seeding, early and late passes, at the beginning, the middle and the end of a pass.
    for at in [*range(1, source.handed, max(1, source.handed // (12 if error == "torch" else 2))), source.handed]:
        scarce = Scarce(x, lambda number, size, at=at: ERRORS[error]() if number == at else None)
        found = fit(scarce, weights)
        assert scarce.handed > at, "the fit went on"
        assert same(found, plain), at
        assert found.fit_report_.notes == ("memory ran out once: rows were taken in chunks of 1/2 of the usual",)


def test_chunks_are_halved_until_they_fit() -> None:
    x = rows("blobs", 3000, 8)
    scarce = Scarce(x, lambda number, size: MemoryError() if size > 400 else None)
    found = fit(scarce)
    assert same(found, fit(x))
    assert found.fit_report_.notes[0].startswith("memory ran out ")
    last = scarce.sizes[next(i for i in reversed(range(scarce.handed)) if scarce.sizes[i] > 400) :]
    assert len(last) > 8, "what was too much is not tried again in later passes"
    assert relieved(1024) == 1024, "the next fit begins with large chunks"


@pytest.mark.parametrize("part", ["assign", "accumulate"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 7, 20])
def test_sums_are_not_left_half_done(part: str, after: bool, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "2KiB")
    x = rows("noise", 700, 20)
    plain = fit(x)
    calls, whole = 0, getattr(TorchBackend, part)

    def fails(self: TorchBackend, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise torch.OutOfMemoryError("out of memory")
        result = whole(self, *arguments)
        if calls == at:
            raise torch.OutOfMemoryError("out of memory")
        return result

    monkeypatch.setattr(TorchBackend, part, fails)
    found = fit(x)
    assert calls > at
    assert same(found, plain)


def test_empty_clusters_are_filled_where_memory_runs_out() -> None:
    x = rows("blobs", 300, 5)
    init = torch.cat([x[:3], torch.full((3, 5), 1e3) + torch.arange(3)[:, None]])
    plain, source = KMeans(6, init=init).fit(x), Scarce(x, lambda number, size: None)
    assert same(KMeans(6, init=init).fit(source), plain)
    for at in range(1, source.handed + 1):
        scarce = Scarce(x, lambda number, size, at=at: MemoryError() if number == at else None)
        assert same(KMeans(6, init=init).fit(scarce), plain), at


def test_a_sketch_that_finds_no_memory_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("blobs", 6000, 256)
    plain, taken = KMeans(12, init="random", random_state=0, n_init=1, tol=0).fit(x), []
    take = TensorSource.take

    def scarce(self: TensorSource, index: torch.Tensor) -> torch.Tensor:
        taken.append(len(index))
        if len(taken) == 3:
            raise MemoryError
        return take(self, index)

    monkeypatch.setattr(TensorSource, "take", scarce)
    found = KMeans(12, init="random", random_state=0, n_init=1, tol=0).fit(x)
    assert len(taken) > 3, "a sketch took rows"
    assert torch.equal(found.labels_, plain.labels_)
    assert torch.equal(found.cluster_centers_, plain.cluster_centers_)
    assert found.inertia_ == plain.inertia_


def test_where_smaller_chunks_do_not_help_the_error_comes_through() -> None:
    x = rows("blobs", 100, 3)
    kept = fit(x)
    before = dict(vars(kept))
    scarce = Scarce(x, lambda number, size: MemoryError("no more"))
    with pytest.raises(MemoryError, match="no more") as caught:
        kept.fit(scarce)
    assert "lower memory_limit" in caught.value.__notes__[0]
    assert scarce.handed == 21
    assert vars(kept) == before
    with pytest.raises(ValueError, match="another error"):
        fit(Scarce(x, lambda number, size: ValueError("another error") if number == 5 else None))


def test_predict_and_score_take_smaller_chunks_too() -> None:
    x = rows("blobs", 3000, 8)
    model = fit(x)
    for method in ("predict", "transform", "score"):
        scarce = Scarce(x, lambda number, size: MemoryError() if size > 100 else None)
        found, expected = getattr(model, method)(scarce), getattr(model, method)(x)
        assert found == expected if method == "score" else torch.equal(found, expected)


def test_every_kind_of_chunk_is_halved() -> None:
    def sizes() -> list[int]:
        shared = chunk_rows(8, 64, CPU, 4)
        return [block_rows(64, CPU), piece_rows(8, 64, CPU), tile_rows(10_000, CPU), chunk_rows(8, 64, CPU), shared]

    usual = sizes()
    with relief(CPU) as room:
        with pytest.raises(MemoryError):
            room.run(lambda: bytearray(1 << 62))
        assert all(size <= max(1, before >> 20) for size, before in zip(sizes(), usual, strict=True))
    assert sizes() == usual


# ---- a fit that is interrupted


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("at", [1, 4, 9, 20, 30])
def test_an_interrupted_fit_leaves_the_estimator_and_torch_as_they_were(
    at: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "1KiB")

    def interrupt(number: int, size: int) -> None:
        if number == at:
            raise KeyboardInterrupt

    table = pandas.DataFrame(rows("blobs", 200, 3).numpy(), columns=["a", "b", "c"])
    model = KMeans(6, random_state=0, n_init=4, metric=metric).fit(table)
    before, precision = dict(vars(model)), torch.backends.mkldnn.matmul.fp32_precision
    other = rows("relu", 700, 9)
    other = other[other.any(1)]
    with pytest.raises(KeyboardInterrupt):
        model.fit(Scarce(other, interrupt))
    assert vars(model) == before
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    np.testing.assert_array_equal(model.predict(table), model.labels_)
    assert same(model.fit(other), KMeans(6, random_state=0, n_init=4, metric=metric).fit(other))
    assert not hasattr(model, "feature_names_in_")


@pytest.mark.parametrize("bad", ["nan", "width", "k", "weights", "init", "parameter"])
def test_a_fit_that_is_refused_leaves_the_estimator_as_it_was(bad: str) -> None:
    x = rows("blobs", 60, 3)
    model = fit(x)
    before, weights, other = dict(vars(model)), None, rows("blobs", 60, 5)
    changed: dict[str, Any] = {}
    if bad == "nan":
        other[59, 4] = float("nan")
    elif bad == "width":
        other = other[:, :0]
    elif bad == "k":
        other = other[:5]
    elif bad == "weights":
        weights = -np.ones(60)
    else:
        changed = {"init": np.zeros((2, 2)), "n_init": 1} if bad == "init" else {"tol": -1}
    before |= changed
    with pytest.raises(ValueError):
        model.set_params(**changed).fit(other, sample_weight=weights)
    assert vars(model) == before
    assert torch.equal(model.predict(x), model.labels_)


@pytest.mark.gpu
def test_a_gpu_that_is_nearly_full_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("blobs", 200_000, 64).cuda()
    plain = KMeans(1000, init="random", n_init=1, random_state=0, max_iter=4).fit(x)
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "4GiB")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(x.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (400 << 20)) / total)
    try:
        found = KMeans(1000, init="random", n_init=1, random_state=0, max_iter=4).fit(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.fit_report_.notes
    assert torch.equal(found.labels_, plain.labels_)
    assert torch.equal(found.cluster_centers_, plain.cluster_centers_)
    assert found.inertia_ == plain.inertia_
