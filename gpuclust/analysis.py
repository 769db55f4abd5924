"""The main path: images -> activations of every layer -> clusters -> clusters against classes -> report.

`analyze` is the whole of it; each step is one call into the room that does it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from gpuclust import doctor
from gpuclust.capture.images import ImageSource
from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.capture.memory import MemoryPlan
from gpuclust.capture.models import load_network
from gpuclust.capture.store import LayerStore
from gpuclust.capture.stream import ActivationStream
from gpuclust.cluster import KMeans
from gpuclust.compare.result import LayerResult
from gpuclust.compare.scores import chance_levels, compare
from gpuclust.compare.similarity import geometry
from gpuclust.errors import InputError
from gpuclust.progress import Progress
from gpuclust.report import Report, Samples
from gpuclust.report.folder import RunFolder
from gpuclust.setup import Setup, find_images, in_memory, peak_bytes, prepare, read_options, start_peak


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
        A torchvision name, ``timm:NAME``, ``package.module:callable``, any nn.Module, or (nn.Module, transform).
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
        If the run does not fit, before any image is decoded.
    UnavailableError
        If a device, backend or published weights cannot be had here.
    """
    started = time.perf_counter()
    settings = read_options(options)
    images = find_images(data, settings)
    network = load_network(model, settings.weights, seed=settings.seed)
    with in_memory(), prepare(network, images, settings) as setup, Progress(progress) as bar:
        setup.plan.require()
        folder = RunFolder(out, setup.identity(images) if out else {}, resume=resume, force=force)
        layers, done, samples = setup.layers, folder.results(len(setup.layers)), folder.samples()
        missing = [layer for i, layer in enumerate(layers) if i not in done]
        if missing or samples is None:
            samples, stores, capture_s = capture(setup, images, missing, bar)
            folder.keep_samples(samples, images.describe())
        values = sum(layer.values for layer in missing)
        for i, layer in enumerate(layers):
            if i not in done:
                bar.layer(layer.name, i, len(layers))
                done[i] = study(setup, layer, stores.pop(layer.name), samples, capture_s * layer.values / values)
                folder.keep_result(i, done[i])
    results = [done[i] for i in range(len(layers))]
    sizes = np.bincount(samples.labels, minlength=len(samples.classes))
    chance = chance_levels(sizes, setup.clusters, seed=settings.seed)
    run = {
        "options": {"model": network.name, "data": images.describe()["data"], **asdict(settings)},
        "network": {"name": network.name, "weights": network.weights, "notes": network.notes},
        "images": folder.images() or images.describe(),
        "plan": setup.plan.describe(),
        "hardware": doctor.hardware(str(setup.device)),
        "versions": doctor.versions(),
        "times": {
            "capture_s": sum(result.capture_s for result in results),
            "cluster_s": sum(result.cluster_s for result in results),
            "total_s": time.perf_counter() - started,
        },
    }
    report = Report(results, samples, chance, run)
    if out:
        report.save(out)
    return report


def plan(model: Any, data: Any, **options: Any) -> MemoryPlan:
    """The bytes that `analyze` with the same arguments would hold, layer by layer; ``print`` it.

    Published weights are not downloaded for it, and one image is decoded.
    """
    settings = read_options(options)
    images = find_images(data, settings)
    network = load_network(model, _without_download(model), seed=settings.seed)
    with in_memory(), prepare(network, images, settings) as setup:
        return setup.plan


def capture(
    setup: Setup, images: ImageSource, layers: Sequence[Layer], bar: Progress
) -> tuple[Samples, dict[str, LayerStore], float]:
    """One pass over the images: the samples, the rows of each layer by name, and the seconds it took.

    The rows are written where they stay, on the device, batch by batch.
    """
    started = time.perf_counter()
    stores = {
        layer.name: LayerStore(images.n, layer.values, setup.dtype, setup.device, name=layer.name) for layer in layers
    }
    labels, paths, thumbs = [], list[str](), list[bytes]()
    with ActivationStream(setup.network.module, layers) as stream:
        for batch in bar.images(
            images.batches(setup.network.transform, setup.batch_size, setup.settings.workers), images.n
        ):
            if layers:
                pixels = batch.images.to(setup.device, setup.input_dtype, non_blocking=True)
                stream.forward(pixels, lambda layer, activation: stores[layer.name].append(activation))
            labels.append(batch.labels)
            paths += batch.paths
            thumbs += batch.thumbs
    for store in stores.values():
        store.finish()
    return (
        Samples(tuple(paths), np.concatenate(labels), images.classes, tuple(thumbs)),
        stores,
        time.perf_counter() - started,
    )


def study(setup: Setup, layer: Layer, store: LayerStore, samples: Samples, capture_s: float) -> LayerResult:
    """Cluster one layer's rows and compare the clusters with the classes; results in the units of the activations."""
    started = time.perf_counter()
    settings, k = setup.settings, setup.clusters
    start_peak(setup.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = (
            KMeans(
                k,
                n_init=settings.n_init,
                max_iter=settings.max_iter,
                random_state=settings.seed,
                precision=settings.precision,
                solver=settings.solver,
                backend=settings.backend,
                memory_limit=setup.plan.work_bytes,
            )
            .fit(store)
            .fit_report_
        )
    cluster_s = time.perf_counter() - started
    table, match, scores = compare(fit.labels.cpu().numpy(), samples.labels, k, len(samples.classes))
    view = geometry(store.rows, fit.labels, k, seed=settings.seed)
    notes = {
        "silhouette_n": view.silhouette_n,
        **({"scale": store.scale} if store.scale != 1.0 else {}),
        **({"warnings": sorted({str(item.message) for item in caught})} if caught else {}),
    }
    return LayerResult(
        layer=layer.name,
        module=layer.module,
        kind=layer.kind,
        shape=layer.shape,
        n=store.shape[0],
        d=store.shape[1],
        k=k,
        labels=fit.labels.cpu().numpy(),
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
        peak_bytes=peak_bytes(setup.device),
        notes=notes,
    )


def list_layers(
    model: Any, weights: str | None = None, patterns: Sequence[str] = ("all",), shape: tuple[int, ...] | None = None
) -> list[Layer]:
    """The layers of a network, in forward order, that any of the patterns asks for.

    Parameters
    ----------
    model
        As in `analyze`.
    weights : str, optional
        As in `analyze`; by default random ones, or those that a module or callable brings.
    patterns : sequence of str
        ``auto``, ``all``, names, globs.
    shape : tuple of int, optional
        Of one image, (c, h, w); by default the network's own, else 3 x 224 x 224.
    """
    network = load_network(model, weights or _without_download(model))
    channels = shape or network.input_shape or (3, 224, 224)
    try:
        found = find_layers(network.module, torch.zeros(1, *channels))
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        size = "x".join(map(str, channels))
        raise InputError(
            f"{network.name} does not take an image of {size}: give its shape with --input "
            f"({str(error).splitlines()[0]})"
        ) from error
    return choose_layers(found, patterns)


def _without_download(model: Any) -> str:
    """Weights that need no network: a module or callable brings its own."""
    return "none" if isinstance(model, str) and (":" not in model or model.startswith("timm:")) else "DEFAULT"
