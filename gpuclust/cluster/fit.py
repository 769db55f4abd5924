"""A whole fit: moments, backend, seeds, restarts in groups that fit the memory, and the best of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends import choose
from gpuclust.cluster.backends.base import Backend, Problem, WholeFit
from gpuclust.cluster.cosine import HALF, unit_means
from gpuclust.cluster.distributed import Block, Group, OneProcess, heard, in_all, require_same
from gpuclust.cluster.dual import Dual, Ending
from gpuclust.cluster.dual import solutions as solutions_of
from gpuclust.cluster.hartigan import improve
from gpuclust.cluster.lloyd import Lloyd, Solution, Weights, distances, numbered
from gpuclust.cluster.moments import Moments, centroid_dtype
from gpuclust.cluster.relief import relief
from gpuclust.cluster.seeding.draws import RandomBits
from gpuclust.cluster.seeding.image import Image
from gpuclust.cluster.seeding.plus_plus import choose_plus_plus, choose_random
from gpuclust.cluster.seeding.scalable import choose_scalable
from gpuclust.cluster.solver import plan
from gpuclust.cluster.sources.base import ChunkSource, take_rows
from gpuclust.cluster.sources.checksum import Sample, require_unchanged
from gpuclust.cluster.story import Story
from gpuclust.cluster.sums import total
from gpuclust.errors import UnavailableError
from gpuclust.profile import named

# Algebraic inertias that differ by less than this share of the spread are told apart by the rows themselves.
_ALIKE = 2.0**-36


@dataclass(frozen=True)
class Fit:
    """What a fit found and how.

    Attributes
    ----------
    centroids : (k, d)
        float64 for float64 rows, else float32.
    labels : int32 (n,)
        The nearest of these centroids for each row; the lowest index of a tie.
    dist2 : float64 (n,)
        Reference distance of each row to its centroid.
    inertia : float
        Weighted sum of ``dist2``; half of it for the metric "cosine".
    n_iter : int
        Iterations of the best restart, before single rows move.
    trace : tuple of float
        Sum of the squared movements of its centroids in each iteration; the dual solver's are of the means before they
        are rounded, where that is enough to tell whether the restart ends.
    backend, solver, precision : str
        What ran; all three name a backend that runs a whole fit in its own way, as cuml does.
    rejected : dict
        Every other backend, with the reason why it did not run.
    recheck_share : float
        Share of all assignments, over all restarts and iterations, that the reference distance decided.
    times : dict
        Seconds: ``moments_s``, ``seed_s``, ``iterate_s``, ``select_s``; of the dual solver ``gram_s``, of Hartigan-Wong
        ``moves_s``.
    rows : str
        Where the rows were: in memory, copied to the device, or streamed, and why.
    notes : tuple of str
        What else a reader should know: that memory ran out and chunks became smaller, or what a backend that runs a
        whole fit does in its own way.
    plan : str
        What both solvers would take, as far as they differ: seconds and bytes (`gpuclust.cluster.solver`).
    moves : int
        Moves of single rows after Lloyd's iterations (`gpuclust.cluster.hartigan`).
    """

    centroids: torch.Tensor
    labels: torch.Tensor
    dist2: torch.Tensor
    inertia: float
    n_iter: int
    trace: tuple[float, ...]
    backend: str
    solver: str
    precision: str
    rejected: dict[str, str]
    recheck_share: float
    times: dict[str, float] = field(default_factory=dict)
    rows: str = ""
    notes: tuple[str, ...] = ()
    plan: str = ""
    moves: int = 0


def fit_kmeans(
    source: ChunkSource,
    k: int,
    *,
    init: str | Sequence[torch.Tensor] = "k-means++",
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    weights: torch.Tensor | None = None,
    precision: str = "exact",
    backend: str = "auto",
    solver: str = "auto",
    algorithm: str = "lloyd",
    memory_limit: int | None = None,
    tell: Callable[[str], None] | None = None,
    group: Group | None = None,
    metric: str = "euclidean",
) -> Fit:
    """k-means of the rows of ``source`` (n, d), k <= n.

    Parameters
    ----------
    init : {"k-means++", "k-means||", "random"} or sequence of tensors (k, d)
        Given centroids: one tensor for each of ``n_init`` restarts.
    tol : float
        Movement of the centroids, relative to the mean variance of a feature, at which a restart ends.
    weights : float64 (n,) or None
        None negative, not all zero.
    solver : {"auto", "primal", "dual"}
        Never changes the result; "auto" takes the one that should be faster.
    algorithm : {"lloyd", "hartigan-wong"}
    memory_limit : int or None
        Bytes that may be used beside the rows (`gpuclust.cluster.memory`). It never changes the result. Where memory
        runs out nevertheless, smaller chunks are tried, and ``notes`` says so.
    tell : Callable or None
        Takes a line about the solvers, and one about each restart.
    group : Group or None
        The processes that share the fit: each has a contiguous block of the rows, in the order of their ranks, as its
        ``source``, and its part of ``weights``; ``labels``, ``dist2`` and the re-checked share are of these rows.
    metric : {"euclidean", "cosine"}
        "cosine": ``source`` has rows of unit length (`gpuclust.cluster.cosine.UnitRows`), and so have given centroids.

    Raises
    ------
    InputError
        For NaN, infinity and values whose squares overflow, and for processes that disagree or have no rows.
    UnavailableError
        If the backend or solver asked for cannot run.
    MemoryLimitError
        If ``memory_limit`` is less than the fit takes at least.
    """
    d, device = source.shape[1], source.device
    watch = _Watch(device)
    _keep_freed_memory(device)
    with full_precision(device), relief(device) as room, heard(group or OneProcess(), device) as group:
        # Others wait for what a process repeats, where repeating is more than a pass: then it is not repeated.
        alone = room.run if group.size == 1 else lambda attempt: attempt()
        require_same(
            group,
            features=d,
            dtype=source.dtype,
            n_clusters=k,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            seed=seed,
            weights="given" if weights is not None else None,
            precision=precision,
            solver=solver,
            algorithm=algorithm,
            memory_limit=memory_limit,
            metric=metric,
        )
        block = Block.of(source.shape[0], group)
        n = block.n
        with in_all(group):
            problem = Problem(n, d, k, source.dtype, device, weights is not None, n_init, group.size)
            runner, rejected = choose(backend, problem)
        sample = Sample(source)
        if isinstance(runner, WholeFit):
            whole = _whole(
                runner,
                source,
                k,
                rejected,
                watch,
                init=init,
                n_init=n_init,
                max_iter=max_iter,
                tol=tol,
                seed=seed,
                weights=weights,
            )
            sample.require_unchanged()
            return whole
        shares = None if weights is None else Weights(weights, block)
        lightest = None if shares is None else shares.lightest
        with in_all(group):
            costs = plan(
                problem,
                memory_limit,
                rows=block.most,
                lightest=lightest,
                resident=source.resident,
                asked=solver == "dual",
                pass_s=getattr(source, "pass_s", 0.0),
                moves=algorithm == "hartigan-wong",
            )
            solver, memory = costs.choose("primal" if metric == "cosine" else solver)
            if algorithm == "hartigan-wong" and group.size > 1:
                raise UnavailableError(
                    "algorithm='hartigan-wong' moves single rows one after another, which processes that share the "
                    "rows cannot do yet: use algorithm='lloyd'"
                )
        if tell:
            tell(str(costs))
        room.begin(memory.halvings)
        weights, unit = (None, 1.0) if shares is None else (shares.values, shares.unit)
        spherical: dict[str, Any] = {"finish": unit_means} if metric == "cosine" else {}
        unit *= HALF if spherical else 1.0
        with named("moments"):
            moments = alone(lambda: Moments.of(source, lightest, block, runner))
        watch.lap("moments_s")
        lloyd = Lloyd(
            runner,
            source,
            moments,
            group,
            shares,
            lambda restarts: runner.chunk_rows(restarts, k, d, device),
            memory.spare_bytes,
            max_iter=max_iter,
            tol=tol * moments.spread / (n * d),
            precision=precision,
            relief=room,
            **spherical,
        )
        seeds = partial(
            _seed, init if isinstance(init, str) else "", source, moments, k, seed, shares, memory.spare_bytes
        )
        groups = _some(range(n_init), memory.together)
        solutions: list[Solution] = []

        def told(restarts: range, ended: Sequence[Ending | Solution]) -> None:
            for restart, one in zip(restarts, ended, strict=True):
                if tell:
                    tell(f"restart {restart}: {one.n_iter} iterations, inertia {one.inertia * unit:.10g}")

        def story(restarts: range) -> Story | None:
            return Story(tell, restarts, unit, lloyd.limits.tol) if tell else None

        if solver == "dual":
            with named("gram"):
                dual = alone(
                    lambda: Dual(
                        lloyd,
                        memory.spare_bytes,
                        memory.slice_bytes >> room.halvings,
                        memory.summed,
                        image=not source.resident,
                    )
                )
            watch.lap("gram_s")
            image = dual.take_image()
            starts: list[list[Any]] = []
            for restarts in groups:
                given: list[Any] = [] if isinstance(init, str) else [init[restart] for restart in restarts]
                if isinstance(init, str):
                    for some in _some(restarts, memory.seeded):
                        given += alone(partial(seeds, some, image))
                starts.append(given)
            del image
            watch.lap("seed_s")
            endings: list[Ending] = []
            for restarts, start in zip(groups, starts, strict=True):
                with named("iterate"):
                    ended = alone(partial(dual.run, start, story(restarts)))
                told(restarts, ended)
                endings += ended
            del dual
            solutions = alone(partial(solutions_of, lloyd, endings, memory.spare_bytes, memory.summed))
            watch.lap("iterate_s")
        else:
            for restarts in groups:
                rows = alone(partial(seeds, restarts)) if isinstance(init, str) else None
                centroids = torch.empty(len(restarts), k, d, dtype=centroid_dtype(source.dtype), device=device)
                for i, place in enumerate(centroids):
                    if rows:
                        place.copy_(take_rows(source, block, torch.tensor(rows[i], device=device)))
                    else:
                        place.copy_(init[restarts[i]])
                watch.lap("seed_s")
                with named("iterate"):
                    found = lloyd.run(centroids, story(restarts))
                watch.lap("iterate_s")
                told(restarts, found)
                solutions = _close(solutions + found, moments)
        best, dist2, inertia = alone(lambda: _best(runner, source, moments, solutions, weights))
        watch.lap("select_s")
        moves = 0
        if algorithm == "hartigan-wong":
            best, dist2, inertia, moves = improve(lloyd, best, dist2, inertia)
            if tell:
                tell(f"{moves} moves of single rows, inertia {inertia * unit:.10g}")
            watch.lap("moves_s")
        # The sums are of the rows as they were in the passes, the distances of what they are now.
        require_unchanged(abs(inertia - best.inertia) <= lloyd.doubt(best.centroids, inertia))
        with in_all(group):
            sample.require_unchanged()
    return Fit(
        best.centroids,
        best.labels,
        dist2,
        inertia * unit,
        best.n_iter,
        best.shifts,
        runner.name,
        solver,
        precision,
        rejected,
        lloyd.work.recheck_share,
        watch.times,
        plan=str(costs),
        moves=moves,
        notes=() if room.note is None else (room.note,),
    )


def _whole(
    runner: WholeFit,
    source: ChunkSource,
    k: int,
    rejected: dict[str, str],
    watch: _Watch,
    **parameters: Any,
) -> Fit:
    """The fit of a backend that runs all of it in its own way, which its notes tell."""
    centroids, labels, dist2, inertia, n_iter, notes = runner.fit(source, k, **parameters)
    watch.lap("iterate_s")
    return Fit(
        *(centroids, labels, dist2, inertia, n_iter, ()),
        backend=runner.name,
        solver=runner.name,
        precision=runner.name,
        rejected=rejected,
        recheck_share=0.0,
        times=watch.times,
        notes=notes,
    )


def _some(restarts: range, together: int) -> list[range]:
    """Restarts in groups of so many."""
    return [restarts[first : first + together] for first in range(0, len(restarts), together)]


@named("seed")
def _seed(
    init: str,
    source: ChunkSource,
    moments: Moments,
    k: int,
    seed: int,
    weights: Weights | None,
    spare_bytes: int,
    restarts: range,
    image: Image | None = None,
) -> list[list[int]]:
    """The numbers of the ``k`` rows that each restart begins with."""
    values = None if weights is None else weights.values
    if init == "random":
        return choose_random(moments.block, k, seed, restarts, values)
    bits = [RandomBits(seed, restart) for restart in restarts]
    if init == "k-means||":
        return choose_scalable(source, moments, k, bits, weights, spare_bytes, image)
    return choose_plus_plus(source, moments, k, bits, values, spare_bytes, image)


def _close(solutions: list[Solution], moments: Moments) -> list[Solution]:
    """Those whose inertia may be the least: the others are not kept."""
    require_unchanged(all(math.isfinite(solution.inertia) for solution in solutions))
    close = min(solution.inertia for solution in solutions) + _ALIKE * moments.spread
    return [solution for solution in solutions if solution.inertia <= close]


@named("select")
def _best(
    backend: Backend, source: ChunkSource, moments: Moments, solutions: list[Solution], weights: torch.Tensor | None
) -> tuple[Solution, torch.Tensor, float]:
    """The restart of least inertia (the first of a tie), by reference distances where it is close."""
    best: tuple[Solution, torch.Tensor, float] | None = None
    for solution in solutions:
        if best and _same(solution, best[0], moments.block):
            continue
        dist2 = distances(backend, source, solution.centroids, solution.labels)
        inertia = total(dist2, weights, moments.block)
        if best is None or inertia < best[2]:
            best = solution, dist2, inertia
    assert best is not None
    return best


def _same(one: Solution, other: Solution, block: Block) -> bool:
    """Whether two solutions are one, but for the order of the clusters: restarts often end in the same place."""
    (mine, first), (its, second) = (numbered(each.labels, len(each.centroids), block) for each in (one, other))
    differs = not torch.equal(mine, its)
    for cluster, same in zip(first.tolist(), second.tolist(), strict=True):
        differs = differs or not torch.equal(one.centroids[cluster], other.centroids[same])
    return not bool(block.max(torch.tensor([differs], dtype=torch.int64, device=one.labels.device)))


def _keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what tensors of up to this size free, for the next ones of their kind.

    glibc gives large pieces back to the system at once, until it has seen one of that size freed: without this each of
    a pass's tensors would have its pages from the system anew. Nothing is written, so it takes neither time nor memory.
    """
    if device.type == "cpu":
        np.empty(31 << 20, np.uint8)


class _Watch:
    """Seconds between laps; waits for the device, so that each lap has what was started in it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, dict[str, float]()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._last
        self._last = now
