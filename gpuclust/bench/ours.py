"""gpuclust as one more adapter: each backend, and the dual solver. What touches its inside is `update` and `seed`."""

from __future__ import annotations

from typing import Any

import torch

from gpuclust.arithmetic import full_precision
from gpuclust.bench.case import Case
from gpuclust.bench.peers import OPS, Found, Peer, Stored, Work
from gpuclust.cluster import KMeans
from gpuclust.cluster.backends import choose, survey
from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.predict import nearest
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus
from gpuclust.cluster.seeding.scalable import choose_scalable
from gpuclust.cluster.solver import plan
from gpuclust.cluster.sources.base import TensorSource, chunk_rows
from gpuclust.config import environment
from gpuclust.errors import InputError, first_line

# Whole fits of another library, outside the promise of exact labels.
_FOREIGN = ("cuml",)
# Clusters from which on k-means|| is measured.
_MANY = 100


class Ours(Peer):
    """gpuclust's KMeans, exact, with one backend and solver; with ``scalable`` seeding alone, by k-means||."""

    distributions = ("gpuclust",)

    def __init__(self, backend: str, solver: str = "auto", x_at: str = "device", scalable: bool = False) -> None:
        self.backend, self.solver, self.x_at, self.scalable = backend, solver, x_at, scalable
        self.name = f"gpuclust {'k-means||' if scalable else solver if solver == 'dual' else backend}"
        self.exact = backend not in _FOREIGN
        # Of rows on the host, and of another solver, the steps are those of the first.
        self.ops = ("iteration", "fit") if solver == "dual" else ("assign", "fit") if x_at == "host" else OPS
        self.ops = ("seed",) if scalable else self.ops
        self.note = "rows in pageable memory of the host" if x_at == "host" else ""
        if backend == "cupy" and environment().hopper:
            self.note = f"{self.note}; GPUCLUST_HOPPER=1".lstrip("; ")
        self._device: torch.device | None = None

    def version(self) -> str:
        from gpuclust import __version__

        return __version__

    def unavailable(self, device: torch.device) -> str | None:
        self._device = device
        reason = survey().get(self.backend) if self.backend != "auto" else None
        if reason:
            return reason
        try:
            self._model(1, max_iter=1).fit(torch.arange(2.0, device=device)[:, None])
        except InputError as error:
            return first_line(error)
        return None

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if self.scalable and case.k < _MANY:
            return f"k-means|| is for {_MANY} clusters and more"
        try:
            problem = Problem(case.n, case.d, case.k, case.torch_dtype, device, False, case.n_init)
            choose(self.backend, problem)
            if self.solver == "dual":  # measured only where "auto" may take it
                plan(problem).choose("dual")
        except InputError as error:
            return first_line(error)
        return None

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        x = rows.x if self.x_at == "device" else rows.host

        def call() -> KMeans:
            given = iter(starts)
            restarts: dict[str, Any] = {"init": starts[0], "n_init": 1}
            if len(starts) > 1:
                restarts = {"init": lambda *_, **__: next(given), "n_init": len(starts)}
            return self._model(starts.shape[1], max_iter=iterations, **restarts).fit(x)

        return Work(call, lambda model: [_read(model)])

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        x = rows.x if self.x_at == "device" else rows.host
        model = self._model(len(start))
        model.cluster_centers_, model.n_features_in_ = start, start.shape[1]
        return Work(
            lambda: model.predict(x),
            lambda labels: [Found(labels=labels, recheck_share=self._recheck_share(rows.x, start))],
        )

    def _recheck_share(self, x: torch.Tensor, start: torch.Tensor) -> float | None:
        """Share of the labels of an `assign` that the reference distance decides; nobody is told it, so once more."""
        if not self.exact:
            return None
        (n, d), k = x.shape, len(start)
        counted = _Counted(choose(self.backend, Problem(n, d, k, x.dtype, x.device))[0])
        with full_precision(x.device):
            nearest(TensorSource(x), start, counted)
        return counted.decided / n

    def update(self, rows: Stored, labels: torch.Tensor, start: torch.Tensor) -> Work | None:
        if not self.exact:
            return None
        (n, d), k, device = rows.x.shape, len(start), rows.x.device
        source = TensorSource(rows.x)
        backend, _ = choose(self.backend, Problem(n, d, k, rows.x.dtype, device))
        with full_precision(device):
            grid = Moments.of(source).grid
        plus = labels.to(torch.int32)[None].contiguous()

        def call() -> torch.Tensor:
            sums = torch.zeros(grid.levels, 1, k, d, dtype=torch.float64, device=device)
            counts = torch.zeros(1, k, dtype=torch.float64, device=device)
            with full_precision(device):
                for first, x in source.chunks(chunk_rows(k, d, device)):
                    part = plus[:, first : first + x.shape[0]]
                    backend.accumulate(x, None, grid, part, None, sums, counts)
                means = (sums.sum(0)[0] / counts[0][:, None]).to(start.dtype)
                return torch.where(counts[0][:, None] > 0, means, start)

        return Work(call, lambda centroids: [Found(centroids)])

    def seed(self, rows: Stored, k: int, seed: int) -> Work | None:
        if not self.exact:
            return None
        source, device = TensorSource(rows.x), rows.x.device
        choose_rows = choose_scalable if self.scalable else choose_plus_plus
        spare_bytes = plan(Problem(*source.shape, k, source.dtype, device)).primal.spare_bytes
        with full_precision(device):
            moments = Moments.of(source)

        def call() -> torch.Tensor:
            with full_precision(device):
                (chosen,) = choose_rows(source, moments, k, [RandomBits(seed, 0)], None, spare_bytes)
                return source.take(torch.as_tensor(chosen, device=device))

        return Work(call, lambda centroids: [Found(centroids)])

    def _model(self, k: int, **parameters: Any) -> KMeans:
        return KMeans(
            k, tol=0.0, backend=self.backend, solver=self.solver, device=self._device, random_state=0, **parameters
        )


class _Counted:
    """A backend, and how many labels the reference distance decided in it."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.decided = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def assign(self, *given: Any) -> torch.Tensor:
        count = self._backend.assign(*given)
        self.decided += int(count)
        return count


def our_backends(device: torch.device) -> list[Peer]:
    """gpuclust's adapters: the one that ``auto`` takes first, every other, k-means||, rows of the host on a GPU."""
    known = survey()
    chosen = choose("auto", Problem(1 << 20, 128, 256, torch.float32, device))[0].name
    names = [chosen, *(name for name in known if name != chosen)]
    adapters: list[Peer] = [Ours(name) for name in names]
    for other in adapters[1:]:
        other.ops = tuple(op for op in OPS if op != "seed")  # it is the same with every backend
    adapters += [Ours("auto", "dual"), Ours(chosen, scalable=True)]
    if device.type == "cuda":
        adapters.append(Ours(chosen, x_at="host"))
    return adapters


def _read(model: KMeans) -> Found:
    report = model.fit_report_
    return Found(report.centroids, report.labels, report.n_iter, report.recheck_share)
