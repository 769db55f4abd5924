"""The backends by name, in the order in which ``auto`` tries them; it never takes cuml."""

from __future__ import annotations

from gpuclust.cluster.backends.base import Backend, Problem
from gpuclust.errors import UnavailableError

# Known by name and not part of this version: asked for, they are an error; ``auto`` records why they did not run.
_NOT_YET = {name: f"gpuclust has no {name} backend in this version" for name in ("cupy", "triton")}
ORDER = ("cupy", "triton", "torch")


def _backends() -> dict[str, Backend]:
    from gpuclust.cluster.backends.cuml import CumlBackend
    from gpuclust.cluster.backends.torch import TorchBackend

    return {"torch": TorchBackend(), "cuml": CumlBackend()}


def survey() -> dict[str, str | None]:
    """Every backend's name with None if it can run on this machine, else the reason why not."""
    return {**_NOT_YET, **{name: backend.unavailable() for name, backend in _backends().items()}}


def choose(name: str, problem: Problem) -> tuple[Backend, dict[str, str]]:
    """The backend for ``problem``, and the ones passed over with the reason of each.

    Raises
    ------
    UnavailableError
        The backend asked for by name cannot run or cannot solve the problem; an explicit choice never falls back.
    """
    backends = _backends()
    rejected: dict[str, str] = {}
    for candidate in ORDER if name == "auto" else (name,):
        backend = backends.get(candidate)
        reason = (
            _NOT_YET.get(candidate, f"there is no backend of that name; there are {', '.join(ORDER)} and cuml")
            if backend is None
            else backend.unavailable() or backend.supports(problem)
        )
        if backend is not None and reason is None:
            return backend, rejected
        rejected[candidate] = str(reason)
    reasons = "; ".join(f"{key}: {reason}" for key, reason in rejected.items())
    raise UnavailableError(f"backend {name!r} cannot run here ({reasons}); use backend='auto' or 'torch'")
