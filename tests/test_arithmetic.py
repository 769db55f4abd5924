"""Settings of torch that a caller may have made: none of them reaches a fit, and all come back after it."""

from __future__ import annotations

import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from cases_cluster import mislabelled, rows
from cases_rows import tight

from gpuclust import KMeans
from gpuclust.arithmetic import full_precision, subnormals
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.probe import differs
from gpuclust.cluster.backends.torch import TorchBackend

CPU = torch.device("cpu")
# A deadlock fails the test instead of hanging it.
PATIENCE_S = 60


def settings() -> list[Any]:
    backends: Any = torch.backends
    operations = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    return [
        *(operation.fp32_precision for operation in operations),
        *(backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
    ]


FULL = [*["ieee"] * 4, True, False, False]


@pytest.fixture
def callers() -> Iterator[list[Any]]:
    """Settings of a caller who wants speed."""
    matmul: Any = torch.backends.mkldnn.matmul
    matmul.fp32_precision, torch.backends.cudnn.benchmark = "bf16", True
    yield settings()
    matmul.fp32_precision, torch.backends.cudnn.benchmark = "none", False


class Paused:
    """Chunks of rows that call ``pause`` once, in the ``pass_``-th pass over them: in the middle of a fit."""

    def __init__(self, x: torch.Tensor, pass_: int, pause: Callable[[], None]) -> None:
        self.x, self.left, self.pause = x, pass_, pause

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.x[:150]
        self.left -= 1
        if self.left == 0:
            self.pause()
        yield self.x[150:]


def in_threads(*targets: Callable[[], None]) -> None:
    """Run all at once, to their ends; the first error that one raises is raised here."""
    errors: list[BaseException] = []

    def run(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_fits_that_overlap_in_two_threads_keep_full_precision_to_the_end_of_the_last(callers: list[Any]) -> None:
    x = rows("blobs", 300, 4)
    alone = KMeans(3, random_state=0).fit(x)
    assert settings() == callers
    first_computes, second_computes, first_ended = (threading.Event() for _ in range(3))
    seen: list[list[Any]] = []

    def pause_first() -> None:
        first_computes.set()
        assert second_computes.wait(PATIENCE_S)
        seen.append(settings())

    def pause_second() -> None:
        second_computes.set()
        assert first_ended.wait(PATIENCE_S)
        seen.append(settings())

    def first() -> None:
        models.append(KMeans(3, random_state=0).fit(Paused(x, 3, pause_first)))
        first_ended.set()

    def second() -> None:
        assert first_computes.wait(PATIENCE_S)
        models.append(KMeans(3, random_state=0).fit(Paused(x, 3, pause_second)))

    models: list[KMeans] = []
    in_threads(first, second)
    assert seen == [FULL, FULL]
    assert settings() == callers
    for model in models:
        assert torch.equal(model.labels_, alone.labels_)
        assert model.inertia_ == alone.inertia_


def test_blocks_within_blocks_and_errors_bring_the_settings_back(callers: list[Any]) -> None:
    with full_precision(CPU):
        with pytest.raises(ArithmeticError), full_precision(CPU):
            raise ArithmeticError
        assert settings() == FULL
    assert settings() == callers


def test_a_setting_that_changes_while_another_computes_does_not_reach_the_next(callers: list[Any]) -> None:
    with full_precision(CPU):
        torch.backends.cudnn.benchmark = True
        with full_precision(CPU):
            assert settings() == FULL
    assert settings() == callers


# ---- subnormal numbers


def flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero."""
    return sys.float_info.min * 0.5 == 0.0


def with_four_threads(target: Callable[[], None]) -> None:
    """Run it in a thread of its own, whose worker threads begin with it: they inherit what they find."""
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(4)
        try:
            target()
        finally:
            torch.set_num_threads(threads)

    in_threads(run)


def small_rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows that are subnormal numbers, or have subnormal squares, and enough of them for several threads."""
    if dtype == torch.float64:
        return rows("blobs", 40_000, 4, dtype) * 1e-155
    return rows("subnormal", 40_000, 4, dtype)


def everything(x: torch.Tensor, weights: torch.Tensor | None) -> tuple[Any, ...]:
    model = KMeans(5, random_state=0, max_iter=5).fit(x, sample_weight=weights)
    asked = model.predict(x), model.transform(x), model.score(x, sample_weight=weights)
    return (model.labels_, model.cluster_centers_, model.inertia_, *asked)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("begin", ["before the workers", "after the workers", "and ended, in the workers alone"])
def test_subnormal_numbers_are_numbers_though_the_caller_flushes_them(
    begin: str, dtype: torch.dtype, weighted: bool
) -> None:
    x = small_rows(dtype)
    weights = torch.linspace(1e-41, 1e-39, len(x)) if weighted else None
    usual, seen = everything(x, weights), list[Any]()
    assert usual[2] > 0 or dtype == torch.float64  # squares near 1e-310 are labelled right, and add up to nothing
    assert mislabelled(usual[0], x, usual[1]) == 0

    def flushing() -> None:
        if begin == "after the workers":
            torch.ones(1 << 20).add_(1)
        torch.set_flush_denormal(True)
        if begin == "and ended, in the workers alone":
            torch.ones(1 << 20).add_(1)
            torch.set_flush_denormal(False)
        before = flushes(), torch.get_num_threads()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch's worker threads take subnormal")
            seen.extend(everything(x, weights))
        assert (flushes(), torch.get_num_threads()) == before

    with_four_threads(flushing)
    for one, other in zip(seen, usual, strict=True):
        np.testing.assert_array_equal(one, other)


def in_subnormals() -> tuple[int, bool]:
    """The number of threads, and whether this one flushes, inside the block."""
    with subnormals(CPU):
        return torch.get_num_threads(), flushes()


def test_worker_threads_that_flush_are_left_out_and_named() -> None:
    def flushing() -> None:
        torch.set_flush_denormal(True)
        torch.ones(1 << 20).add_(1)
        with pytest.warns(UserWarning, match="torch.set_flush_denormal"):
            assert in_subnormals() == (1, False)
        with pytest.raises(UserWarning, match="worker threads"):  # where warnings are errors
            in_subnormals()
        assert torch.get_num_threads() == 4
        assert flushes()

    with_four_threads(flushing)


def test_worker_threads_that_do_not_flush_go_on() -> None:
    def flushing() -> None:
        torch.ones(1 << 20).add_(1)
        torch.set_flush_denormal(True)
        assert in_subnormals() == (4, False)
        assert flushes()

    with_four_threads(flushing)


# ---- the default device


def mapped(x: np.ndarray, file: Path) -> np.ndarray:
    np.save(file, x)
    return np.load(file, mmap_mode="r")


KINDS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "float64": lambda x, file: x,
    "float16": lambda x, file: x.astype(np.float16),
    "whole numbers": lambda x, file: x.astype(np.int16),
    "bool": lambda x, file: x > 0,
    "foreign byte order": lambda x, file: x.astype(">f4"),
    "backwards": lambda x, file: x[::-1, ::-1],
    "a list": lambda x, file: x.tolist(),
    "a table": lambda x, file: pandas.DataFrame(x),
    "a tensor": lambda x, file: torch.from_numpy(x).float(),
    "a tensor of whole numbers": lambda x, file: torch.from_numpy(x).long(),
    "DLPack": lambda x, file: Dlpack(x),
    "a mapped file": mapped,
    "a mapped file of whole numbers": lambda x, file: mapped(x.astype(np.int64), file),
    "a mapped file, columns first": lambda x, file: mapped(np.asfortranarray(x), file),
    "chunks": lambda x, file: [x[:100], x[100:]],
    "chunks of whole numbers": lambda x, file: [x[:100].astype(int), x[100:].astype(int)],
}


class Dlpack:
    """Rows of another library, which torch reads by DLPack."""

    def __init__(self, x: np.ndarray) -> None:
        self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__

    def __array_namespace__(self) -> Any:
        return np


def found(model: KMeans, x: Any, weights: Any = None) -> list[np.ndarray]:
    """All that a model says of rows."""
    model.fit(x, sample_weight=weights)
    model = pickle.loads(pickle.dumps(model))
    asked = model.predict(x), model.transform(x), model.score(x, sample_weight=weights)
    found = model.labels_, model.cluster_centers_, model.inertia_, model.fit_report_.dist2, *asked
    return [np.asarray(each) for each in found]


def same_under_another_device(parameters: dict[str, Any], x: Any, weights: Any = None) -> None:
    model = KMeans(**{"n_clusters": 3, "random_state": 0, "n_init": 2, **parameters})
    usual = found(model, x, weights)
    with torch.device("meta"):
        other = found(model, x, weights)
    for one, another in zip(usual, other, strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limited", [False, True], ids=["", "streamed"])
def test_the_default_device_does_not_reach_rows_of_any_kind(
    kind: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "700")
    plain = rows("near ties", 160, 6, torch.float64).numpy()
    same_under_another_device(
        {"memory_limit": tight(plain, 3) if limited else None}, KINDS[kind](plain, tmp_path / "x.npy")
    )


@pytest.mark.parametrize(
    "weights",
    [np.arange(160), np.linspace(0, 1, 160), [1.0, 2.0] * 80, torch.arange(160), 3.0, np.arange(160) > 9],
    ids=["whole", "floats", "list", "tensor", "scalar", "bool"],
)
def test_the_default_device_does_not_reach_weights_of_any_kind(weights: Any) -> None:
    same_under_another_device({}, rows("blobs", 160, 6), weights)


def some_rows(x: Any, k: int, random_state: np.random.RandomState) -> Any:
    return x[random_state.permutation(len(x))[:k]]


@pytest.mark.parametrize(
    "parameters",
    [
        {"algorithm": "hartigan-wong", "n_clusters": 12},
        {"init": "random"},
        {"init": "k-means||", "n_clusters": 20},
        {"init": np.eye(3, 40), "n_init": 1},
        {"init": np.eye(3, 40, dtype=int).tolist(), "n_init": 1},
        {"init": some_rows},
        {"solver": "dual"},
        {"solver": "dual", "algorithm": "hartigan-wong", "n_clusters": 12},
        {"metric": "cosine"},
        {"precision": "fast"},
        {"device": "cpu"},
        {"device": "auto"},
        {"verbose": 1},
        pytest.param({"backend": "triton", "n_init": 2, "max_iter": 3}, marks=pytest.mark.interpreter),
    ],
    ids=lambda parameters: " ".join(
        f"{name} {getattr(value, '__name__', value)}" for name, value in parameters.items()
    ),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_default_device_does_not_reach_a_fit_of_any_sort(parameters: dict[str, Any], dtype: torch.dtype) -> None:
    x = rows("noise", 160, 40, dtype)
    same_under_another_device(parameters, x)
    same_under_another_device(parameters, x, torch.linspace(0, 1, 160))


def test_the_default_device_does_not_reach_a_fit_in_few_dimensions() -> None:
    x = rows("blobs", 6000, 300)  # wide and many enough for a sketch
    same_under_another_device({"n_clusters": 10}, x)


def test_the_default_device_does_not_reach_a_fit_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuclust.cluster.gaps._LEAST_SCORES", 0)
    same_under_another_device({"n_clusters": 5, "tol": 0}, rows("noise", 800, 3))


def test_the_default_device_does_not_reach_the_check_of_a_backend() -> None:
    with torch.device("meta"):
        assert differs(TorchBackend(), Problem(10, 3, 2, torch.float32, CPU)) is None
