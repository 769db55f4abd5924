"""The Triton backend: fused kernels, portable over NVIDIA's GPUs, run by Triton's interpreter where there is none.

Labels come from a cascade. The tensor cores multiply rows and centroids rounded to float16, which certifies most rows
(`gpuclust.kernels.triton.assign`, the bound in `gpuclust.cluster.exact`); the torch backend's float32 pass sees only
the rows that this leaves open; the reference distance decides what is then still open.

Why float16: the frame brings the largest value of the rows near 1, so that what is left of a centred row is at most
about 2, and no more than 4 in the operand; float16 has three bits more there than bfloat16, an eighth of its error, at
the same speed, and as many as TF32 at twice its speed and half its memory. Where an operand leaves float16's range
nevertheless (a centroid far away from all rows), its bound is no number and every row goes on to the float32 pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import torch

from gpuclust.cluster.backends.base import Bounded, Operand, Problem, current
from gpuclust.cluster.backends.plain import Plain
from gpuclust.cluster.backends.probe import differs
from gpuclust.cluster.backends.torch import propose
from gpuclust.cluster.exact import FLOAT16, Frame, decide
from gpuclust.cluster.sources.base import block_rows, chunk_rows, piece_rows
from gpuclust.cluster.sums import Grid

_CAPABILITY = (8, 0)
# A kernel's accumulators start from the bias: Triton makes one operation of a product and what is added to it, whether
# written so or not.
_ARITHMETIC = FLOAT16


@dataclass(frozen=True)
class Cascade(Bounded):
    """A float16 operand, and what prepares the float32 one for the rows that it leaves open.

    Attributes
    ----------
    unit : () in the type of the shift
        The scale, where a kernel reads it.
    frame : Frame
    dtype : torch.dtype
        Of the rows.
    """

    unit: torch.Tensor
    frame: Frame
    dtype: torch.dtype

    @classmethod
    def of(cls, operand: Bounded, frame: Frame, dtype: torch.dtype) -> Cascade:
        assert operand.shift is not None
        parts = {field.name: getattr(operand, field.name) for field in fields(operand)}
        return cls(**parts, unit=operand.shift.new_tensor(operand.scale), frame=frame, dtype=dtype)

    @cached_property
    def finer(self) -> list[Bounded | None]:
        """The float32 operand of each restart, as far as one was asked for."""
        return [None] * len(self.centroids)

    def fine(self, restart: int) -> Bounded:
        """The float32 operand of a restart, made when it is first needed."""
        made = self.finer[restart]
        if made is None:
            made = self.finer[restart] = self.frame.operand(self.centroids[restart : restart + 1], self.dtype)
        return made


class TritonBackend(Plain):
    """k-means steps as Triton kernels, on CUDA; in the interpreter on any device that torch has."""

    name = "triton"
    waits = True

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if _interpreted():
            return _interpreter_problem()
        if not torch.cuda.is_available():
            return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
        return None

    def supports(self, problem: Problem) -> str | None:
        if _interpreted():
            return None
        if problem.device.type != "cuda":
            return f"its kernels are compiled for CUDA, and the rows are on {problem.device.type}"
        if torch.version.hip is not None:
            return "its error bound is NVIDIA's tensor cores', and this torch is built for ROCm"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < _CAPABILITY:
            return f"it needs compute capability 8.0 or more, and the device has {capability[0]}.{capability[1]}"
        return None

    def reserved(self, problem: Problem) -> str | None:
        if _interpreted():
            return "its interpreter is for tests: it runs when asked for by name"
        return differs(self, problem)

    def chunk_rows(self, r: int, k: int, d: int, device: torch.device) -> int:
        """Rows of a chunk: no scores are stored, whatever the clusters."""
        return chunk_rows(r, d, device, r)

    def prepare(self, frame: Frame, centroids: torch.Tensor, dtype: torch.dtype) -> Operand:
        return Cascade.of(frame.operand(centroids, dtype, _ARITHMETIC), frame, dtype)

    def assign(
        self, x: torch.Tensor, norms: torch.Tensor, operand: Operand, labels: torch.Tensor, precision: str
    ) -> torch.Tensor:
        assert isinstance(operand, Cascade)
        decided = torch.zeros((), dtype=torch.int64, device=x.device)
        if precision == "fast":
            # Intervals of no width: the least lower end is the least score.
            score = (operand.high + operand.low) / 2
            narrow = replace(operand, high=score, low=score, slope=torch.zeros_like(operand.slope))
            self.propose(x, norms, narrow, labels)
            return decided
        # Few at a time: the float32 pass copies the rows and stores their scores.
        _, k, d = operand.centroids.shape
        size = min(block_rows(d, x.device), piece_rows(k, d, x.device))
        for restart, flags in enumerate(self.propose(x, norms, operand, labels)):
            rows = flags.nonzero()[:, 0]
            for some in rows.split(size):
                if some.numel():
                    decided += _settle(x, norms, operand, restart, some, labels[restart])
        return decided

    def propose(self, x: torch.Tensor, norms: torch.Tensor, operand: Cascade, labels: torch.Tensor) -> torch.Tensor:
        """Label the rows (b, d) by their scores in float16, and say which labels are not certain: int8 (r, b)."""
        uncertain = torch.ones(labels.shape, dtype=torch.int8, device=x.device)
        with current(x.device):
            _kernels("assign").assign(x, norms, operand, operand.unit, labels, uncertain)
        return uncertain

    def accumulate(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        grid: Grid,
        plus: torch.Tensor,
        minus: torch.Tensor | None,
        sums: torch.Tensor,
        counts: torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        if changed is not None:
            changed += plus.shape[1] if minus is None else (plus != minus).sum(1)
        with current(x.device):
            _kernels("accumulate").accumulate(x, weights, grid.constants, plus, minus, sums, counts)


def _settle(
    x: torch.Tensor, norms: torch.Tensor, operand: Cascade, restart: int, rows: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Label the ``rows`` (p,) of ``x`` in ``labels`` (b,) of a restart, by float32 and the reference distance: how many
    of them the reference distance decided."""
    some, found = x.index_select(0, rows), labels.new_empty(1, rows.numel())
    candidates = propose(some, norms[rows], operand.fine(restart), found)
    decided = decide(some, operand.centroids[restart : restart + 1], candidates, found)
    labels[rows] = found[0]
    return decided


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _interpreter_problem() -> str | None:
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return f"the interpreter of triton {triton.__version__} needs numpy < 2.4, and this is {numpy.__version__}"
    return None


@cache
def _kernels(name: str) -> Any:
    """A module of kernels, loaded with Triton when it is first used."""
    return importlib.import_module(f"gpuclust.kernels.triton.{name}")
