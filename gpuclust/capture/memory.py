"""MemoryPlan: what a run will hold on its device, in bytes, known before any pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpuclust.capture.layers import Layer
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.memory import primal_needs
from gpuclust.config import show_bytes
from gpuclust.errors import MemoryLimitError

# Activations that a forward pass holds at once: a layer's input, its output, and a convolution's own workspace.
FORWARD_COPIES = 3


@dataclass(frozen=True)
class LayerPlan:
    """What one layer's rows take."""

    name: str
    module: str
    d: int
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of one run, and whether they are there; see `make_plan` for each term.

    `limit_bytes` is None where no limit was set.
    """

    network: str
    n: int
    dtype: str
    device: str
    rows: tuple[LayerPlan, ...]
    module_bytes: int
    activations_bytes: int
    forward_bytes: int
    work_bytes: int
    free_bytes: int
    limit_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """The peak: network, activations, and the larger of the forward pass and k-means, which follow each other."""
        return self.module_bytes + self.activations_bytes + max(self.forward_bytes, self.work_bytes)

    @property
    def budget_bytes(self) -> int:
        """What the run may use: free memory, or the limit where that is less."""
        return self.free_bytes if self.limit_bytes is None else min(self.free_bytes, self.limit_bytes)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.total_bytes <= self.budget_bytes

    def require(self) -> None:
        """Nothing if the run fits.

        Raises
        ------
        MemoryLimitError
            With the bytes that the run needs and has, and what to do.
        """
        if self.fits:
            return
        limited = self.limit_bytes is not None and self.limit_bytes <= self.free_bytes
        has = f"the memory limit is {_show(self.budget_bytes)}" if limited else f"{_show(self.budget_bytes)} are free"
        widest = max(self.rows, key=lambda row: row.bytes)
        advice = [
            "fewer images per class (--per-class)",
            f"fewer layers (--layers; {widest.name} alone is {show_bytes(widest.bytes)})",
        ]
        if self.dtype == "float32":
            advice.append("half the bytes per value (--dtype float16)")
        if limited:
            advice.append("a larger --memory-limit")
        raise MemoryLimitError(
            f"{self.network} on {self.n} images needs {_show(self.total_bytes)} on {self.device} "
            f"({_gigabytes(self.activations_bytes)} of activations in {self.dtype}), and {has}: "
            f"take {', or '.join(advice)}"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per layer: layer, module, values per image, bytes."""
        return [{"layer": row.name, "module": row.module, "d": row.d, "bytes": row.bytes} for row in self.rows]

    def describe(self) -> dict[str, Any]:
        """The plan for JSON: its layers as in `table`, and its terms in bytes."""
        terms = {name: value for name, value in asdict(self).items() if name.endswith("_bytes")}
        return {"layers": self.table(), **terms, "peak_bytes": self.total_bytes, "dtype": self.dtype}

    def __str__(self) -> str:
        lines = [(row.name, row.module, f"{row.d:,}", _gigabytes(row.bytes)) for row in self.rows]
        lines.insert(0, ("layer", "module", "values/image", f"{self.n:,} x {self.dtype}"))
        terms = [
            ("activations", self.activations_bytes),
            ("network", self.module_bytes),
            ("forward pass", self.forward_bytes),
            ("k-means", self.work_bytes),
            ("peak", self.total_bytes),
            (f"free on {self.device}", self.free_bytes),
        ]
        if self.limit_bytes is not None:
            terms.append(("memory limit", self.limit_bytes))
        lines += [(name, "", "", _gigabytes(size)) for name, size in terms]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        text = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines]
        return "\n".join([*text, "it fits" if self.fits else "it does not fit"])


def make_plan(
    network_name: str,
    layers: Sequence[Layer],
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    clusters: int,
    n_init: int,
    batch_size: int,
    module_bytes: int,
    free: int,
    limit: int | None,
    widest: int | None = None,
) -> MemoryPlan:
    """The memory plan of a run that keeps all `layers` of `n` images on one device: arithmetic, nothing else.

    Parameters
    ----------
    network_name
        For messages.
    layers
        Those to capture; all are held at once.
    n
        Images.
    dtype, device
        Of the stored rows.
    clusters, n_init
        Of k-means. Its workspace is what the primal solver takes for the widest layer with all restarts at a time and
        with chunks of the usual size (`gpuclust.cluster.memory`).
    batch_size
        Images of one forward pass, estimated at three copies of its widest activation in float32.
    module_bytes
        Parameters and buffers that have yet to come to the device; 0 where they are there and so left `free` already.
    free
        Bytes free on the device (`gpuclust.free.free_bytes`).
    limit
        The most bytes the run may use, or None.
    widest
        Values per image of the widest activation that the forward pass computes; by default the widest of `layers`,
        which is too little where only late layers are captured.
    """
    size = dtype.itemsize
    rows = tuple(LayerPlan(layer.name, layer.module, layer.values, n * layer.values * size) for layer in layers)
    d = max((row.d for row in rows), default=0)
    needs = primal_needs(Problem(n, max(1, d), clusters, dtype, device), n)
    return MemoryPlan(
        network=network_name,
        n=n,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        rows=rows,
        module_bytes=module_bytes,
        activations_bytes=sum(row.bytes for row in rows),
        forward_bytes=FORWARD_COPIES * batch_size * max(widest or 0, d) * 4,
        work_bytes=needs.fixed + n_init * needs.restart + needs.work,
        free_bytes=free,
        limit_bytes=limit,
    )


def _gigabytes(size: int) -> str:
    """In one unit, so that a column can be compared; what would round away in its own."""
    return f"{size / 1e9:.2f} GB" if size >= 5e7 or size == 0 else show_bytes(size)


def _show(size: int) -> str:
    return f"{show_bytes(size)} ({size:,} bytes)"
