"""Capture: carries out the steps of a plan, each of which gives the rows of some layers, ready to be clustered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpuclust.capture.layers import Layer
from gpuclust.capture.layout import in_memory_order
from gpuclust.capture.memory import LayerPlan, MemoryPlan, Step
from gpuclust.capture.passes import Passes
from gpuclust.capture.places import Spill, pinned, read_back
from gpuclust.capture.projection import Distortion
from gpuclust.capture.recompute import Recomputed
from gpuclust.capture.reduce import Reduction
from gpuclust.capture.store import LayerStore

Watch = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class LayerRows:
    """The rows of one layer: a chunk source, what they are multiplied with, how they came and what was kept."""

    layer: Layer
    plan: LayerPlan
    source: Any
    scale: float
    capture_s: float
    how: str
    reduction: str


class Capture:
    """The rows of the layers of a run, step by step.

    Parameters
    ----------
    passes : Passes
    dtype : torch.dtype
        Of the rows.
    reductions : mapping of str to Reduction
        What is kept of the activations of each layer, by its name.
    thumbs : Callable
        Makes an empty sequence that can be extended, for the images' thumbnails.
    spill : str or None
        Folder for rows that go to disk.

    Attributes
    ----------
    kept : bool or None
        Whether the images are kept on the device; None before the first pass.
    """

    def __init__(
        self,
        passes: Passes,
        dtype: torch.dtype,
        reductions: Mapping[str, Reduction],
        thumbs: Callable[[], Any],
        spill: str | None = None,
    ) -> None:
        self.passes, self.dtype, self.reductions, self.spill = passes, dtype, reductions, spill
        self._new_thumbs = thumbs
        self.kept: bool | None = None
        self._labels: list[np.ndarray] = []
        self._paths: list[str] = []
        self._thumbs: Any = ()
        self._plan: MemoryPlan | None = None
        self._distortions: dict[str, Distortion] = {}

    def begin(self, plan: MemoryPlan) -> None:
        """The steps that follow are those of this plan."""
        self._plan = plan
        if self.kept is None:
            self.passes.pixels.keep = plan.pixels_bytes > 0
        elif self.kept and not plan.pixels_bytes:
            self.passes.pixels.drop()
            self.kept = False

    def seen(self) -> tuple[tuple[str, ...], np.ndarray, Sequence[bytes]]:
        """Of the images, in the order of the rows, after the first pass: paths, labels int64 (n,), thumbnails."""
        return tuple(self._paths), np.concatenate(self._labels), self._thumbs

    def rows(self, step: Step, layers: Sequence[Layer], watch: Watch) -> Iterator[LayerRows]:
        """The rows of each layer of a step, the narrow ones first. Those of one are given back when the next comes.

        ``watch(batches, n)`` sees the batches of a pass over n images go by.
        """
        assert self._plan is not None
        by_name = {layer.name: layer for layer in layers if layer.name in step.layers}
        if step.place == "recompute":
            if self.kept is None:
                self._pass([], {}, watch)
            for name in step.layers:
                yield self._recomputed(by_name[name], self._plan)
            return
        started, wanted = time.perf_counter(), list(by_name.values())
        sketched = [
            name
            for name, layer in by_name.items()
            if self.reductions[name].kind == "sketch" and self.reductions[name].changes(layer.shape)
        ]
        self._distortions = {name: Distortion() for name in sketched}
        files = {name: Spill(self.spill) for name in by_name} if step.place == "disk" and self.spill else {}
        stores = {name: self._store(layer, step.place, files.get(name)) for name, layer in by_name.items()}
        self._pass(wanted, stores, watch, files)
        for store in stores.values():
            store.finish()
        seconds, width = time.perf_counter() - started, sum(store.shape[1] for store in stores.values())
        for name in step.layers:
            row, store = self._plan.row(name), stores.pop(name)
            source: Any = store
            if step.place != "device":
                file = files[name].file if name in files else None
                source = read_back(store, self.passes.pixels.device, row.work_bytes, file)
            how = {"host": "in page-locked host memory", "disk": "in a file"}.get(step.place, "")
            share = seconds * store.shape[1] / width
            layer = by_name[name]
            yield LayerRows(layer, row, source, store.scale, share, how, self.reduction(layer))
            del store, source

    def _store(self, layer: Layer, place: str, file: Spill | None) -> LayerStore:
        d, device = self.reductions[layer.name].values(layer.shape), self.passes.pixels.device
        n = self.passes.pixels.n or self.passes.pixels.images.n
        return LayerStore(
            n, d, self.dtype, device, name=layer.name, place=file or (pinned if place == "host" else None)
        )

    def _pass(
        self,
        layers: Sequence[Layer],
        stores: Mapping[str, LayerStore],
        watch: Watch,
        files: Mapping[str, Spill] | None = None,
    ) -> None:
        """One pass over the images that fills the stores; the first one keeps what is known of the images."""

        device = self.passes.pixels.device
        assert self._plan is not None
        reduce = {layer.name: self.reductions[layer.name].on(layer.shape, device) for layer in layers}
        last = self._plan.forward.channels_last

        def write(layer: Layer, _: int, activation: Tensor) -> None:
            reduced = reduce[layer.name](activation)
            if layer.name in self._distortions:
                self._distortions[layer.name].see(activation, reduced)
            stores[layer.name].append(in_memory_order(reduced, layer.name in last))
            if files and (file := files[layer.name].file):
                file.release()

        if self.kept is not None:
            with closing(self.passes.again(layers, write)) as numbers:
                for _ in watch(numbers, self.passes.pixels.n):
                    pass
            return
        self._labels, self._paths, self._thumbs = [], [], self._new_thumbs()
        with closing(self.passes.first(layers, write)) as batches:
            for batch in watch(batches, self.passes.pixels.images.n):
                self._labels.append(batch.labels)
                self._paths += batch.paths
                self._thumbs.extend(batch.thumbs)
        self.kept = self.passes.pixels.keep

    def reduction(self, layer: Layer) -> str:
        """What a report says of what is kept of a layer's activations; "" where that is all of them."""
        reduction, seen = self.reductions[layer.name], self._distortions.get(layer.name)
        if reduction.kind == "none":
            return ""
        return reduction.describe(layer.shape) + (f"; {seen.describe()}" if seen else "")

    def _recomputed(self, layer: Layer, plan: MemoryPlan) -> LayerRows:
        started = time.perf_counter()
        forward = plan.forward
        source = Recomputed(
            self.passes,
            layer,
            self.dtype,
            self.reductions[layer.name],
            forward.pass_s(plan.n, layer.name),
            channels_last=layer.name in forward.channels_last,
        )
        how = "computed anew in each pass of k-means, since they do not fit the memory"
        row, seconds = plan.row(layer.name), time.perf_counter() - started
        return LayerRows(layer, row, source, source.scale, seconds, how, self.reduction(layer))
