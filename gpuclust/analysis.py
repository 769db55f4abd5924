"""The main path: images -> activations of every layer -> clusters -> clusters against classes -> report.

`analyze` is the whole of it; each step is one call into the room that does it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from gpuclust.arithmetic import seeded
from gpuclust.capture.layers import Layer, choose_layers
from gpuclust.capture.memory import MemoryPlan
from gpuclust.capture.models import load_network
from gpuclust.capture.store import LayerStore
from gpuclust.capture.stream import ActivationStream
from gpuclust.compare.result import LayerResult
from gpuclust.compare.scores import chance_levels, compare
from gpuclust.compare.similarity import geometry
from gpuclust.config import read_options
from gpuclust.errors import InputError, users_code
from gpuclust.prepare import Setup, find_images, find_in, find_network, in_memory, peak_bytes, prepare, start_peak
from gpuclust.progress import Progress
from gpuclust.report import Report, Samples
from gpuclust.report.folder import RunFolder
from gpuclust.report.thumbs import Thumbs


def analyze(
    model: Any,
    data: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    **options: Any,
) -> Report:
    """What each layer of a network has learned: cluster its activations and compare the clusters with the classes.

    Parameters
    ----------
    model
        A torchvision name, ``timm:NAME``, ``package.module:callable``, any nn.Module, or (nn.Module, transform). Where
        no transform comes with it, pictures get the one that is usual for ImageNet, and the report says so.
        A module comes back as it was: mode, device, hooks.
    data
        A folder of class folders, a manifest .csv, ``torchvision:NAME:ROOT``, ``package.module:callable``, or a torch
        Dataset or DataLoader of (image, label).
    out : path, optional
        Folder of the run: each layer's result is kept there as it is done, the report at the end. Nothing is written
        without it.
    resume, force : bool
        What to do where ``out`` holds a run: go on with it, or remove it and start over.
    progress : bool
        Whether to show a bar where standard error is a terminal.
    **options
        The fields of `gpuclust.config.Options`, as in ``gpuclust run --help``: ``layers``, ``clusters``,
        ``per_class``, ``device``, ``dtype``, ``seed`` and so on.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        For anything that cannot be used as given.
    MemoryLimitError
        If the run does not fit, before the pass over the images.
    UnavailableError
        If a device, backend or published weights cannot be had here.
    """
    started = time.perf_counter()
    settings = read_options(options)
    folder = RunFolder(out, resume=resume, force=force)
    images = find_images(data, settings)
    network = find_network(model, images, settings)
    with in_memory(), prepare(network, images, settings) as setup, Progress(progress) as bar:
        setup.require_kmeans()
        identity = setup.identity() if out else {}
        layers, done = setup.layers, folder.results(identity, len(setup.layers))
        missing = [layer for i, layer in enumerate(layers) if i not in done]
        if missing:
            setup.plan(missing).require()
            folder.begin(identity)
            samples, stores, capture_s = capture(setup, missing, bar, folder.thumbs())
            folder.keep_samples(samples, images.describe())
        values = sum(layer.values for layer in missing)
        for i, layer in enumerate(layers):
            if i not in done:
                bar.layer(layer.name, i, len(layers))
                done[i] = study(setup, layer, stores.pop(layer.name), samples, capture_s * layer.values / values)
                folder.keep_result(i, done[i])
    assert folder.samples is not None
    assert folder.images is not None
    sizes = np.bincount(folder.samples.labels, minlength=len(images.classes))
    report = Report(
        [done[i] for i in range(len(layers))],
        folder.samples,
        chance_levels(sizes, setup.clusters, seed=settings.seed),
        {**setup.describe(model, data), "images": folder.images},
    )
    report.run["times"] = {
        "capture_s": sum(result.capture_s for result in report.results),
        "cluster_s": sum(result.cluster_s for result in report.results),
        "total_s": time.perf_counter() - started,
    }
    folder.finish(report)
    return report


def plan(model: Any, data: Any, **options: Any) -> MemoryPlan:
    """The bytes that `analyze` with the same arguments would hold, layer by layer; ``print`` it.

    Published weights are not downloaded for it, and few images are decoded.
    """
    settings = read_options(options)
    images = find_images(data, settings)
    network = find_network(model, images, settings, download=False)
    with in_memory(), prepare(network, images, settings) as setup:
        return setup.plan(setup.layers)


def capture(
    setup: Setup, layers: Sequence[Layer], bar: Progress, thumbs: Thumbs
) -> tuple[Samples, dict[str, LayerStore], float]:
    """One pass over the images: the samples, the rows of each layer by name, and the seconds it took.

    The rows are written where they stay, on the device, batch by batch; the thumbnails into `thumbs`.
    """
    started = time.perf_counter()
    images, network = setup.images, setup.network
    stores = {
        layer.name: LayerStore(images.n, layer.values, setup.dtype, setup.device, name=layer.name) for layer in layers
    }
    labels, paths = [], list[str]()
    batches = images.batches(network.transform, setup.batch_size, setup.settings.workers)
    with ActivationStream(network.module, layers) as stream, closing(bar.images(batches, images.n)) as counted:
        for index, batch in enumerate(counted):
            if layers:
                pixels = batch.images.to(setup.device, setup.input_dtype)
                # Seeded for a network that draws random numbers.
                with users_code(f"{network.name} on {len(batch)} images raised"), seeded(setup.settings.seed + index):
                    stream.forward(pixels, lambda layer, activation: stores[layer.name].append(activation))
            labels.append(batch.labels)
            paths += batch.paths
            thumbs.extend(batch.thumbs)
    for store in stores.values():
        store.finish()
    return (
        Samples(tuple(paths), np.concatenate(labels), images.classes, thumbs),
        stores,
        time.perf_counter() - started,
    )


def study(setup: Setup, layer: Layer, store: LayerStore, samples: Samples, capture_s: float) -> LayerResult:
    """Cluster one layer's rows and compare the clusters with the classes; results in the units of the activations."""
    n, k, classes = len(samples.paths), setup.clusters, len(samples.classes)
    if k > n:
        raise InputError(f"{k} clusters were asked for, and {n} images could be read: ask for at most that many")
    plan = setup.plan([layer])
    start_peak(setup.device)
    started = time.perf_counter()
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: a note of the layer says so below.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        fit = setup.kmeans(k, plan.work_bytes).fit(store).fit_report_
    cluster_s, peak = time.perf_counter() - started, peak_bytes(setup.device)
    labels = fit.labels.cpu().numpy()
    table, match, scores = compare(labels, samples.labels, k, classes)
    view = geometry(store.rows, fit.labels, k, seed=setup.settings.seed)
    notes: dict[str, Any] = {}
    if view.silhouette_n < n:
        notes["silhouette"] = f"of a seeded sample of {view.silhouette_n:,} images"
    if store.scale != 1.0:
        notes["scale"] = f"rows are stored times {store.scale:g}; all numbers are of the activations themselves"
    if fit.notes:
        notes["k-means"] = "; ".join(fit.notes)
    if (found := len(np.unique(labels))) < k:
        notes["clusters"] = f"{found} of {k} hold images: there are not more distinct activations"
    return LayerResult(
        layer=layer.name,
        module=layer.module,
        kind=layer.kind,
        shape=layer.shape,
        n=n,
        d=layer.values,
        k=k,
        labels=labels,
        dist2=fit.dist2.cpu().numpy() / store.scale**2,
        table=table,
        match=match,
        projection=view.projection / np.float32(store.scale),
        explained=view.explained,
        scores={**scores, "silhouette": view.silhouette},
        inertia=fit.inertia / store.scale**2,
        n_iter=fit.n_iter,
        backend=fit.backend,
        solver=fit.solver,
        precision=fit.precision,
        rejected=fit.rejected,
        recheck_share=fit.recheck_share,
        capture_s=capture_s,
        cluster_s=cluster_s,
        peak_bytes=peak,
        notes=notes,
    )


def list_layers(
    model: Any, weights: str = "DEFAULT", patterns: Sequence[str] = ("all",), shape: tuple[int, ...] | None = None
) -> list[Layer]:
    """The layers of a network, in forward order, that any of the patterns asks for.

    Parameters
    ----------
    model
        As in `analyze`.
    weights : str
        As in `analyze`; published ones are not downloaded.
    patterns : sequence of str
        ``auto``, ``all``, names, globs.
    shape : tuple of int, optional
        Of one image, (c, h, w); by default the network's own, else 3 x 224 x 224.
    """
    network = load_network(model, weights, download=False)
    found = find_in(network, torch.zeros(1, *(shape or network.input_shape or (3, 224, 224))))
    return choose_layers(found, patterns)
