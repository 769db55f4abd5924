"""The memory limit: what tensors take in a fit, counted by torch's own allocator, is within what was allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import rows
from cases_rows import mapped, peak_bytes, same

from gpuclust import KMeans
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.memory import Needs, default_limit, dual_needs, halvings_within, primal_needs
from gpuclust.errors import MemoryLimitError

CPU = torch.device("cpu")
# Some more than is needed at least, and what all restarts at a time and chunks of the usual size take.
LIMITS: dict[str, Callable[[Needs, int], int]] = {
    "least": lambda needs, restarts: needs.least,
    "plenty": lambda needs, restarts: needs.fixed + restarts * needs.restart + 2 * needs.work,
}
CASES: dict[str, tuple[tuple[int, int, int, int], torch.dtype, dict[str, Any]]] = {
    "narrow": ((100_000, 4, 5, 3), torch.float32, {}),
    "wide": ((300, 20_000, 5, 4), torch.float32, {}),
    "half": ((3000, 1500, 20, 3), torch.float16, {"init": "random"}),
    "double": ((3000, 256, 20, 3), torch.float64, {"init": "random"}),
    "many clusters": ((2000, 64, 1000, 2), torch.float32, {"init": "random"}),
    "many values of centroids": ((600, 2000, 200, 2), torch.float32, {"init": "random"}),
    "sketched": ((5000, 256, 10, 4), torch.float32, {}),
    "gaps": ((220_000, 4, 5, 2), torch.float32, {"max_iter": 15}),
    "gaps, half": ((40_000, 3, 30, 2), torch.float16, {"max_iter": 20}),
    "k-means||": ((5000, 64, 50, 2), torch.float32, {"init": "k-means||"}),
    "weights": ((60_000, 8, 5, 2), torch.float32, {"init": "random", "weighted": True}),
    "weights, double": ((5000, 64, 20, 2), torch.float64, {"weighted": True}),
    "dual": ((300, 9000, 5, 3), torch.float32, {"solver": "dual"}),
    "dual, double": ((200, 9000, 40, 3), torch.float64, {"solver": "dual", "init": "random"}),
    "single rows move": ((2000, 100, 6, 2), torch.float32, {"algorithm": "hartigan-wong"}),
    "cosine": ((2000, 300, 6, 2), torch.float32, {"metric": "cosine"}),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_a_fit_stays_within_its_limit(case: str, limit: str) -> None:
    (n, d, k, restarts), dtype, options = CASES[case]
    parameters = {"n_init": restarts, "random_state": 0, "max_iter": 3, **options}
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.5 if parameters.pop("weighted", 0) else None
    needs_of = dual_needs if parameters.get("solver") == "dual" else primal_needs
    problem = Problem(n, d, k, dtype, CPU, weights is not None, restarts)
    needs = needs_of(problem, n, None if weights is None else 0.25)
    # A quarter is for the chunks of unit rows.
    allowed = LIMITS[limit](needs, restarts) * 4 // 3 if case == "cosine" else LIMITS[limit](needs, restarts)
    x = rows("relu", n, d, dtype) + (1 if case == "cosine" else 0)
    model, plain = KMeans(k, memory_limit=allowed + 4, **parameters), KMeans(k, **parameters)
    taken = peak_bytes(lambda: model.fit(x, sample_weight=weights))
    assert 0.05 * needs.fixed < taken <= allowed
    assert peak_bytes(lambda: plain.fit(x, sample_weight=weights)) <= default_limit(problem, n, needs)
    same(model, plain)


@pytest.mark.parametrize("summed", [1, 3, 6])
@pytest.mark.parametrize("max_iter", [1, 4])
def test_empty_clusters_of_wide_rows_are_filled_within_the_limit(summed: int, max_iter: int) -> None:
    n, d, k = 200, 60_000, 6
    x = rows("relu", n, d)
    init = x[[5, 9, 5, 70, 9, 3]].clone()  # no row is nearest to a centroid that another is equal to
    needs = dual_needs(Problem(n, d, k, x.dtype, CPU), n)
    allowed = needs.least + (summed - 1) * needs.sums
    assert needs.within(allowed, 1).summed == summed
    parameters = {"init": init, "n_init": 1, "max_iter": max_iter, "tol": 0.0}
    model = KMeans(k, memory_limit=allowed + 4, solver="dual", **parameters)
    assert peak_bytes(lambda: model.fit(x)) <= allowed
    assert len(np.unique(model.labels_)) > 4
    same(model, KMeans(k, solver="primal", **parameters).fit(x))


@pytest.mark.gpu
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("n", "d", "k"), [(400_000, 32, 100), (1000, 50_000, 5)], ids=["narrow", "wide"])
@pytest.mark.parametrize("backend", ["torch", "triton", pytest.param("cupy", marks=pytest.mark.nvrtc)])
def test_a_fit_on_a_gpu_stays_within_its_limit(backend: str, n: int, d: int, k: int, limit: str) -> None:
    x = rows("relu", n, d).cuda()
    needs = primal_needs(Problem(n, d, k, x.dtype, x.device, restarts=3), n)
    allowed = LIMITS[limit](needs, 3)
    options = {"n_init": 3, "random_state": 0, "max_iter": 3, "solver": "primal", "backend": backend}
    taken = 0
    for _ in range(2):  # in the first fit libraries take memory that they keep
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        KMeans(k, memory_limit=allowed, **options).fit(x)
        taken = torch.cuda.max_memory_allocated() - before
    assert 0.05 * needs.fixed < taken <= allowed


def test_what_is_given_without_a_limit_is_a_tenth_of_the_rows_and_256_mib() -> None:
    problem = Problem(1_000_000, 512, 4096, torch.float16, torch.device("cuda"), restarts=1)
    needs = primal_needs(problem, problem.n)
    assert default_limit(problem, problem.n, needs) == 256 * 2**20 + 1_000_000 * 512 * 2 // 10 >= needs.least
    share = needs.within(default_limit(problem, problem.n, needs), 1)
    assert needs.used(share) + share.spare_bytes <= default_limit(problem, problem.n, needs)


@pytest.mark.parametrize("restarts", [1, 10])
@pytest.mark.parametrize("limit", [5_000_000, 40_000_000, 300_000_000, 10**10])
def test_shares_fill_a_limit_and_no_more(limit: int, restarts: int) -> None:
    needs = primal_needs(Problem(20_000, 128, 10, torch.float32, CPU), 20_000)
    share = needs.within(limit, restarts)
    assert 1 <= share.together <= restarts
    assert needs.used(share) + share.spare_bytes <= limit
    assert share.together == restarts or share.spare_bytes < needs.restart
    assert halvings_within(10**12, CPU) == 0 < halvings_within(4_000_000, CPU) <= halvings_within(0, CPU)


def test_what_is_asked_of_a_model_stays_within_its_limit() -> None:
    x = rows("relu", 20_000, 64)
    model = KMeans(50, random_state=0, max_iter=2, memory_limit=6_000_000).fit(x)
    plain = KMeans(50, random_state=0, max_iter=2).fit(x)
    for method, result_bytes in (("predict", 4 * 20_000), ("score", 0)):
        call = getattr(model, method)
        assert peak_bytes(lambda call=call: call(x)) <= 6_000_000 + result_bytes
        np.testing.assert_array_equal(getattr(model, method)(x), getattr(plain, method)(x))


def test_a_limit_that_is_too_little_is_an_error_that_says_what_is_needed(tmp_path: Any) -> None:
    x = rows("relu", 3000, 40)
    least = primal_needs(Problem(3000, 40, 5, torch.float32, CPU), 3000).least
    assert KMeans(5, random_state=0, memory_limit=least).fit(x).fit_report_.solver == "primal"
    model = KMeans(5, random_state=0, memory_limit=least - 1)
    with pytest.raises(MemoryLimitError, match=rf"this fit takes at least .*\({least:,} bytes\): set memory_limit to"):
        model.fit(x)
    with pytest.raises(MemoryLimitError):
        KMeans(5, memory_limit=1).fit(mapped(tmp_path, x.numpy()))
    assert not hasattr(model, "labels_")
