"""The cuml backend: a whole fit by RAPIDS' own k-means, where it is installed and asked for by name.

It stands outside of what `gpuclust.cluster` promises: cuML seeds, iterates, stops and rounds in its own way, and the
report's ``notes`` say so (`CAVEATS`). What is ours is the check of the rows before it, ``dist2`` and ``inertia``
(reference distances of the rows to the centroids that cuML labelled them with), and all that a fitted model is asked
later: `predict`, `transform` and `score` use the exact code.

Facts about cuML are from its sources (``cuml/cluster/kmeans.pyx`` of 25.10 and its documentation up to 26.10) and cuVS'
(``cpp/src/cluster/detail/kmeans.cuh``).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from gpuclust.cluster.backends.base import Problem, current
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.cluster.lloyd import distances
from gpuclust.cluster.moments import largest_per_column
from gpuclust.cluster.sources.base import ChunkSource, block_rows
from gpuclust.cluster.sums import total
from gpuclust.errors import UnavailableError

_DTYPES = (torch.float32, torch.float64)
# cuML's names of what restarts begin with.
_INITS = {"k-means++": "k-means++", "k-means||": "scalable-k-means++", "random": "random"}
CAVEATS = (
    "the fit is cuML's own: its labels are by its own rounding in the type of the rows (not certified, ties not to the "
    "lowest index), and neither the same bits from run to run nor for other batches are promised",
    "cuML ends a restart when the sum of the squared movements of the centroids is below tol itself, not relative to "
    "the variance of the features; an emptied cluster keeps its centroid; its k-means++ and k-means|| draw other rows",
    "weights are scaled by cuML to a sum of n, in the type of the rows; inertia is that of its labels, summed exactly",
)


class CumlBackend(TorchBackend):
    """A fit by ``cuml.cluster.KMeans``; the steps, which a fitted model predicts with, are those of torch."""

    name = "cuml"
    waits = True

    def unavailable(self) -> str | None:
        for module in ("cuml", "cupy"):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed (pip install cuml-cu13 brings both)"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device, and cuML needs one"
        return None

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"cuML computes on CUDA, and the rows are on {problem.device}: pass device='cuda' or CUDA tensors"
        if problem.dtype not in _DTYPES:
            return f"cuML takes float32 and float64, and the rows are {problem.dtype}: convert them, as with X.float()"
        if problem.ranks > 1:
            return "rows that several processes share are not handed to cuML"
        return None

    def fit(
        self,
        source: ChunkSource,
        k: int,
        *,
        init: str | Sequence[torch.Tensor],
        n_init: int,
        max_iter: int,
        tol: float,
        seed: int,
        weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int, tuple[str, ...]]:
        """Centroids (k, d), labels int32 (n,), dist2 float64 (n,), inertia, iterations and notes.

        Parameters are those of `gpuclust.cluster.fit.fit_kmeans`. cuML takes one array of centroids to begin with: of
        several, each is a fit of its own, and the least inertia wins.

        Raises
        ------
        InputError
            For NaN and infinity.
        UnavailableError
            For rows that are streamed.
        """
        if not source.resident:
            raise UnavailableError(
                "backend 'cuml' needs X as one array on the device, and these rows are streamed: use backend='auto'"
            )
        for start, rows in source.chunks(block_rows(source.shape[1], source.device)):
            largest_per_column(rows, start)
        whole = [rows for _, rows in source.chunks(source.shape[0])]  # one view of all, where rows lie together
        x = (whole[0] if len(whole) == 1 else torch.cat(whole)).contiguous()
        starts: list[Any] = [_INITS[init]] if isinstance(init, str) else [given.contiguous() for given in init]
        best: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, int] | None = None
        for start_with in starts:
            with current(x.device):
                centroids, labels, n_iter = self._run(
                    x,
                    weights,
                    init=start_with,
                    n_clusters=k,
                    n_init=n_init if isinstance(init, str) else 1,
                    max_iter=max_iter,
                    tol=tol,
                    random_state=seed % 2**31,
                )
            dist2 = distances(self, source, centroids, labels)
            inertia = total(dist2, weights)
            if best is None or inertia < best[3]:
                best = centroids, labels, dist2, inertia, n_iter
        assert best is not None
        narrow = best[0].dtype != x.dtype
        notes = (*CAVEATS, *([f"this cuML computed {x.dtype} rows in {best[0].dtype}"] if narrow else []))
        return best[0].to(x.dtype), *best[1:], notes

    def _run(
        self, x: torch.Tensor, weights: torch.Tensor | None, **parameters: Any
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One call of cuML: centroids, labels, iterations."""
        import cuml.cluster
        import cupy

        given = parameters["init"]
        if isinstance(given, torch.Tensor):
            parameters["init"] = cupy.from_dlpack(given)
        model = cuml.cluster.KMeans(output_type="cupy", **parameters)
        options = {} if weights is None else {"sample_weight": cupy.from_dlpack(weights.to(x.dtype))}
        convert = inspect.signature(model.fit).parameters.get("convert_dtype")
        if convert is not None and convert.default is True:
            options["convert_dtype"] = False  # else it makes float32 of float64
        _wait(x)  # cuML computes on a stream of its own
        model.fit(cupy.from_dlpack(x), **options)
        _wait(x)
        centroids, labels = (torch.from_dlpack(found) for found in (model.cluster_centers_, model.labels_))
        # Copies in torch's own memory: cuML's ends with the model.
        return centroids.clone(), labels.to(torch.int32, copy=True), min(int(model.n_iter_), parameters["max_iter"])


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
