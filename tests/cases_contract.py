"""A covering set of problems: every pair of properties stands in some case, in far fewer cases than their product."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import ceil
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
# Values between neighbours of the layouts "far rows" and "far columns"; 1025 of them lie beyond 2**32 values.
APART = 1 << 22
# What the cost of a case depends on.
SIZE = ("n", "d", "k", "restarts")


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

    def rows(self, device: str = "cpu") -> torch.Tensor:
        """X (n, d) in its layout."""
        x = self._values().to(self.dtype).to(device)
        if self.layout == "columns first":
            return x.t().contiguous().t()
        if self.layout == "every other row":
            return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
        if self.layout == "part of the columns":
            return torch.cat([torch.full_like(x[:, :1], torch.nan), x, x[:, :1]], 1)[:, 1:-1]
        if self.layout in ("far rows", "far columns"):
            return far(x) if self.layout == "far rows" else far(x.t()).t()
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


def far(x: torch.Tensor) -> torch.Tensor:
    """``x`` (n, d) with `APART` values from a row to the next: no memory is touched but that of the rows themselves."""
    size = len(x) * APART
    if x.device.type == "cpu":
        with tempfile.TemporaryFile() as file:
            file.truncate(size * x.element_size())  # with holes: none of it is on the disk
            values = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=x.dtype)
    else:
        values = torch.empty(size, dtype=x.dtype, device=x.device)
    return values.as_strided(x.shape, (APART, 1)).copy_(x)


def products(n: int, d: int, k: int, restarts: int) -> float:
    """What the checks of a case cost in NumPy, in products of a pass (3 ns): each value of X is one of many sums."""
    return n * d * (k * restarts + 64)


def kernel_products(n: int, d: int, k: int, restarts: int) -> float:
    """The same where the products are a GPU's, and the reference distances too: some values of X cost the most."""
    return n * d * (k * restarts / 32 + 64)


def interpreted(n: int, d: int, k: int, restarts: int) -> float:
    """Steps of all programs of Triton's kernels, over blocks of rows, centroids and features: 7 ms each interpreted."""
    rows, clusters, features = (128, 32, 128) if d <= 128 else (128 if d <= 1024 else 64, 128, 32)
    look = ceil(n / rows) * ceil(k / clusters) * ceil(d / features)
    return restarts * (look + ceil(n / 16) * ceil(d / 128))


def covering(cost: Callable[[int, int, int, int], float], limits: Sequence[float]) -> list[Case]:
    """Cases in which every pair of values of two properties stands that some case of at most the last limit has.

    What needs no more is covered by cases that cost no more than the first limit, and so on: the largest are few.
    """
    rng = np.random.RandomState(0)
    wanted, cases = all_pairs(), list[Case]()
    for limit in limits:
        sizes = [size for size in _sizes() if _cost(cost, size) <= limit]
        parts = {frozenset(part) for size in sizes for count in range(3) for part in combinations(size.items(), count)}
        left = {pair for pair in wanted if frozenset(item for item in pair if item[0] in SIZE) in parts}
        while left:
            pair = dict(sorted(left, key=lambda pair: sorted(map(str, pair)))[rng.randint(len(left))])
            fitting = [size for size in sizes if all(size.get(name, value) == value for name, value in pair.items())]
            tries = [_draw(rng) | fitting[rng.randint(len(fitting))] | pair for _ in range(120)]
            best = max(tries, key=lambda values: (len(wanted & pairs(values)), -_cost(cost, values)))
            cases.append(Case(**best | {"k": _clusters(best)}))
            wanted -= pairs(best)
            left -= pairs(best)
    return cases


def all_pairs() -> set[frozenset[tuple[str, Any]]]:
    """Every pair of values of two properties."""
    values = [(name, value) for name, options in PROPERTIES.items() for value in options]
    return {frozenset(pair) for pair in combinations(values, 2) if pair[0][0] != pair[1][0]}


def covered(case: Case) -> set[frozenset[tuple[str, Any]]]:
    """The pairs that stand in a case; k is a number, and "n" where it is n."""
    values = vars(case)
    return pairs(values) | (pairs(values | {"k": "n"}) if case.k == case.n else set())


def pairs(values: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(values.items(), 2)}


def _sizes() -> list[dict[str, Any]]:
    """The values of what a case's cost depends on, together, but for more clusters than rows."""
    every = (dict(zip(SIZE, values, strict=True)) for values in product(*(PROPERTIES[name] for name in SIZE)))
    return [size for size in every if _clusters(size) <= size["n"]]


def _cost(cost: Callable[[int, int, int, int], float], values: dict[str, Any]) -> float:
    return cost(values["n"], values["d"], _clusters(values), values["restarts"])


def _clusters(values: dict[str, Any]) -> int:
    return values["n"] if values["k"] == "n" else values["k"]


def _draw(rng: np.random.RandomState) -> dict[str, Any]:
    return {name: options[rng.randint(len(options))] for name, options in PROPERTIES.items()}
