"""MemoryPlan: where every layer's rows will be, in which pass, and what that takes; see `gpuclust.capture.planner`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpuclust.capture.table import show_plan
from gpuclust.config import show_bytes
from gpuclust.errors import MemoryLimitError

# Percent of what was planned that is planned with once memory ran out.
_AFTER_FAILURE = 70


@dataclass(frozen=True)
class Forward:
    """What a dry batch told of the network's forward pass.

    Attributes
    ----------
    batch_size : int
        Images of a batch.
    peak_bytes : int
        What a batch holds on the device at its peak, the images included.
    seconds : float
        Of a batch.
    reach : mapping of str to float
        For each layer's name the share of these seconds after which its activation is there.
    pixel_bytes : int
        Of one image, as it is kept on the device between passes.
    decode_s : float
        Seconds for reading and decoding one image, with all workers at it.
    input_bytes : int
        Of a batch as the network takes it, and as it waits for that.
    peaks : mapping of str to int
        For each layer's name what is held at the peak of a pass that ends there, the images included.
    channels_last : frozenset of str
        Names of the layers whose activations lie in memory channels last, as the rows then hold them.
    """

    batch_size: int
    peak_bytes: int
    seconds: float
    reach: Mapping[str, float]
    pixel_bytes: int
    decode_s: float
    input_bytes: int = 0
    peaks: Mapping[str, int] = field(default_factory=dict)
    channels_last: frozenset[str] = frozenset()

    def of(self, images: int) -> Forward:
        """The same of a batch of at most so many images, in proportion."""
        share = min(1.0, images / self.batch_size)
        return replace(
            self,
            batch_size=min(images, self.batch_size),
            peak_bytes=int(share * self.peak_bytes),
            seconds=share * self.seconds,
            input_bytes=int(share * self.input_bytes),
            peaks={name: int(share * size) for name, size in self.peaks.items()},
        )

    def peak_to(self, layers: Iterable[str]) -> int:
        """What a pass holds at its peak that ends at the deepest of these layers."""
        return max((self.peaks.get(name, self.peak_bytes) for name in layers), default=self.peak_bytes)

    def pass_s(self, n: int, layer: str) -> float:
        """Seconds of a pass of n images as far as a layer."""
        return n / self.batch_size * self.seconds * self.reach.get(layer, 1.0)


@dataclass(frozen=True)
class Room:
    """The memory there is: free on the device, what the run may use of it, and other places for rows.

    ``limit_bytes`` is None where no limit was set; ``host_bytes`` is free host memory (0 where the device is the host),
    ``disk_bytes`` what is free where rows may go to disk (0 where they may not). ``reserve_bytes`` is what the process
    itself takes beside tensors.
    """

    free_bytes: int
    limit_bytes: int | None = None
    host_bytes: int = 0
    disk_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def budget_bytes(self) -> int:
        """What the run may use: free memory, or the limit where that is less."""
        return self.free_bytes if self.limit_bytes is None else min(self.free_bytes, self.limit_bytes)

    def after_failure(self, peak_bytes: int) -> Room:
        """What is left to plan with when memory ran out in a run that was to take so much."""
        return replace(self, limit_bytes=min(peak_bytes, self.budget_bytes) * _AFTER_FAILURE // 100)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is handled.

    Attributes
    ----------
    name, module : str
    d, bytes : int
        Values of a row as it is stored, and bytes of all rows.
    place : str
        Where the rows are while they are clustered: ``device``, ``host`` (page-locked), ``disk``, or ``recompute``.
    step : int
        Index of the step of the run that captures and clusters it.
    solver : str
        What k-means is expected to use.
    work_bytes, least_bytes, peak_bytes : int
        What k-means may take beside the rows, the least that it needs, and what it is expected to take.
    passes : int
        Times that the rows are read where they do not lie on the device; for ``recompute`` each is a forward pass.
    seconds : float
        Predicted for clustering it.
    short_bytes : int
        What is missing on the device; above 0 for a layer that fits in no way.
    fewer_fit : bool
        Whether it would fit with fewer images.
    """

    name: str
    module: str
    d: int
    bytes: int
    place: str
    step: int
    solver: str
    work_bytes: int
    least_bytes: int
    peak_bytes: int
    passes: int
    seconds: float
    short_bytes: int = 0
    fewer_fit: bool = True


