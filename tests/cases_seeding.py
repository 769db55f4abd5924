"""What draws may depend on: the same check for every way of choosing rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases_cluster import rows

from gpuclust.cluster.seeding import image

BUDGET = 1 << 26


def check_draws(
    choose: Callable[..., list[list[int]]], kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws of ``choose(x, k, restarts, *, seed, weights, budget)`` depend on the rows, the seed and the restart alone:
    not on chunks, memory, threads or the other restarts."""
    x = rows(kind, 500, 8)
    weights = np.random.RandomState(0).exponential(size=500) if weighted else None
    whole = choose(x, 12, range(6), weights=weights)
    assert choose(x, 12, range(2, 4), weights=weights) == whole[2:4]
    assert choose(x, 12, range(6), weights=weights, budget=1) == whole
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert choose(x, 12, range(6), weights=weights) == whole
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(image, "tile_rows", lambda d, device: 13)
    monkeypatch.setattr(image, "block_rows", lambda d, device: 5)
    monkeypatch.setattr(image, "_POINTS", 3)
    for budget in (1, BUDGET):
        assert choose(x, 12, range(6), weights=weights, budget=budget) == whole
    assert choose(x, 12, range(6), weights=weights, seed=1) != whole
