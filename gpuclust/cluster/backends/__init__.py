"""The backends by name, in the order in which ``auto`` tries them; it never takes cuml."""

from __future__ import annotations

from functools import cache

from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.errors import UnavailableError

ORDER = ("cupy", "triton", "torch")


@cache
def _backends() -> dict[str, Backend]:
    from gpuclust.cluster.backends.cuml import CumlBackend
    from gpuclust.cluster.backends.cupy import CupyBackend
    from gpuclust.cluster.backends.torch import TorchBackend
    from gpuclust.cluster.backends.triton import TritonBackend

    return {
        "cupy": CupyBackend(),
        "triton": TritonBackend(),
        "torch": TorchBackend(),
        "cuml": CumlBackend(),
    }


def survey() -> dict[str, str | None]:
    """Every backend's name with None if it can run on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in _backends().items()}


def choose(name: str, problem: Problem) -> tuple[Backend, dict[str, str]]:
    """The backend for ``problem``, and every other with the reason why it does not run.

    Raises
    ------
    UnavailableError
        The backend asked for by name cannot run or cannot solve the problem; an explicit choice never falls back.
    """
    backends = _backends()
    rejected: dict[str, str] = {}
    for candidate in ORDER if name == "auto" else (name,):
        backend = backends.get(candidate)
        if backend is None:
            rejected[candidate] = f"there is no backend of that name; there are {', '.join(backends)}"
            continue
        reason = backend.unavailable() or backend.supports(problem)
        if reason is None and name == "auto":
            reason = backend.reserved(problem)
        if reason is None:
            others = {other: _passed_over(other, candidate, name) for other in backends if other != candidate}
            return backend, others | rejected
        rejected[candidate] = reason
    reasons = "; ".join(f"{key}: {reason}" for key, reason in rejected.items())
    raise UnavailableError(f"backend {name!r} cannot run here ({reasons}); use backend='auto' or 'torch'")


def _passed_over(other: str, taken: str, asked: str) -> str:
    """Why a backend that nobody asked whether it can run does not."""
    if asked != "auto":
        return f"backend={asked!r} was asked for"
    return f"auto takes {taken} before it" if other in ORDER else "auto never takes it: its labels are not exact"
