"""gpuclust: what each layer of a convolutional network has learned, read off without labels.

The public names are loaded when they are first used, so that ``import gpuclust`` costs neither torch nor scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "analyze": "gpuclust.analysis",
    "plan": "gpuclust.analysis",
    "KMeans": "gpuclust.cluster",
    "load_report": "gpuclust.report",
}
__all__ = ["KMeans", "__version__", "analyze", "load_report", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpuclust' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
