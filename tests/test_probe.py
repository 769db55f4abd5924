"""The check of compiled kernels before ``auto`` takes them."""

from __future__ import annotations

import pytest
import torch

from gpuclust.cluster.backends.probe import differs
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


def test_a_backend_with_torchs_results_is_trusted() -> None:
    assert differs(TorchBackend(), CPU) is None


@pytest.mark.parametrize("what", ["labels", "sums", "counts", "changes", "means", "movements"])
def test_a_wrong_result_is_named(what: str) -> None:
    assert differs(Off(what), CPU) == f"its {what} are not those of the torch backend on this device"


def test_an_error_is_the_reason() -> None:
    assert differs(Off("error"), CPU) == "its kernels fail on this device (RuntimeError: out of registers)"


@pytest.mark.interpreter
def test_tritons_kernels_pass() -> None:
    from gpuclust.cluster.backends.triton import TritonBackend

    assert differs(TritonBackend(), CPU) is None
