"""The adapters: each that is installed solves a small problem; each that is not says so."""

from __future__ import annotations

import pytest
import torch

from gpuclust.bench.case import Case, make_rows
from gpuclust.bench.ours import Ours, our_backends
from gpuclust.bench.peers import OPS, Peer, Stored, all_peers, choose_ops, choose_peers
from gpuclust.bench.quality import examine, inertia, nearest_labels
from gpuclust.cluster.backends import survey
from gpuclust.errors import InputError

CPU = torch.device("cpu")
PEERS = [*all_peers(), *our_backends(CPU)]
# Draws its own start.
OWN_START = "fastkmeans"


@pytest.fixture(params=["float32", "float16"])
def rows(request):
    case = Case(400, 6, 5, dtype=request.param, n_init=2)
    return make_rows(case, CPU)


@pytest.fixture(params=[peer for peer in PEERS if not peer.unavailable(CPU)], ids=lambda peer: peer.name)
def peer(request):
    return request.param


def lloyd(x, start, iterations):
    """k-means in float64."""
    centroids = start.double()
    for _ in range(iterations):
        labels = torch.cdist(x.double(), centroids).argmin(1)
        for j in labels.unique():
            centroids[j] = x[labels == j].double().mean(0)
    return centroids, torch.cdist(x.double(), centroids).argmin(1)


def test_a_fit_makes_so_many_iterations_from_the_same_start(peer, rows):
    x, starts = rows.x[0], rows.starts[0]
    work = peer.fit(Stored(x), starts, 3)
    found = work.read(work.call())
    expected = [lloyd(x, start, 3) for start in starts]
    best = min(inertia(x, *one) for one in expected)
    for one in found:
        assert one.n_iter == 3
        assert one.centroids.shape == (5, 6)
        assert examine(x, one.centroids, one.labels).wrong <= (0 if peer.exact else 4)
    if peer.name != OWN_START:
        assert min(inertia(x, one.centroids, one.labels) for one in found) == pytest.approx(best, rel=1e-4)
    # Once more: a call leaves nothing behind.
    again = work.read(work.call())
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(found, again, strict=True))


def test_labels_for_given_centroids(peer, rows):
    x, start = rows.x[0], rows.starts[0, 0]
    work = peer.assign(Stored(x), start)
    (found,) = work.read(work.call())
    assert examine(x, start, found.labels).wrong <= (0 if peer.exact else 4)


def test_an_update_is_the_mean_and_keeps_what_has_no_row(peer, rows):
    if "update" not in peer.ops:
        return
    x, start = rows.x[0], rows.starts[0, 0]
    labels = nearest_labels(x, start)
    labels[labels == 2] = 1
    work = peer.update(Stored(x), labels, start)
    if work is None:
        assert peer.name in ("scikit-learn", "faiss-cpu", "fastkmeans")
        return
    (found,) = work.read(work.call())
    for j in range(5):
        expected = x[labels == j].double().mean(0).float() if j != 2 else start[2]
        torch.testing.assert_close(found.centroids[j], expected, rtol=1e-5, atol=1e-6)


def test_seeds_are_distinct_rows(peer, rows):
    if "seed" not in peer.ops:
        return
    x = rows.x[0]
    work = peer.seed(Stored(x), 5, 1)
    if work is None:
        assert peer.name in ("torch", "fastkmeans")
        return
    (found,) = work.read(work.call())
    same = (found.centroids.float()[:, None] == x.float()[None]).all(2)
    assert same.any(1).all()
    assert len(found.centroids.unique(dim=0)) == 5


@pytest.mark.gpu
def test_everybody_that_runs_on_a_gpu():
    device = torch.device("cuda", 0)
    rows = make_rows(Case(4096, 64, 16), device)
    x, starts = rows.x[0], rows.starts[0]
    expected = inertia(x, *lloyd(x, starts[0], 3))
    for peer in [*our_backends(device), *all_peers()]:
        if peer.unavailable(device):
            continue
        work = peer.fit(Stored(x), starts, 3)
        (found,) = work.read(work.call())
        # Reduced precision, and labels from before the last update, are not this test's business.
        assert examine(x, found.centroids, found.labels).mislabel_rate <= (0 if peer.exact else 0.2), peer.name
        if peer.name != OWN_START:
            assert inertia(x, found.centroids, found.labels) == pytest.approx(expected, rel=0.02), peer.name
        (found,) = (given := peer.assign(Stored(x), starts[0])).read(given.call())
        assert examine(x, starts[0], found.labels).mislabel_rate <= (0 if peer.exact else 0.05), peer.name


def test_who_is_not_there_says_so_in_a_line():
    reasons = {peer.name: peer.unavailable(CPU) for peer in PEERS}
    for name in ("faiss-gpu", "flash-kmeans", "flashlib", "cuml"):
        assert "needs a CUDA device" in reasons[name] or "not installed" in reasons[name]
    assert reasons["torch"] is None
    assert reasons["gpuclust torch"] is None
    assert all("\n" not in reason for reason in reasons.values() if reason)


def test_a_module_that_does_not_import_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "a_broken_peer.py").write_text("raise OSError('libcudart.so.11: not found\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)

    class Broken(Peer):
        name = module = "a_broken_peer"

    assert Broken().unavailable(CPU) == "a_broken_peer does not import: OSError: libcudart.so.11: not found"


def test_every_backend_of_the_survey_is_measured():
    names = [peer.name for peer in our_backends(CPU)]
    assert {f"gpuclust {name}" for name in survey()} <= set(names)
    assert names[0] == "gpuclust torch"  # what auto takes on a CPU: the others are compared with it
    assert "gpuclust dual" in names
    for name, reason in survey().items():
        assert Ours(name).unavailable(CPU) == reason


def test_seeding_is_measured_once_and_for_many_clusters_by_k_means_parallel_too():
    backends = our_backends(CPU)
    assert [peer.name for peer in backends if "seed" in peer.ops] == ["gpuclust torch", "gpuclust k-means||"]
    scalable = next(peer for peer in backends if peer.name == "gpuclust k-means||")
    assert scalable.ops == ("seed",)
    assert "100 clusters and more" in scalable.refuses(Case(500, 4, 99), CPU)
    many = Case(3000, 4, 120)
    assert scalable.refuses(many, CPU) is None
    x = make_rows(many, CPU).x[0]
    seeds = []
    for peer in (backends[0], scalable):
        work = peer.seed(Stored(x), many.k, 0)
        (found,) = work.read(work.call())
        assert len(found.centroids.unique(dim=0)) == many.k
        assert bool((found.centroids[:, None] == x[None]).all(2).any(1).all())
        seeds.append(found.centroids)
    assert not torch.equal(*seeds)


def test_peers_and_operations_are_chosen_by_name():
    assert [peer.name for peer in choose_peers("scikit-learn, torch")] == ["torch", "scikit-learn"]
    assert choose_peers("none") == []
    assert len(choose_peers("all")) == len(all_peers())
    with pytest.raises(InputError, match="got 'sklearn'"):
        choose_peers("torch,sklearn")
    assert choose_ops("seed,assign") == ["assign", "seed"]
    assert choose_ops(OPS) == list(OPS)
    with pytest.raises(InputError, match="got 'predict'"):
        choose_ops("predict")
    with pytest.raises(InputError, match="got none"):
        choose_ops(" , ")
