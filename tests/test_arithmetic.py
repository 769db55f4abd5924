"""Settings of torch that a caller may have made: none of them reaches a fit, and all come back after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases_cluster import rows

from gpuclust import KMeans
from gpuclust.arithmetic import full_precision

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
