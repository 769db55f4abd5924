"""k-means on a file of rows: what ``gpuclust cluster`` does."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpuclust.cluster import KMeans
from gpuclust.cluster.fit import Fit
from gpuclust.cluster.memory import least_bytes
from gpuclust.cluster.sources.base import WatchedSource
from gpuclust.cluster.sources.inputs import read_rows
from gpuclust.config import environment
from gpuclust.errors import GpuclustError, InputError, MemoryLimitError, first_line, is_out_of_memory
from gpuclust.files import write
from gpuclust.progress import Progress


def cluster_file(file: Path, out: Path, clusters: int, *, force: bool = False, **parameters: Any) -> tuple[Fit, float]:
    """Cluster the rows of a .npy file and write their labels (int32 .npy); the fit, and the seconds it took.

    A terminal shows the passes over the rows.

    Parameters
    ----------
    file : path
        Rows (n, d) as `numpy.save` writes them; memory-mapped, and streamed if they are more than there is room for.
    out : path
        Where the labels go; written whole or not at all.
    force : bool
        Whether ``out`` may be overwritten.
    **parameters
        Of `gpuclust.KMeans`. Where no memory limit is given, that of the environment counts.

    Raises
    ------
    InputError
        If the file is not there or is no array of numbers, if ``out`` is there, is a folder or the file of rows itself,
        or for what KMeans refuses.
    MemoryLimitError
        If memory runs out.
    """
    if out.is_dir():
        raise InputError(f"{str(out)!r} is a folder: --out takes the name of a file")
    if out.exists() and file.exists() and out.samefile(file):
        raise InputError(f"{str(out)!r} holds the rows, which the labels would replace: --out takes another name")
    if out.exists() and not force:
        raise InputError(f"{str(out)!r} is there already: --force overwrites it, --out takes another name")
    if not out.parent.is_dir():
        raise InputError(f"{str(out.parent)!r} is no folder: make it, or give another --out")
    try:
        x = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"there is no file {str(file)!r}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{str(file)!r} is not a .npy file of numbers: {error}") from error
    if not isinstance(x, np.ndarray):
        raise InputError(f"{str(file)!r} holds several arrays (.npz); a .npy file with one is needed")
    if parameters.get("device") == "auto":
        parameters["device"] = environment().device or "auto"
    if parameters.get("memory_limit") is None:
        parameters["memory_limit"] = environment().memory_limit
    started = time.perf_counter()
    try:
        with Progress() as bar:
            limit, beside = parameters["memory_limit"], partial(least_bytes, clusters, False)
            rows = read_rows(x, parameters.get("device"), memory_limit=limit, beside=beside)
            watched = replace(rows, source=WatchedSource(rows.source, bar.passes(rows.source.shape[0])))
            fit = KMeans(clusters, **parameters).fit(watched).fit_report_
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"memory ran out: {first_line(error)}; give a --memory-limit below what is free, or fewer --clusters"
        ) from error
    seconds = time.perf_counter() - started
    labels = fit.labels.cpu().numpy()

    def save(path: Path) -> None:
        with open(path, "wb") as stream:
            np.save(stream, labels)

    try:
        write(out, save)
    except OSError as error:
        raise GpuclustError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    return fit, seconds
