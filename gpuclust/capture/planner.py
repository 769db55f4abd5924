"""How a `MemoryPlan` is made: every layer gets a place, every pass its layers, so that all of it takes the least time.

A layer's rows stay on the device if they fit there beside a forward pass and the least that k-means takes. Layers that
fit one by one but not together are packed into several passes over the images. A layer that does not fit alone is
"recomputed": whenever k-means reads its rows, the images pass through the network once more, up to that layer; or its
rows wait in page-locked host memory or on disk, where that is predicted to be faster and is allowed. In a pass the
narrow layers are clustered first, so that the widest has the most room. None of this changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gpuclust.capture.layers import Layer
from gpuclust.capture.memory import Forward, LayerPlan, MemoryPlan, Room, Step
from gpuclust.capture.packing import Item, pack
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.memory import default_limit, dual_needs, primal_needs
from gpuclust.cluster.solver import Plan as SolverPlan
from gpuclust.cluster.solver import plan as plan_solver
from gpuclust.compare.workspace import geometry_bytes, geometry_passes

# Bytes per second to page-locked host memory and back, and to and from a disk.
COPY_RATE, DISK_RATE = 20e9, 0.5e9
# Of free host memory, rows may take this share.
_HOST_SHARE = 0.5


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
    reduce_bytes: Mapping[str, int] | None = None,
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
    reduce_bytes
        What making these of a batch of activations takes, by the layer's name.
    kept
        Of a run that has seen its images, whether they are kept on the device; by default what is better.
    """
    maker = _Maker(
        layers,
        n,
        dtype,
        device,
        clusters,
        n_init,
        forward,
        module_bytes,
        room,
        solver,
        widths or {},
        reduce_bytes or {},
        kept is not None,
    )
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
    reduce_bytes: Mapping[str, int]
    seen: bool

    def plan(self, keeps: bool) -> MemoryPlan:
        """The best plan with the images kept on the device, or decoded in each pass."""
        pixels = self.n * self.forward.pixel_bytes if keeps else 0
        left = self.room.budget_bytes - self.module_bytes - self.room.reserve_bytes - pixels
        decode_s = 0.0 if keeps else self.n * self.forward.decode_s
        alone = {layer.name: self._resident(layer, left) for layer in self.layers}
        fitting = [layer for layer in self.layers if alone[layer.name] is not None]
        rows: dict[str, LayerPlan] = {}
        steps: list[Step] = []
        items = [
            Item(layer.name, self._rows(layer), self._needs(layer)[0], self._both(decode_s, self._reach_s(layer)))
            for layer in fitting
        ]
        for names in pack(items, left, self._forward_bytes):
            group = sorted((layer for layer in fitting if layer.name in names), key=self._width)
            steps.append(self._step(group, left, len(steps), decode_s, rows))
        for layer in self.layers:
            if layer.name not in rows:
                steps.append(self._streamed(layer, left, len(steps), decode_s, rows))
        first = steps[0]
        if not self.seen and (keeps or first.place == "recompute"):
            # The first pass of a run decodes, whatever comes of it; one in which rows are captured counts it already.
            steps[0] = replace(first, capture_s=self._both(self.n * self.forward.decode_s, first.capture_s))
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

    def _both(self, decode_s: float, forward_s: float) -> float:
        """Seconds of decoding and of the network together: one goes on beside the other, but for a CPU's cores."""
        return decode_s + forward_s if self.device.type == "cpu" else max(decode_s, forward_s)

    def _problem(self, layer: Layer) -> Problem:
        # Only the kind of the device counts here, so that a plan can be made for one that is not there.
        return Problem(self.n, self._width(layer), self.clusters, self.dtype, self.device, False, self.n_init)

    def _needs(self, layer: Layer, resident: bool = True) -> tuple[int, int]:
        """Bytes beside the rows that clustering takes at least, and what it takes at ease."""
        problem = self._problem(layer)
        primal, dual = primal_needs(problem, self.n), dual_needs(problem, self.n, resident=resident)
        needs = {"primal": [primal], "dual": [dual], "auto": [primal, dual]}[self.solver]
        if self.solver == "auto" and self._width(layer) < 4 * self.n:  # nor does `cluster.solver` take it then
            needs = [primal]
        # More than the rows take is not what a solver is given, as long as there is another.
        able = [one for one in needs if one.least <= self._rows(layer)] or needs[:1]
        ease = max(one.fixed + self.n_init * one.restart + one.work for one in able)
        # What may be kept to save time, as far as it is of use: an image of the rows, distances of draws.
        spare = max(default_limit(problem, self.n, one) for one in able) - ease
        ease += max(0, min(spare, 16 * self.n * (self._width(layer) + 4 * self.n_init)))
        least = max(self._view_bytes(layer, resident), min(one.least for one in needs))
        return least, max(least, ease)

    def _solve(self, layer: Layer, limit: int, resident: bool, pass_s: float) -> tuple[str, float, int, int]:
        """Solver, seconds, passes and bytes of k-means within a limit."""
        made: SolverPlan = plan_solver(
            self._problem(layer), limit, resident=resident, pass_s=pass_s, asked=self.solver == "dual"
        )
        name, _ = made.choose(self.solver)
        dual = name == "dual"
        seconds, passes = (made.dual_s, made.dual_passes) if dual else (made.primal_s, made.primal_passes)
        if not resident:  # wider pieces of the rows save passes, as far as the limit goes
            view = geometry_passes(
                self.n, self._width(layer), self.clusters, self.dtype.itemsize, limit, device=self.device.type
            )
            return name, seconds + view * pass_s, passes + view, limit
        peak = max(made.dual_bytes if dual else made.primal_bytes, self._view_bytes(layer, resident))
        return name, seconds, 0, min(peak, limit)

    def _view_bytes(self, layer: Layer, resident: bool) -> int:
        """What comparing the clusters takes."""
        return geometry_bytes(
            self.n, self._width(layer), self.clusters, self.dtype.itemsize, resident=resident, device=self.device.type
        )

    def _forward_bytes(self, names: Sequence[str]) -> int:
        """Of a forward pass that captures these layers, and ends there."""
        return self.forward.peak_to(names) + sum(self.reduce_bytes.get(name, 0) for name in names)

    # ---- ways

    def _resident(self, layer: Layer, left: int) -> int | None:
        """What is left for k-means beside the layer's rows on the device; None where that is too little."""
        beside = left - self._rows(layer)
        least, _ = self._needs(layer)
        return beside if beside >= max(least, self._forward_bytes([layer.name])) else None

    def _step(self, group: Sequence[Layer], left: int, index: int, decode_s: float, rows: dict[str, LayerPlan]) -> Step:
        """A pass that keeps a group of layers on the device, the narrow ones first."""
        alive = sum(map(self._rows, group))
        peak = alive + self._forward_bytes([layer.name for layer in group])
        for layer in group:
            least, ease = self._needs(layer)
            limit = min(ease, left - alive)
            name, seconds, _, taken = self._solve(layer, limit, True, 0.0)
            rows[layer.name] = self._layer(layer, "device", index, name, limit, least, taken, 0, seconds)
            peak = max(peak, alive + taken)
            alive -= self._rows(layer)
        capture_s = self._both(decode_s, max(map(self._reach_s, group)))
        return Step(tuple(layer.name for layer in group), "device", capture_s, peak)

    def _streamed(self, layer: Layer, left: int, index: int, decode_s: float, rows: dict[str, LayerPlan]) -> Step:
        """A layer whose rows do not fit on the device: the fastest of the ways that there are."""
        # While rows are computed anew, a forward pass goes on beside k-means, or a batch's activations become rows.
        size, forward_bytes = self._rows(layer), self._forward_bytes([layer.name])
        batch = self.forward.batch_size * (4 * layer.values + self._width(layer) * self.dtype.itemsize)
        held = max(forward_bytes, batch + self.forward.input_bytes)
        reach_s = self._both(decode_s, self._reach_s(layer))
        ways: list[tuple[str, float, float, int]] = [("recompute", 0.0, reach_s, left - held)]
        if _locked_bytes(size) <= self.room.host_bytes * _HOST_SHARE:
            ways.append(("host", reach_s + size / COPY_RATE, size / COPY_RATE, left))
        if size <= self.room.disk_bytes:
            ways.append(("disk", reach_s + size / DISK_RATE, size / DISK_RATE, left))
        least, _ = self._needs(layer, resident=False)
        found: list[tuple[float, LayerPlan, Step]] = []
        for place, capture_s, pass_s, limit in ways:
            if limit < least or left < forward_bytes:
                continue
            # Streamed rows are read fewer times the more of them can be held.
            name, seconds, passes, taken = self._solve(layer, limit, False, pass_s)
            if place == "recompute" and self.dtype == torch.float16:  # a pass finds the scale
                seconds, passes = seconds + pass_s, passes + 1
            plan = self._layer(layer, place, index, name, limit, least, taken, passes, seconds)
            peak = held + limit if place == "recompute" else max(limit, forward_bytes)
            found.append((capture_s + seconds, plan, Step((layer.name,), place, capture_s, peak)))
        if not found:
            beside = max((limit for *_, limit in ways), default=0)
            short = max(least - beside, forward_bytes - left)
            few = replace(self, layers=[layer], n=self.clusters, forward=self.forward.of(self.clusters))
            rows[layer.name] = replace(
                self._layer(layer, "recompute", index, self.solver, 0, least, 0, 0, 0.0),
                short_bytes=short,
                fewer_fit=self.n > few.n and few.plan(False).fits,
            )
            return Step((layer.name,), "recompute", 0.0, forward_bytes)
        _, rows[layer.name], step = min(found, key=lambda way: way[0])
        return step

    def _layer(
        self,
        layer: Layer,
        place: str,
        step: int,
        solver: str,
        limit: int,
        least: int,
        peak: int,
        passes: int,
        seconds: float,
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
            peak,
            passes,
            seconds,
        )


def _locked_bytes(size: int) -> int:
    """What torch locks for a tensor in page-locked memory: the next power of two."""
    return 1 << (size - 1).bit_length()
