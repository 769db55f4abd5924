"""Rows as k-means meets them, and the documented reference distance once more, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def reference_dist2(x: Any, centroids: Any) -> np.ndarray:
    """Squared distances (n, k): float64, difference form, the upper half added to the lower until one is left.

    By NumPy; of rows on a GPU there, by one operation of torch's after the other.
    """
    on_gpu = isinstance(x, torch.Tensor) and x.is_cuda
    rows = x.double() if on_gpu else as_float64(x)
    centres = torch.as_tensor(centroids).double().to(x.device) if on_gpu else as_float64(centroids)
    (n, d), k = rows.shape, len(centres)
    most = 1 << (26 if on_gpu else 17)  # values that keep a GPU busy, or that a cache holds
    across = min(k, max(1, most // d))
    down = max(1, most // d // across)
    out = np.empty((n, k))
    for start in range(0, n, down):
        for first in range(0, k, across):
            terms: Any = rows[start : start + down, None] - centres[None, first : first + across]
            terms *= terms
            length = d
            while length > 1:
                half = (length + 1) // 2
                terms[..., : length - half] += terms[..., half:length]
                length = half
            out[start : start + down, first : first + across] = as_float64(terms[..., 0])
    return out


def as_float64(x: Any) -> np.ndarray:
    return x.double().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def mislabelled(labels: Any, x: Any, centroids: Any) -> int:
    """Rows whose label is not the lowest index of the least reference distance."""
    return int((np.asarray(labels) != reference_dist2(x, centroids).argmin(1)).sum())


def blobs(rng: np.random.RandomState, n: int, d: int, k: int = 5, apart: float = 4.0) -> np.ndarray:
    centres = apart * rng.randn(k, d)
    return centres[rng.randint(k, size=n)] + rng.randn(n, d)


def relu(rng: np.random.RandomState, n: int, d: int) -> np.ndarray:
    """As activations are: mostly zeros, few large, features of very unequal size."""
    return np.maximum(rng.randn(n, d) - 0.7, 0) ** 2 * np.exp(1.5 * rng.randn(d))


def near_ties(rng: np.random.RandomState, n: int, d: int) -> np.ndarray:
    """Rows on a coarse grid: many are equally far from several others."""
    return rng.randint(-1, 2, size=(n, d)).astype(float)


KINDS: dict[str, Callable[[np.random.RandomState, int, int], np.ndarray]] = {
    "blobs": blobs,
    "noise": lambda rng, n, d: rng.randn(n, d),
    "relu": relu,
    "offset": lambda rng, n, d: blobs(rng, n, d) + 1e4,
    "heavy tails": lambda rng, n, d: rng.standard_t(1.5, size=(n, d)),
    "duplicates": lambda rng, n, d: rng.randn(max(1, n // 10), d)[rng.randint(max(1, n // 10), size=n)],
    "near ties": near_ties,
    "huge": lambda rng, n, d: blobs(rng, n, d) * 1e30,
    "tiny": lambda rng, n, d: blobs(rng, n, d) * 1e-30,
    "subnormal": lambda rng, n, d: blobs(rng, n, d) * 1e-41,
    "one far row": lambda rng, n, d: np.concatenate([blobs(rng, n - 1, d), np.full((1, d), 1e9)]),
    "unequal features": lambda rng, n, d: blobs(rng, n, d) * np.exp2(rng.randint(-30, 30, size=d)),
}


def rows(kind: str, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows (n, d) of a kind, in range of ``dtype``."""
    values = torch.from_numpy(np.ascontiguousarray(KINDS[kind](np.random.RandomState(seed), n, d)))
    if dtype == torch.float16:
        limit = values.abs().amax().item()
        values = values * (3e4 / limit) if limit > 3e4 else values
    return values.to(dtype)