@dataclass(frozen=True)
class Step:
    """One pass over the images and the layers that it serves, in the order in which they are clustered.

    ``capture_s`` is 0 where all layers are recomputed: their passes are k-means'.
    """

    layers: tuple[str, ...]
    place: str
    capture_s: float
    peak_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The passes of a run, their bytes and seconds; made by `make_plan`.

    ``others`` are plans for other options, by what these are on the command line; `str` tells them all.
    """

    network: str
    n: int
    dtype: str
    device: str
    rows: tuple[LayerPlan, ...]
    steps: tuple[Step, ...]
    forward: Forward
    room: Room
    module_bytes: int
    pixels_bytes: int
    others: tuple[tuple[str, MemoryPlan], ...] = ()

    def __str__(self) -> str:
        return show_plan(self)

    @property
    def activations_bytes(self) -> int:
        """All rows of all layers."""
        return sum(row.bytes for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """The expected peak on the device: network, kept images, and the largest step."""
        kept = self.module_bytes + self.pixels_bytes + self.room.reserve_bytes
        return kept + max((step.peak_bytes for step in self.steps), default=self.forward.peak_bytes)

    @property
    def passes(self) -> int:
        """Passes of images through the network, each as far as its deepest layer."""
        captured = sum(1 for step in self.steps if step.place != "recompute")
        return captured + sum(row.passes for row in self.rows if row.place == "recompute")

    @property
    def seconds(self) -> float:
        """Predicted for passes and k-means; reports and scores are not in it."""
        return sum(step.capture_s for step in self.steps) + sum(row.seconds for row in self.rows)

    @property
    def short_bytes(self) -> int:
        """What is missing on the device for the layer that needs the most; 0 where the run fits."""
        return max((row.short_bytes for row in self.rows), default=0)

    @property
    def fits(self) -> bool:
        """Whether there is a way to do every layer within the budget."""
        return self.short_bytes == 0

    def row(self, name: str) -> LayerPlan:
        """The plan of the layer of that name."""
        return next(row for row in self.rows if row.name == name)

    def require(self) -> None:
        """Nothing if the run fits.

        Raises
        ------
        MemoryLimitError
            With the bytes that the run needs, has and lacks, and what to do.
        """
        if self.fits:
            return
        room = self.room
        limited = room.limit_bytes is not None and room.limit_bytes <= room.free_bytes
        has = (
            f"the memory limit is {_exactly(room.budget_bytes)}"
            if limited
            else f"{_exactly(room.budget_bytes)} are free"
        )
        worst = max(self.rows, key=lambda row: row.short_bytes)
        needs = room.budget_bytes + worst.short_bytes
        advice = ["fewer images per class (--per-class)"] if worst.fewer_fit else []
        advice.append(f"other layers than {worst.name} (--layers)")
        if self.forward.batch_size > 1:
            advice.append("a smaller batch (--batch-size; it changes the network's rounding)")
        advice.append(f'fewer values of the layer (--reduce "{worst.name}=avgpool")')
        if limited:
            advice.append(f"a --memory-limit of {show_bytes(needs * 1.01)}")
        raise MemoryLimitError(
            f"{self.network} on {self.n} images needs {_exactly(needs)} on {self.device} for {worst.name}, even with "
            "one restart of k-means at a time and its rows computed anew in each pass "
            f"({show_bytes(self.module_bytes)} network, "
            f"{show_bytes(self.forward.peak_bytes)} forward pass of {self.forward.batch_size} images, "
            f"{show_bytes(worst.least_bytes)} k-means), and {has}: {show_bytes(worst.short_bytes)} too little; take "
            f"{', or '.join(advice)}"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per layer: layer, module, values of a row, bytes, where the rows are, the step, and k-means."""
        return [
            {
                "layer": row.name,
                "module": row.module,
                "d": row.d,
                "bytes": row.bytes,
                "rows": row.place if not row.short_bytes else f"{show_bytes(row.short_bytes)} too little",
                "step": row.step + 1,
                "solver": row.solver,
                "k-means_bytes": row.peak_bytes,
                "passes": row.passes,
                "seconds": round(row.seconds, 3),
            }
            for row in self.rows
        ]

    def describe(self) -> dict[str, Any]:
        """The plan for JSON: its layers as in `table`, and its terms in bytes and seconds."""
        return {
            "layers": self.table(),
            "activations_bytes": self.activations_bytes,
            "module_bytes": self.module_bytes,
            "pixels_bytes": self.pixels_bytes,
            "forward_bytes": self.forward.peak_bytes,
            "reserve_bytes": self.room.reserve_bytes,
            "peak_bytes": self.total_bytes,
            "free_bytes": self.room.free_bytes,
            "limit_bytes": self.room.limit_bytes,
            "batch_size": self.forward.batch_size,
            "passes": self.passes,
            "predicted_s": round(self.seconds, 3),
            "dtype": self.dtype,
            "steps": [
                {"layers": ", ".join(step.layers), "rows": step.place, "capture_s": round(step.capture_s, 3)}
                for step in self.steps
            ],
        }


def _exactly(size: int) -> str:
    return f"{show_bytes(size)} ({size:,} bytes)"
