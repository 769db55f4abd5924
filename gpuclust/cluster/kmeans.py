"""KMeans: the estimator, with scikit-learn's names and meanings; scikit-learn is imported only where it is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from gpuclust.arithmetic import full_precision
from gpuclust.cluster.backends import choose
from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.cluster.cosine import HALF, UnitRows, require_directions, unit_rows
from gpuclust.cluster.distributed import Block, Group, in_all, unshared
from gpuclust.cluster.fit import Fit, fit_kmeans
from gpuclust.cluster.lloyd import distances
from gpuclust.cluster.memory import halvings_within, least_bytes
from gpuclust.cluster.moments import centroid_dtype, require_range
from gpuclust.cluster.parameters import check_parameters, seed_of
from gpuclust.cluster.portable import Portable
from gpuclust.cluster.predict import dist2_to_all, nearest
from gpuclust.cluster.relief import Relief, relief
from gpuclust.cluster.scikit import ScikitLearn
from gpuclust.cluster.sources.arrays import read_array
from gpuclust.cluster.sources.base import ChunkSource, TensorSource
from gpuclust.cluster.sources.inputs import Rows, read_rows, read_weights
from gpuclust.cluster.sums import SUMMED, total
from gpuclust.errors import InputError

# Labels and distances of a row that is asked about.
_RESULT_BYTES = 16


class KMeans(Portable, ScikitLearn):
    """k-means with exact labels and the same bits for any chunk size and number of threads or processes.

    Parameters and attributes that scikit-learn's KMeans has mean what they mean there. Of scikit-learn's own checks one
    fails, as it does for its KMeans: ``check_sample_weight_equivalence_on_dense_data``, since weights draw other seeds
    than repeated rows.

    Parameters
    ----------
    n_clusters : int
    init : {"k-means++", "k-means||", "random"}, array (n_clusters, d) or callable ``init(X, n_clusters, random_state)``
        "k-means||" reads X a few times where k-means++ reads it once per cluster: for many clusters
        (`gpuclust.cluster.seeding.scalable`).
    n_init : int or "auto"
        Restarts. "auto": 1 for k-means++, k-means|| and an array, 10 for random and a callable.
    max_iter : int
        Iterations of one restart at most.
    tol : float
        Movement of the centroids (sum of squares, relative to the mean variance of a feature) that ends a restart.
    verbose : int
        Above 0, lines are printed on the choice of the solver, on each iteration and the end of each restart, in
        scikit-learn's words with the number of the restart. It waits for the device in each iteration.
    random_state : int, numpy.random.RandomState, numpy.random.Generator or None
        None draws from NumPy's global state, as scikit-learn does; a state or generator is drawn from in each fit.
    copy_x : bool
        Without effect: X is never written.
    algorithm : {"lloyd", "elkan", "hartigan-wong"}
        The first two run Lloyd's, which gives the same labels. "hartigan-wong": then single rows of the best restart
        move, until none helps or ``max_iter`` sweeps are made; the inertia is never above Lloyd's
        (`gpuclust.cluster.hartigan`).
    metric : {"euclidean", "cosine"}
        "cosine": spherical k-means (`gpuclust.cluster.cosine`): rows count by their direction alone, centroids have
        unit length, and 1 - cos takes the place of squared distances, in `transform` that of distances. A row of zeros
        is an error.
    precision : {"exact", "fast"}
        "exact": each label is the nearest centroid by the reference distance (float64, difference form); a tie goes to
        the lowest index. "fast": the nearest by the backend's arithmetic (float32; triton's is float16), unchecked.
    solver : {"auto", "primal", "dual"}
        "dual": all iterations in the n x n matrix of the rows' products, for rows much wider than they are many; takes
        12 bytes per pair of rows, and of streamed X 16 and few passes. "auto" takes what `gpuclust.cluster.solver`
        predicts to be faster. It never changes the result.
    backend : {"auto", "cupy", "triton", "torch", "cuml"}
        What computes; the first three give the same labels. "torch": tensor operations on any device. "triton" and
        "cupy": kernels for NVIDIA GPUs of compute capability 8.0 and up. "cuml": the fit is that of RAPIDS' cuML, with
        its own convergence and rounding; labels are then not exact, and ``fit_report_.notes`` says what differs.
        "auto": cupy, or else triton, where it can run and its results are torch's there; else torch; never cuml.
        ``fit_report_.rejected`` has the reason for each that did not run.
    device : str, torch.device or None
        Where to compute: "cpu", "cuda", "cuda:INDEX", or "auto" for the CUDA device if there is one; None for where X
        is. Results are on X's device in any case.
    memory_limit : int or None
        Bytes that tensors may take beside X; less than one restart needs is an error, which says how much that is. A
        copy of X on the device counts; X that leaves too little is streamed. None: about 256 MiB and a tenth of X. It
        never changes the result. Where memory runs out in mid-fit, smaller chunks are tried. With L levels of sums (1
        for float32 rows below 2**21 of them, else 2; more for weights), w bytes of a centroid's value, r restarts that
        run at a time and 2 to 32 MiB (on a GPU 32 to 512 MiB) of chunks, a fit takes at most
        ``40 n + d (32 + 24 L + k w) + r (40 n + k d (2 w + 16 L))`` with the primal solver and
        ``40 n + d (32 + 24 L + k (2 w + 8 L)) + 12 n^2 + r (64 n + 32 k n)`` with the dual one, 4 n^2 more of streamed
        X, and 40 n + 8 r n more with weights; on a GPU d (64 + 24 k) more, and for float32 4 r k d of the primal's. See
        `gpuclust.cluster.memory`.

    Attributes
    ----------
    cluster_centers_ : (n_clusters, d)
        float64 for float64 X and whole numbers, float32 for float32, float16 and bfloat16.
    labels_ : int32 (n,)
    inertia_ : float
        Sum of squared distances to the nearest centroid, times the weights; of 1 - cos for ``metric="cosine"``.
    n_iter_ : int
    n_features_in_ : int
    feature_names_in_ : array of str (d,)
        Only if X has names of columns that are all strings.
    fit_report_ : gpuclust.cluster.fit.Fit
        Backend, solver, rejected backends with reasons, share of re-checked assignments, times, where the rows were,
        and notes: that memory ran out and chunks became smaller, what cuML does in its own way.

    Notes
    -----
    X is a torch tensor, a NumPy array, anything that offers DLPack or ``__cuda_array_interface__``, a memory-mapped
    .npy, chunks of rows (a list of arrays (b, d), or an object whose ``__iter__`` gives them anew each time, in a fixed
    order), or a chunk source (`gpuclust.cluster.sources`); results are of the same kind on the same device.
    What is streamed, from memory, a file or chunks, is read several times, and gives the same bits. A callable ``init``
    gets it as it is.
    X that changes during a fit is an error where that is noticed, and labels stay in range where it is not. Of streamed
    rows: any change of chunks, and of all on a GPU; in a file on the CPU see `HostSource`. Of rows used in place: any
    bit of 8192 values of whole rows, 4 rows at least, spread over X, at the beginning and the end; and all that leaves
    the inertia by the last reading of X another than by the sums of the passes before, beyond their rounding, or no
    number. So one value is noticed where its squared distance changes by more than some 1e-8 of the sum of the squared
    distances to the mean (1e-4 for rows 1e4 times as far from zero as from their mean). Not noticed are what was undone
    before the last reading, rows of one cluster that change places, and rows of weight 0 that the sample lacks.
    A pickled model has in host memory what lies on a device; where it is read the results go back to that device when
    they are first asked for, or stay on the CPU where it is missing. A fit that fails leaves the model as it was.
    Processes that each hold a part of the rows fit them as one with ``fit(shared(X))``, and with nothing else; see
    `gpuclust.cluster.distributed.shared`.
    Sums are of values rounded to a grid per feature (`gpuclust.cluster.sums`), so that no order of adding changes them:
    a centroid is exact to about 2**-35 of the largest absolute value of its feature, for 70,000 rows of float32.
    Sources of the method: Lloyd, "Least squares quantization in PCM", 1982; see `gpuclust.cluster.seeding` and
    `gpuclust.cluster.exact` for the rest.
    """

    _estimator_type = "clusterer"

    cluster_centers_: Any
    labels_: Any
    inertia_: float
    n_iter_: int
    n_features_in_: int
    fit_report_: Fit

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
        metric: str = "euclidean",
        precision: str = "exact",
        solver: str = "auto",
        backend: str = "auto",
        device: str | torch.device | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.metric = metric
        self.precision = precision
        self.solver = solver
        self.backend = backend
        self.device = device
        self.memory_limit = memory_limit

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Find the clusters of the rows of ``X`` (n, d).

        Parameters
        ----------
        X : (n, d)
            See the notes of the class.
        y : ignored
        sample_weight : (n,) or a number, optional
            Of each row, at least 0 and not all 0, of any unit: what the row counts for in centroids and inertia, and
            how likely it is drawn where restarts begin. Rows of weight 0 get labels alone. All are 1 by default.

        Raises
        ------
        ParameterError (a ValueError and a TypeError)
            For a parameter out of range, which is named.
        InputError (a ValueError)
            For NaN or infinity in X (the first is named), X that changes meanwhile, values whose squares overflow, more
            clusters than rows, weights that are negative, all 0, of another length or no numbers, ``init`` of another
            shape.
        TypeError
            For sparse X.
        UnavailableError (a ValueError)
            For a backend, solver or device that cannot run here.
        MemoryLimitError (a ValueError)
            For a ``memory_limit`` that is less than the fit takes at least.
        """
        with self._as_it_was():
            return self._fit(X, sample_weight)

    def _fit(self, X: Any, sample_weight: Any) -> Self:
        X, group = unshared(X)
        with in_all(group):
            check_parameters(self)
            rows = self._read(X, reset=True, weighted=sample_weight is not None)
            own_seed = seed_of(self.random_state)
        k = int(self.n_clusters)
        told = group.gather((rows.source.shape[0], own_seed))
        n, seed = sum(count for count, _ in told), told[0][1]
        rows = self._measured(rows, first=sum(count for count, _ in told[: group.rank]))
        source = rows.source
        with in_all(group):
            if k > n:
                raise InputError(f"n_samples={n} should be >= n_clusters={k}.")
            if k == 1 and self.algorithm == "elkan":
                warnings.warn(
                    "algorithm='elkan' doesn't make sense for a single cluster. Using 'lloyd' instead.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            init, n_init = self._starts(X, rows, seed, group)
        fit = fit_kmeans(
            source,
            k,
            init=init,
            n_init=n_init,
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            seed=seed,
            weights=read_weights(sample_weight, source, group),
            precision=self.precision,
            backend=self.backend,
            solver=self.solver,
            algorithm="lloyd" if self.algorithm == "elkan" else self.algorithm,
            memory_limit=rows.left_of(self.memory_limit),
            tell=print if self.verbose and group.rank == 0 else None,
            group=group,
            metric=self.metric,
        )
        taken = torch.bincount(fit.labels, minlength=k)
        found = int((group.all_reduce(taken) > 0).sum())
        if found < k:
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({k}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )
        vars(self).pop("_away", None)  # of another fit
        self.cluster_centers_ = rows.back(fit.centroids)
        self.labels_ = rows.back(fit.labels)
        self.inertia_, self.n_iter_ = fit.inertia, fit.n_iter
        self._n_init = n_init  # how many restarts there were, by the name that scikit-learn has for it
        self.fit_report_ = replace(fit, rows=rows.how)
        return self

    def predict(self, X: Any) -> Any:
        """The nearest centroid of each row of ``X`` (n, d), of X's kind and on its device: int32 (n,).

        Nearest by the reference distance of both as they are stored, in float64 whatever their types.

        Raises
        ------
        NotFittedError (a ValueError)
            Before `fit`.
        InputError (a ValueError)
            For X of another width, NaN or infinity in X (the first is named), values whose squares overflow.
        TypeError
            For sparse X.
        UnavailableError (a ValueError)
            For a backend or device that cannot run here.
        """
        rows, centroids = self._known(unshared(X)[0])
        rows = self._measured(rows)
        source = rows.source
        backend = self._backend(source)
        with self._room(rows) as room:
            return rows.back(room.run(lambda: nearest(source, centroids, backend, self.precision)))

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """``fit(X, sample_weight=sample_weight)``, then its labels: int32 (n,). It raises what `fit` does."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def transform(self, X: Any) -> Any:
        """Distances of the rows of ``X`` (n, d) to the centroids, (n, n_clusters); 1 - cos for ``metric="cosine"``.

        float64 where X or the centroids are float64 or X has whole numbers, else float32. `set_output` makes it a table
        where X is no tensor. It raises what `predict` does.
        """
        X = unshared(X)[0]
        rows, centroids = self._known(X)
        # Where it is wanted: the device that rows are streamed to may have no room for it.
        dtype = torch.promote_types(centroid_dtype(rows.source.dtype), centroids.dtype)
        out = torch.empty(rows.source.shape[0], len(centroids), dtype=dtype, device=rows.home)
        rows = self._measured(rows)

        def fill() -> None:
            for part, dist2 in dist2_to_all(rows.source, centroids):
                out[part] = dist2.sqrt_() if self.metric == "euclidean" else dist2.mul_(HALF)

        with self._room(rows) as room:
            room.run(fill)
        return self._in_container(rows.back(out), X)

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """``fit(X, sample_weight=sample_weight)``, then ``transform(X)``: (n, n_clusters). It raises what both do."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of ``X`` (n, d) with these centroids.

        Parameters
        ----------
        X : (n, d)
        y : ignored
        sample_weight : (n,) or a number, optional
            What the squared distance of each row (1 - cos for ``metric="cosine"``) counts for: at least 0 and not all
            0. All are 1 by default.

        Raises
        ------
        NotFittedError (a ValueError)
            Before `fit`.
        InputError (a ValueError)
            For X of another width, NaN or infinity in X (the first is named),
            or weights that `fit` would refuse.
        TypeError
            For sparse X.
        UnavailableError (a ValueError)
            For a backend or device that cannot run here.
        """
        X, group = unshared(X)
        with in_all(group):
            rows, centroids = self._known(X)
        rows = self._measured(rows)
        source = rows.source
        weights, block = read_weights(sample_weight, source, group), Block.of(source.shape[0], group)
        with self._room(rows) as room:
            with in_all(group):
                backend = self._backend(source)
                labels = room.run(lambda: nearest(source, centroids, backend, self.precision))
                dist2 = room.run(lambda: distances(backend, source, centroids, labels))
                far2 = dist2.amax().item()
                require_range(SUMMED * far2 * block.n, math.sqrt(far2), "distances")
            found = total(dist2, weights, block)
            return -found if self.metric == "euclidean" else -found * HALF

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns of `transform`: ``kmeans0``, ``kmeans1`` and so on."""
        self._check_fitted()
        name = type(self).__name__.lower()
        return np.asarray([f"{name}{i}" for i in range(self.cluster_centers_.shape[0])], dtype=object)

    # ---- inside

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Whatever ends the block early, Ctrl-C included, the estimator is then as it was before."""
        before = {name: dict(value) if name == "_away" else value for name, value in vars(self).items()}
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _read(self, X: Any, *, reset: bool, weighted: bool = False) -> Rows:
        if hasattr(X, "columns") or hasattr(self, "feature_names_in_"):
            from sklearn.utils.validation import _check_feature_names

            _check_feature_names(self, X, reset=reset)
        rows = read_rows(
            X,
            self.device if reset else self._device(),
            type(self).__name__,
            self.memory_limit,
            beside=partial(least_bytes, int(self.n_clusters), weighted) if reset else None,
        )
        d = rows.source.shape[1]
        if reset:
            self.n_features_in_ = d
        elif d != self.n_features_in_:
            raise InputError(
                f"X has {d} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input."
            )
        return rows

    def _measured(self, rows: Rows, first: int = 0) -> Rows:
        """The rows as the metric sees them; ``first`` is the number of the first of them."""
        if self.metric == "euclidean":
            return rows
        unit = UnitRows(rows.source, rows.left_of(self.memory_limit), first)
        return replace(rows, source=unit, held_bytes=rows.held_bytes + unit.buffer_bytes)

    @contextmanager
    def _room(self, rows: Rows) -> Iterator[Relief]:
        """For what is asked of a fitted model: chunks that keep within the limit, beside results."""
        device, limit = rows.source.device, rows.left_of(self.memory_limit)
        with full_precision(device), relief(device) as room:
            if limit is not None:
                room.begin(halvings_within(limit - _RESULT_BYTES * rows.source.shape[0], device))
            yield room

    def _known(self, X: Any) -> tuple[Rows, torch.Tensor]:
        self._check_fitted()
        rows = self._read(X, reset=False)
        return rows, read_array(self.cluster_centers_)[0].to(rows.source.device)

    def _check_fitted(self) -> None:
        if not hasattr(self, "cluster_centers_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before "
                "using this estimator."
            )

    def _backend(self, source: ChunkSource) -> Backend:
        n, d = source.shape
        # What cuML fitted is asked with the exact code.
        name = "auto" if self.backend == "cuml" else self.backend
        return choose(name, Problem(n, d, self.cluster_centers_.shape[0], source.dtype, source.device))[0]

    def _starts(self, X: Any, rows: Rows, seed: int, group: Group) -> tuple[str | list[torch.Tensor], int]:
        """What the restarts begin with, and how many there are."""
        named, source = isinstance(self.init, str), rows.source
        once = self.init != "random" if named else not callable(self.init)
        n_init = (1 if once else 10) if self.n_init == "auto" else int(self.n_init)
        if named:
            return self.init, n_init
        if callable(self.init):
            if group.size > 1:
                raise InputError(
                    "a callable 'init' sees the rows of one process alone, and these rows are shared: give an array"
                )
            state = np.random.RandomState(seed % 2**32)
            # A table or a list reaches it as an array, as in scikit-learn.
            array = rows.back(source.x) if isinstance(source, TensorSource) else X
            return [
                self._given(self.init(array, self.n_clusters, random_state=state), source) for _ in range(n_init)
            ], n_init
        if n_init != 1:
            warnings.warn(
                f"Explicit initial center position passed: performing only one init in {type(self).__name__} "
                f"instead of n_init={n_init}.",
                RuntimeWarning,
                stacklevel=4,
            )
        return [self._given(self.init, source)], 1

    def _given(self, centroids: Any, source: ChunkSource) -> torch.Tensor:
        given, _ = read_array(centroids)
        shape, wanted = tuple(given.shape), (int(self.n_clusters), source.shape[1])
        for i, what in enumerate(("number of clusters", "number of features of the data")):
            if shape[i] != wanted[i]:
                raise InputError(f"The shape of the initial centers {shape} does not match the {what} {wanted[i]}.")
        values = given.to(source.device, centroid_dtype(source.dtype))
        if not bool(values.isfinite().all()):
            raise InputError("The initial centers contain NaN or infinity.")
        if self.metric == "euclidean":
            return values
        require_directions(given, what="The initial centers contain one of zeros: number")
        return unit_rows(given.to(source.device), values.dtype)
