"""MemoryPlan: where every layer's rows will be, known before any pass: pure arithmetic on sizes and one dry batch.

A layer's rows stay on the device if they fit there beside a forward pass and the least that k-means takes. Layers that
fit one by one but not together are packed into several passes over the images. A layer that does not fit alone is
"recomputed": whenever k-means reads its rows, the images pass through the network once more, up to that layer; or its
rows wait in page-locked host memory or on disk, where that is predicted to be faster and is allowed. In a pass the
narrow layers are clustered first, so that the widest has the most room. None of this changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpuclust.capture.layers import Layer
from gpuclust.capture.packing import Item, pack
from gpuclust.capture.table import show_plan
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.memory import default_limit, dual_needs, primal_needs
from gpuclust.cluster.solver import Plan as SolverPlan
from gpuclust.cluster.solver import plan as plan_solver
from gpuclust.compare.workspace import geometry_bytes, geometry_passes
from gpuclust.config import show_bytes
from gpuclust.errors import MemoryLimitError

# Bytes per second to page-locked host memory and back, and to and from a disk.
COPY_RATE, DISK_RATE = 20e9, 0.5e9
# Of free host memory, rows may take this share.
_HOST_SHARE = 0.5
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
    """

    batch_size: int
    peak_bytes: int
    seconds: float
    reach: Mapping[str, float]
    pixel_bytes: int
    decode_s: float

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
    work_bytes, least_bytes : int
        What k-means may take beside the rows, and the least that it needs.
    passes : int
        Times that the rows are read where they do not lie on the device; for ``recompute`` each is a forward pass.
    seconds : float
        Predicted for clustering it.
    short_bytes : int
        What is missing on the device; above 0 for a layer that fits in no way.
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
    passes: int
    seconds: float
    short_bytes: int = 0


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
        """The peak on the device: network, kept images, and the largest step."""
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
        advice = ["fewer images per class (--per-class)", f"other layers than {worst.name} (--layers)"]
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
                "k-means_bytes": row.work_bytes,
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


def make_plan(
    network_name: str,
    layers: Sequence[Layer],
    n: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    clusters: int,
    n_init: int,
    forward: Forward,
    module_bytes: int,
    room: Room,
    solver: str = "auto",
    widths: Mapping[str, int] | None = None,
    kept: bool | None = None,
) -> MemoryPlan:
    """The plan of a run: arithmetic, nothing else.

    Parameters
    ----------
    network_name
        For messages.
    layers
        Those to capture.
    n
        Images.
    dtype, device
        Of the stored rows; only the type of the device counts, which need not be there.
    clusters, n_init, solver
        Of k-means.
    forward
        What a dry batch told.
    module_bytes
        Parameters and buffers that have yet to come to the device; 0 where they are there and so left `room` already.
    room
        What memory there is.
    widths
        Values of a stored row by the layer's name, where that is not the layer's own.
    kept
        Whether the images are kept on the device between passes; by default what is better.
    """
    maker = _Maker(layers, n, dtype, device, clusters, n_init, forward, module_bytes, room, solver, widths or {})
    plans = [maker.plan(keeps) for keeps in ((False, True) if kept is None else ((False, True) if kept else (False,)))]
    best = min(plans, key=lambda plan: (plan.short_bytes, plan.seconds, plan.pixels_bytes))
    return replace(best, network=network_name)


