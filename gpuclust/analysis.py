"""The main path: images -> activations of every layer -> clusters -> clusters against classes -> report.

`analyze` is the whole of it; each step is one call into the room that does it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gpuclust.capture.images import ImageSource
from gpuclust.capture.layers import Layer, choose_layers
from gpuclust.capture.memory import MemoryPlan
from gpuclust.capture.models import load_network
from gpuclust.capture.steps import LayerRows
from gpuclust.cluster.sources.base import WatchedSource
from gpuclust.compare.result import LayerResult
from gpuclust.compare.scores import chance_levels, compare
from gpuclust.compare.similarity import geometry
from gpuclust.config import parse_bytes, read_options, show_bytes
from gpuclust.energy import Energy
from gpuclust.errors import InputError, first_line, is_out_of_memory
from gpuclust.free import give_back
from gpuclust.libraries import load_libraries, touch_code
from gpuclust.peak import peak_bytes, start_peak
from gpuclust.prepare import (
    Imagined,
    Setup,
    find_images,
    find_in,
    find_network,
    in_memory,
    prepare,
)
from gpuclust.profile import named, profiled
from gpuclust.progress import Progress
from gpuclust.report import Report, Samples
from gpuclust.report.folder import RunFolder


def analyze(
    model: Any,
    data: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    profile: str | os.PathLike[str] | None = None,
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
    profile : path, optional
        File for torch's trace of the run (.json or .json.gz): the first of each kind of step (`gpuclust.profile`).
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
    with RunFolder(out, resume=resume, force=force) as folder:
        images = find_images(data, settings)
        load_libraries()
        touch_code()
        network = find_network(model, images, settings)
        with in_memory(), prepare(network, images, settings) as setup, profiled(profile, setup.device):
            with Progress(progress) as bar:
                energy = Energy(setup.device)
                setup.require_kmeans()
                identity = setup.identity() if out else {}
                layers, done = setup.layers, folder.results(identity, len(setup.layers))
                missing = [layer for i, layer in enumerate(layers) if i not in done]
                if missing:
                    setup.plan(missing).require()
                    folder.begin(identity)
                for i, result in cluster_layers(setup, missing, folder, bar):
                    done[i] = result
                    folder.keep_result(i, result)
            assert folder.samples is not None
            assert folder.images is not None
            sizes = np.bincount(folder.samples.labels, minlength=len(images.classes))
            report = Report(
                [done[i] for i in range(len(layers))],
                folder.samples,
                chance_levels(sizes, setup.clusters, seed=settings.seed),
                {**setup.describe(model, data), "images": folder.images},
            )
            report.run["energy"] = energy.describe()
            report.run["times"] = {
                "capture_s": sum(result.capture_s for result in report.results),
                "cluster_s": sum(result.cluster_s for result in report.results),
                "total_s": time.perf_counter() - started,
            }
            with named("report"):
                folder.finish(report)
    return report


def plan(
    model: Any, data: Any = None, *, images: int | None = None, card: int | str | None = None, **options: Any
) -> MemoryPlan:
    """How `analyze` with the same arguments would handle each layer, in bytes, passes and seconds; ``print`` it.

    Published weights are not downloaded for it, and few images are decoded.

    Parameters
    ----------
    model, data, **options
        As in `analyze`.
    images : int, optional
        Plan for so many images, in place of ``data``: of the ``classes``, or else of ``clusters`` of them (10).
    card : int or str, optional
        Plan for a GPU with so much memory (``80GB``), which need not be there; seconds are those of an H100.

    Raises
    ------
    InputError
        For anything that cannot be used as given.
    """
    settings = read_options(options)
    if (data is None) == (images is None):
        raise InputError(
            "a plan is for the images of a data set or for a number of them (--images): give one of the two"
        )
    if images is None:
        source: ImageSource | Imagined = find_images(data, settings)
    else:
        if images < 1:
            raise InputError(f"a plan is for at least one image; got --images {images}")
        classes = settings.classes or tuple(f"class {i}" for i in range(settings.clusters or 10))
        source = Imagined(images, classes)
    network = find_network(model, source, settings, download=False)
    with in_memory(), prepare(network, source, settings) as setup:
        if card is not None:
            setup = setup.on_card(parse_bytes(card))
        return setup.alternatives(setup.plan(setup.layers))


def cluster_layers(
    setup: Setup, missing: Sequence[Layer], folder: RunFolder, bar: Progress
) -> Iterator[tuple[int, LayerResult]]:
    """The result of each missing layer, with its index among all, in the order of the plan's steps.

    Where memory runs out (another process may have taken it) what is left is planned again for less; the layers' rows
    are then captured anew, and a note of the results says so.
    """
    left, room, note = list(missing), setup.room, ""
    capture, kept = setup.capture(folder.thumbs), False
    while left:
        plan = setup.plan(left, room, kept=capture.kept)
        plan.require()
        capture.begin(plan)
        bar.begin(
            {i: step.capture_s for i, step in enumerate(plan.steps)},
            {row.name: row.seconds for row in plan.rows},
            plan.total_bytes,
            setup.device,
        )
        try:
            for i, step in enumerate(plan.steps):
                watch = partial(bar.images, index=i, count=len(plan.steps))
                for rows in capture.rows(step, left, watch):
                    give_back(setup.device)
                    paths, labels, thumbs = capture.seen()
                    samples = Samples(paths, labels, setup.images.classes, thumbs)
                    if not kept:
                        folder.keep_samples(samples, setup.images.describe())
                        kept = True
                    index = setup.layers.index(rows.layer)
                    bar.layer(rows.layer.name, len(setup.layers) - len(left), len(setup.layers))
                    layer = rows.layer
                    try:
                        with named(f"layer {layer.name}"):
                            result = study(setup, rows, samples, bar, note)
                    finally:
                        del rows  # and with it the memory, before the next layer comes, or this one anew
                    left.remove(layer)
                    yield index, result
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = first_line(error)
        else:
            break
        # Outside of the handler, whose error keeps alive what was allocated.
        give_back(setup.device)
        room = room.after_failure(plan.total_bytes)
        note = f"memory ran out ({failed}): planned again for {show_bytes(room.budget_bytes)}"


def study(setup: Setup, rows: LayerRows, samples: Samples, bar: Progress, note: str = "") -> LayerResult:
    """Cluster one layer's rows and compare the clusters with the classes; results in the units of the activations."""
    layer, source, scale, limit = rows.layer, rows.source, rows.scale, rows.plan.work_bytes
    if not source.resident:
        source = WatchedSource(source, bar.passes(source.shape[0], layer.name))
    n, k, classes = len(samples.paths), setup.clusters, len(samples.classes)
    if k > n:
        raise InputError(f"{k} clusters were asked for, and {n} images could be read: ask for at most that many")
    start_peak(setup.device)
    started = time.perf_counter()
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: a note of the layer says so below.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        fit = setup.kmeans(k, limit).fit(source).fit_report_
    fit = replace(fit, centroids=fit.centroids.new_empty(0))  # a page has no use for them, and the rest needs the room
    cluster_s, peak = time.perf_counter() - started, peak_bytes(setup.device)
    labels = fit.labels.cpu().numpy()
    with named("score"):
        table, match, scores = compare(labels, samples.labels, k, classes)
        view = geometry(source, fit.labels, k, seed=setup.settings.seed, memory_limit=limit)
    notes: dict[str, Any] = {"rows": rows.how} if rows.how else {}
    if rows.reduction:
        notes["reduction"] = rows.reduction
    if note:
        notes["memory"] = note
    if view.silhouette_n < n:
        notes["silhouette"] = f"of a seeded sample of {view.silhouette_n:,} images"
    if scale != 1.0:
        notes["scale"] = f"rows are stored times {scale:g}; all numbers are of the activations themselves"
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
        d=source.shape[1],
        k=k,
        labels=labels,
        dist2=fit.dist2.cpu().numpy() / scale**2,
        table=table,
        match=match,
        projection=view.projection / np.float32(scale),
        explained=view.explained,
        scores={**scores, "silhouette": view.silhouette},
        inertia=fit.inertia / scale**2,
        n_iter=fit.n_iter,
        backend=fit.backend,
        solver=fit.solver,
        precision=fit.precision,
        rejected=fit.rejected,
        recheck_share=fit.recheck_share,
        capture_s=rows.capture_s,
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
