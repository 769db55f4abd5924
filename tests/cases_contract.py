"""A covering set of problems: every pair of properties stands in some case, in far fewer cases than their product."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases_cluster import KINDS

from gpuclust.cluster.moments import centroid_dtype

PROPERTIES: dict[str, tuple[Any, ...]] = {
    "n": (1, 2, 31, 63, 64, 65, 127, 255, 256, 257, 1009),
    "d": (1, 3, 8, 127, 1000, 1025, 70_001),
    "k": (1, 2, 5, 33, 100, 1000, "n"),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "layout": ("plain", "columns first", "every other row", "part of the columns", "one row repeated"),
    "kind": (*sorted(KINDS), "largest", "smallest", "constant"),
    "restarts": (1, 3),
    "weights": (None, "some zero", "unequal"),
}


@dataclass(frozen=True)
class Case:
    """One problem; `rows`, `centroids` and `weights` make its tensors."""

    n: int
    d: int
    k: int
    dtype: torch.dtype
    layout: str
    kind: str
    restarts: int
    weights: str | None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (f"{self.n}x{self.d}", f"k{self.k}", f"r{self.restarts}", dtype, self.layout, self.kind, self.weights)
        return "-".join(str(part).replace(" ", "_") for part in parts)

    @property
    def products(self) -> int:
        """Multiplications of one pass."""
        return self.n * self.d * self.k * self.restarts

    def rows(self, device: str = "cpu") -> torch.Tensor:
        """X (n, d) in its layout."""
        x = self._values().to(self.dtype).to(device)
        if self.layout == "columns first":
            return x.t().contiguous().t()
        if self.layout == "every other row":
            return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
        if self.layout == "part of the columns":
            return torch.cat([torch.full_like(x[:, :1], torch.nan), x, x[:, :1]], 1)[:, 1:-1]
        return x[:1].expand(self.n, -1) if self.layout == "one row repeated" else x

    def _values(self) -> torch.Tensor:
        n, d, limit = self.n, self.d, torch.finfo(self.dtype)
        rng = np.random.RandomState(n + 31 * d)
        if self.kind == "constant":
            return torch.full((n, d), 3.7, dtype=torch.float64)
        if self.kind == "largest":  # whose squared distances, summed, are still finite
            most = min(limit.max, 1e140) / 2
            return torch.from_numpy(rng.uniform(-most, most, size=(n, d)))
        if self.kind == "smallest":
            step = limit.smallest_normal * limit.eps
            return torch.from_numpy(rng.randint(-40, 40, size=(n, d)) * step)
        values = torch.from_numpy(np.ascontiguousarray(KINDS[self.kind](rng, max(n, 2), d)[:n]))
        largest = values.abs().amax().item()
        room = 0.25 * min(limit.max, 1e140)
        return values * (room / largest) if largest > room else values

    def centroids(self, x: torch.Tensor) -> torch.Tensor:
        """Centroids (r, k, d): rows, rows moved by a last place, means of rows; some of them are there twice."""
        rng = np.random.RandomState(self.k + 7 * self.d)
        kept = centroid_dtype(self.dtype)
        picked = x[torch.from_numpy(rng.randint(self.n, size=(self.restarts, self.k))).to(x.device)].to(kept)
        other = picked.roll(1, 1)
        near = torch.nextafter(picked, other)
        between = picked / 2 + other / 2
        way = torch.from_numpy(rng.randint(4, size=(self.restarts, self.k, 1))).to(x.device)
        return torch.where(way == 0, picked, torch.where(way == 1, near, torch.where(way == 2, between, other)))

    def weight(self, device: str = "cpu") -> torch.Tensor | None:
        """Weights (n,), at most 1."""
        rng = np.random.RandomState(self.n)
        if self.weights is None:
            return None
        values = rng.randint(0, 3, size=self.n) / 2 if self.weights == "some zero" else rng.uniform(0.01, 1, self.n)
        values[0] = 1.0
        return torch.from_numpy(values).to(device)


def covering(most_products: int = 12_000_000) -> list[Case]:
    """Cases in which every pair of values of two properties stands, but for what is too large or senseless."""
    names = list(PROPERTIES)
    rng = np.random.RandomState(0)
    wanted = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x in PROPERTIES[a]
        for y in PROPERTIES[b]
    }
    cases: list[Case] = []
    failed = 0
    while wanted and failed < 400:
        best, gain = None, 0
        start = sorted(wanted, key=lambda pair: sorted(map(str, pair)))[rng.randint(len(wanted))]
        for _ in range(40):
            values = {name: options[rng.randint(len(options))] for name, options in PROPERTIES.items()} | dict(start)
            covered = len(wanted & _pairs(values))
            if covered > gain and (case := _case(values)) and case.products <= most_products:
                best, gain, chosen = case, covered, values
        if best is None:
            failed += 1
            wanted.discard(start) if failed % 20 == 0 else None
            continue
        cases.append(best)
        wanted -= _pairs(chosen)
    return cases


def _pairs(values: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def _case(values: dict[str, Any]) -> Case | None:
    k = values["n"] if values["k"] == "n" else values["k"]
    return None if k > values["n"] else Case(**{**values, "k": k})