@dataclass(frozen=True)
class _Maker:
    layers: Sequence[Layer]
    n: int
    dtype: torch.dtype
    device: torch.device
    clusters: int
    n_init: int
    forward: Forward
    module_bytes: int
    room: Room
    solver: str
    widths: Mapping[str, int]

    def plan(self, keeps: bool) -> MemoryPlan:
        """The best plan with the images kept on the device, or decoded in each pass."""
        pixels = self.n * self.forward.pixel_bytes if keeps else 0
        left = self.room.budget_bytes - self.module_bytes - self.room.reserve_bytes - pixels
        decode_s = 0.0 if keeps else self.n * self.forward.decode_s
        alone = {layer.name: self._resident(layer, left) for layer in self.layers}
        fitting = [layer for layer in self.layers if alone[layer.name] is not None]
        rows: dict[str, LayerPlan] = {}
        steps: list[Step] = []
        items = [Item(layer.name, self._rows(layer), self._needs(layer)[0], self._reach_s(layer)) for layer in fitting]
        for names in pack(items, left, self.forward.peak_bytes, decode_s):
            group = sorted((layer for layer in fitting if layer.name in names), key=self._width)
            steps.append(self._step(group, left, len(steps), decode_s, rows))
        for layer in self.layers:
            if layer.name not in rows:
                steps.append(self._streamed(layer, left, len(steps), decode_s, rows))
        # Decoded once in any case, by the first step.
        if keeps and steps:
            first = steps[0]
            steps[0] = replace(first, capture_s=max(first.capture_s, self.n * self.forward.decode_s))
        ordered = tuple(rows[layer.name] for layer in self.layers)
        return MemoryPlan(
            network="the network",
            n=self.n,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            rows=ordered,
            steps=tuple(steps),
            forward=self.forward,
            room=self.room,
            module_bytes=self.module_bytes,
            pixels_bytes=pixels,
        )

    # ---- a layer's sizes

    def _width(self, layer: Layer) -> int:
        return self.widths.get(layer.name, layer.values)

    def _rows(self, layer: Layer) -> int:
        return self.n * self._width(layer) * self.dtype.itemsize

    def _reach_s(self, layer: Layer) -> float:
        """Seconds of a pass of all images as far as the layer."""
        return self.forward.pass_s(self.n, layer.name)

    def _problem(self, layer: Layer) -> Problem:
        # Only the kind of the device counts here, so that a plan can be made for one that is not there.
        return Problem(self.n, self._width(layer), self.clusters, self.dtype, self.device, False, self.n_init)

    def _needs(self, layer: Layer, resident: bool = True) -> tuple[int, int]:
        """Bytes beside the rows that clustering takes at least, and what it takes at ease."""
        problem = self._problem(layer)
        primal, dual = primal_needs(problem, self.n), dual_needs(problem, self.n)
        needs = {"primal": [primal], "dual": [dual], "auto": [primal, dual]}[self.solver]
        view = geometry_bytes(
            self.n, self._width(layer), self.clusters, self.dtype.itemsize, resident=resident, device=self.device.type
        )
        # More than the rows take is not what a solver is given, as long as there is another.
        able = [one for one in needs if one.least <= self._rows(layer)] or needs[:1]
        ease = max(one.fixed + self.n_init * one.restart + one.work for one in able)
        # What may be kept to save time, as far as it is of use: an image of the rows, distances of draws.
        spare = max(default_limit(problem, self.n, one) for one in able) - ease
        ease += max(0, min(spare, 16 * self.n * (self._width(layer) + 4 * self.n_init)))
        least = max(view, min(one.least for one in needs))
        return least, max(least, ease)

    def _solve(self, layer: Layer, limit: int, resident: bool, pass_s: float) -> tuple[str, float, int]:
        """Solver, seconds and passes of k-means within a limit."""
        made: SolverPlan = plan_solver(
            self._problem(layer), limit, resident=resident, pass_s=pass_s, asked=self.solver == "dual"
        )
        name, _ = made.choose(self.solver)
        seconds, passes = (made.dual_s, made.dual_passes) if name == "dual" else (made.primal_s, made.primal_passes)
        if resident:
            return name, seconds, 0
        view = geometry_passes(
            self.n, self._width(layer), self.clusters, self.dtype.itemsize, limit, device=self.device.type
        )
        return name, seconds + view * pass_s, passes + view

    # ---- ways

    def _resident(self, layer: Layer, left: int) -> int | None:
        """What is left for k-means beside the layer's rows on the device; None where that is too little."""
        beside = left - self._rows(layer)
        least, _ = self._needs(layer)
        return beside if beside >= max(least, self.forward.peak_bytes) else None

    def _step(self, group: Sequence[Layer], left: int, index: int, decode_s: float, rows: dict[str, LayerPlan]) -> Step:
        """A pass that keeps a group of layers on the device, the narrow ones first."""
        alive = sum(map(self._rows, group))
        peak = alive + self.forward.peak_bytes
        for layer in group:
            least, ease = self._needs(layer)
            limit = min(ease, left - alive)
            name, seconds, _ = self._solve(layer, limit, True, 0.0)
            rows[layer.name] = self._layer(layer, "device", index, name, limit, least, 0, seconds)
            peak = max(peak, alive + limit)
            alive -= self._rows(layer)
        capture_s = max(decode_s, *map(self._reach_s, group))
        return Step(tuple(layer.name for layer in group), "device", capture_s, peak)

    def _streamed(self, layer: Layer, left: int, index: int, decode_s: float, rows: dict[str, LayerPlan]) -> Step:
        """A layer whose rows do not fit on the device: the fastest of the ways that there are."""
        # While rows are computed anew, a forward pass goes on beside k-means, or a batch's activations and rows wait.
        size, batch = self._rows(layer), self.forward.batch_size * self._width(layer) * (4 + self.dtype.itemsize % 4)
        held = max(self.forward.peak_bytes, batch)
        reach_s = max(decode_s, self._reach_s(layer))
        ways: list[tuple[str, float, float, int]] = [("recompute", 0.0, reach_s, left - held)]
        if size <= self.room.host_bytes * _HOST_SHARE:
            ways.append(("host", reach_s + size / COPY_RATE, size / COPY_RATE, left))
        if size <= self.room.disk_bytes:
            ways.append(("disk", reach_s + size / DISK_RATE, size / DISK_RATE, left))
        least, _ = self._needs(layer, resident=False)
        found: list[tuple[float, LayerPlan, Step]] = []
        for place, capture_s, pass_s, limit in ways:
            if limit < least or left < self.forward.peak_bytes:
                continue
            # Streamed rows are read fewer times the more of them can be held.
            name, seconds, passes = self._solve(layer, limit, False, pass_s)
            plan = self._layer(layer, place, index, name, limit, least, passes, seconds)
            peak = held + limit if place == "recompute" else max(limit, self.forward.peak_bytes)
            found.append((capture_s + seconds, plan, Step((layer.name,), place, capture_s, peak)))
        if not found:
            beside = max((limit for *_, limit in ways), default=0)
            short = max(least - beside, self.forward.peak_bytes - left)
            rows[layer.name] = replace(
                self._layer(layer, "recompute", index, self.solver, 0, least, 0, 0.0), short_bytes=short
            )
            return Step((layer.name,), "recompute", 0.0, self.forward.peak_bytes)
        _, rows[layer.name], step = min(found, key=lambda way: way[0])
        return step

    def _layer(
        self, layer: Layer, place: str, step: int, solver: str, limit: int, least: int, passes: int, seconds: float
    ) -> LayerPlan:
        return LayerPlan(
            layer.name,
            layer.module,
            self._width(layer),
            self._rows(layer),
            place,
            step,
            solver,
            limit,
            least,
            passes,
            seconds,
        )


def _exactly(size: int) -> str:
    return f"{show_bytes(size)} ({size:,} bytes)"
