"""The check of compiled kernels before ``auto`` takes them."""

from __future__ import annotations

import pytest
import torch

from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.backends.probe import Shape, differs
from gpuclust.cluster.backends.torch import TorchBackend

CPU = torch.device("cpu")


class Off(TorchBackend):
    """A backend one of whose results is wrong in one place."""

    def __init__(self, what: str) -> None:
        self.what = what

    def advance(self, course, changed, masses, sums, centroids, limits):  # type: ignore[no-untyped-def, override]
        report = super().advance(course, changed, masses, sums, centroids, limits)
        if self.what == "means":
            centroids[-1, -1, -1] += 2.0**-20
        if self.what == "movements":
            report[-1, 1] += 2.0**-20
        return report

    def assign(self, x, norms, operand, labels, precision):  # type: ignore[no-untyped-def]
        if self.what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        decided = super().assign(x, norms, operand, labels, precision)
        if self.what == "labels":
            labels[-1, -1] = (labels[-1, -1] + 1) % operand.centroids.shape[1]
        return decided

    def accumulate(self, x, weights, grid, plus, minus, sums, counts, changed):  # type: ignore[no-untyped-def]
        super().accumulate(x, weights, grid, plus, minus, sums, counts, changed)
        if self.what == "changes" and minus is not None:
            changed[0] += 1
        if self.what == "sums":
            sums[-1, -1, -1, -1] += 2.0**-20
        if self.what == "counts":
            counts[0, 0] += 1
        if self.what == "error":
            raise RuntimeError("out of registers\nand a long log")

    def total(self, x, grid, sums):  # type: ignore[no-untyped-def]
        super().total(x, grid, sums)
        if self.what == "totals":
            sums[0, -1] += 2.0**-20

    def largest(self, x):  # type: ignore[no-untyped-def]
        return super().largest(x) + (self.what == "largest values")

    def dist2(self, x, centroids, which=None):  # type: ignore[no-untyped-def]
        dist2 = super().dist2(x, centroids, which)
        dist2[-1] += self.what == "distances"
        return dist2


def problem(d: int = 3, k: int = 2, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(10, d, k, dtype, CPU)


def test_a_backend_with_torchs_results_is_trusted() -> None:
    assert differs(TorchBackend(), problem()) is None
    assert differs(TorchBackend(), problem(1, 1, torch.float64)) is None


@pytest.mark.parametrize(
    "what", ["labels", "sums", "counts", "changes", "means", "movements", "totals", "largest values", "distances"]
)
def test_a_wrong_result_is_named(what: str) -> None:
    assert differs(Off(what), problem()) == f"its {what} are not those of the torch backend on this device"


def test_an_error_is_the_reason() -> None:
    assert differs(Off("error"), problem()) == "its kernels fail on this device (RuntimeError: out of registers)"


def test_no_memory_is_no_answer_for_another_time() -> None:
    backend = Off("memory")
    assert differs(backend, problem()) == "there is no memory on this device to compare its results with torch's"
    backend.what = ""
    assert differs(backend, problem()) is None


def test_a_kernel_that_fails_at_the_problems_shape_alone_is_found() -> None:
    class Narrow(TorchBackend):
        def assign(self, x, norms, operand, labels, precision):  # type: ignore[no-untyped-def]
            if x.shape[1] > 5000 and len(operand.centroids[0]) > 256 and x.dtype == torch.float16:
                raise RuntimeError("too much shared memory")
            return super().assign(x, norms, operand, labels, precision)

    backend = Narrow()
    assert differs(backend, problem(193_600, 256, torch.float16)) is None
    assert differs(backend, problem(5000, 300)) is None
    assert "too much shared memory" in str(differs(backend, problem(193_600, 300, torch.float16)))


@pytest.mark.parametrize("d", [1, 129, 8255, 8257, 3_211_264 + 3])
def test_a_comparison_is_small_and_takes_the_problems_way(d: int) -> None:
    shape = Shape.of(problem(d, 100_000, torch.bfloat16))
    assert shape.d * shape.k <= 2**22
    assert shape.d % 64 == d % 64
    assert min(shape.d, 8192) == min(d, 8192)
    assert shape.k > 256  # the CuPy backend's few centroids
    assert shape.dtype == torch.bfloat16


@pytest.mark.interpreter
def test_tritons_kernels_pass() -> None:
    from gpuclust.cluster.backends.triton import TritonBackend

    assert differs(TritonBackend(), problem()) is None
