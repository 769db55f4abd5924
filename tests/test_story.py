"""What a verbose fit tells: scikit-learn's lines, with each restart's number, of the primal and the dual solver."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import pytest
from cases_cluster import KINDS, blobs
from sklearn.cluster import KMeans as Peer

from gpuclust import KMeans

NUMBER = r"(\d[-+.e\d]*)"


def told(x: np.ndarray, peer: bool = False, **options: Any) -> tuple[list[str], Any]:
    """The lines that a fit prints, and the model."""
    with redirect_stdout(StringIO()) as printed:
        model = (Peer if peer else KMeans)(**{"verbose": 1, "random_state": 0, **options}).fit(x)
    return printed.getvalue().splitlines(), model


def iterations(lines: list[str], restart: str = "") -> list[tuple[int, float]]:
    """Number and inertia of each iteration."""
    found = [re.match(rf"Iteration (\d+), inertia {NUMBER}{restart}\.$", line) for line in lines]
    return [(int(match[1]), float(match[2])) for match in found if match]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("kind", ["noise", "relu", "offset"])
def test_iterations_are_those_of_scikit_learn_from_the_same_centroids(kind: str, solver: str, weighted: bool) -> None:
    x = KINDS[kind](np.random.RandomState(0), 300, 20)
    options: dict[str, Any] = {"n_clusters": 6, "init": x[:6], "n_init": 1, "max_iter": 9, "tol": 0}
    if weighted:
        kept = np.arange(300) % 3 > 0
        options["init"] = x[kept][:6]
    # scikit-learn prints unweighted inertias where rows have weights: rows without any are left out for it.
    theirs, _ = told(x[kept] if weighted else x, peer=True, **options)
    with redirect_stdout(StringIO()) as printed:
        KMeans(**options, solver=solver, verbose=1).fit(x, sample_weight=kept * 1.0 if weighted else None)
    ours = iterations(printed.getvalue().splitlines(), ", restart 0")
    peers = iterations(theirs)
    assert [number for number, _ in ours] == [number for number, _ in peers]
    assert len(ours) >= 3
    np.testing.assert_allclose([inertia for _, inertia in ours], [inertia for _, inertia in peers], rtol=1e-8)


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_each_restart_says_how_it_ended(solver: str) -> None:
    x = blobs(np.random.RandomState(1), 200, 10)
    for tol, max_iter, says in (
        (0, 300, r"strict convergence\."),
        (0.05, 300, rf"center shift {NUMBER} within tolerance {NUMBER}\."),
        (0, 2, None),
    ):
        lines, model = told(
            x, n_clusters=9, init="random", n_init=3, solver=solver, tol=tol, max_iter=max_iter, random_state=3
        )
        assert lines.count("Initialization complete") == 1
        ends = [
            match for line in lines if (match := re.match(r"Converged at iteration (\d+), restart (\d): (.*)", line))
        ]
        for restart in range(3):
            last = iterations(lines, f", restart {restart}")[-1][0]
            assert [line for line in lines if line.startswith(f"restart {restart}: {last + 1} iterations, inertia ")]
            assert [int(end[1]) for end in ends if int(end[2]) == restart] == ([last] if says else [])
        assert all(re.fullmatch(says or "", end[3]) for end in ends)
        if solver == "primal" and tol:
            for end in ends:
                shift, tolerance = map(float, re.findall(NUMBER, end[3].removesuffix("."))[-2:])
                assert 0 < shift <= tolerance == pytest.approx(tol * x.var(0).mean(), rel=1e-4)
        assert model.n_iter_ <= max_iter


def test_a_fit_that_fills_empty_clusters_tells_every_iteration() -> None:
    x = blobs(np.random.RandomState(1), 300, 5)
    init = np.concatenate([x[:3], np.full((3, 5), 1e3) + np.arange(3)[:, None]])
    lines, model = told(x, n_clusters=6, init=init, tol=0)
    assert [number for number, _ in iterations(lines, ", restart 0")] == list(range(model.n_iter_))


def test_the_metric_cosine_counts_one_less_the_cosine() -> None:
    x = blobs(np.random.RandomState(1), 100, 5)
    lines, model = told(x, n_clusters=4, metric="cosine", tol=0)
    assert iterations(lines, ", restart 0")[-1][1] == pytest.approx(model.inertia_, rel=1e-8)


def test_without_verbose_nothing_is_told_and_no_inertia_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuclust.cluster.lloyd import Lloyd

    asked: list[int] = []
    plain = Lloyd.inertia
    monkeypatch.setattr(Lloyd, "inertia", lambda *given: asked.append(1) or plain(*given))
    x = blobs(np.random.RandomState(1), 200, 10)
    lines, _ = told(x, n_clusters=4, n_init=2, verbose=0)
    assert lines == []
    assert len(asked) == 2
