"""The parameters of KMeans: what each may be, and the seed that a random state stands for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpuclust.config import ALGORITHMS, BACKENDS, INITS, METRICS, PRECISIONS, SOLVERS
from gpuclust.errors import ParameterError, UnavailableError

_NAMES = {
    "algorithm": ALGORITHMS,
    "metric": METRICS,
    "precision": PRECISIONS,
    "solver": SOLVERS,
    "backend": BACKENDS,
}


def check_parameters(model: Any) -> None:
    """Check the parameters of a KMeans.

    Raises
    ------
    ParameterError (a ValueError and a TypeError)
        For the first that is not what it may be; it is named, with what was got.
    UnavailableError (a ValueError)
        For two that do not go together.
    """
    for parameter, right, allowed in _checks(model):
        if not right:
            name, value = type(model).__name__, getattr(model, parameter)
            raise ParameterError(f"The {parameter!r} parameter of {name} must be {allowed}. Got {value!r} instead.")
    for parameter, other in (("solver", "dual"), ("algorithm", "hartigan-wong"), ("backend", "cuml")):
        if model.metric == "cosine" and getattr(model, parameter) == other:
            raise UnavailableError(
                f"metric='cosine' and {parameter}={other!r} do not go together: {other} knows Euclidean distances "
                f"alone; leave {parameter!r} at its default"
            )


def _checks(model: Any) -> Iterator[tuple[str, bool, str]]:
    """Of each parameter its name, whether it is right, and what it may be."""
    yield "n_clusters", is_whole(model.n_clusters, 1), "an int in the range [1, inf)"
    init = model.init
    yield (
        "init",
        _is_one_of(INITS, init) or callable(init) or is_table(init),
        f"a str among {_shown(INITS)}, a callable or an array-like of shape (n_clusters, n_features)",
    )
    n_init = model.n_init
    yield "n_init", _is_one_of(("auto",), n_init) or is_whole(n_init, 1), "'auto' or an int in the range [1, inf)"
    yield "max_iter", is_whole(model.max_iter, 1), "an int in the range [1, inf)"
    yield "tol", is_real(model.tol, 0), "a float in the range [0.0, inf)"
    yield "verbose", is_bool(model.verbose) or is_whole(model.verbose, 0), "an int in the range [0, inf) or a bool"
    state = model.random_state
    yield (
        "random_state",
        state is None or is_whole(state, 0) or isinstance(state, (np.random.RandomState, np.random.Generator)),
        "an int in the range [0, inf), a numpy.random.RandomState, a numpy.random.Generator or None",
    )
    yield "copy_x", is_bool(model.copy_x), "a bool"
    for parameter, names in _NAMES.items():
        yield parameter, _is_one_of(names, getattr(model, parameter)), f"a str among {_shown(names)}"
    limit = model.memory_limit
    yield "memory_limit", limit is None or is_whole(limit, 1), "None or an int in the range [1, inf)"


def seed_of(random_state: Any) -> int:
    """The seed, or a number that is drawn from the state; from NumPy's global one for None."""
    if random_state is None:
        random_state = np.random.mtrand._rand
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(np.iinfo(np.int32).max))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(np.iinfo(np.int32).max))
    return int(random_state)


def _is_one_of(names: tuple[str, ...], value: Any) -> bool:
    return isinstance(value, str) and value in names


def _shown(names: tuple[str, ...]) -> str:
    return "{" + ", ".join(map(repr, names)) + "}"


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number (not a bool) of at least ``least``."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def is_bool(value: Any) -> bool:
    """Whether it is True or False, NumPy's included."""
    return isinstance(value, (bool, np.bool_))


def is_table(value: Any) -> bool:
    """Whether it is an array of two dimensions, of any kind, or something like a list of rows."""
    try:
        return len(value.shape if hasattr(value, "shape") else np.shape(value)) == 2
    except (TypeError, ValueError):  # rows of several lengths, or of what is no number
        return False


def is_real(value: Any, least: float) -> bool:
    """Whether it is a finite number of at least ``least``."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return bool(real and math.isfinite(value) and value >= least)
