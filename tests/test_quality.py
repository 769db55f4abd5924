"""The check of labels: against a plain float64 loop, on ties, offsets, wrong labels and samples."""

from __future__ import annotations

import pytest
import torch

from gpuclust.bench import quality
from gpuclust.bench.quality import examine, inertia, nearest_labels


def reference(x, centroids):
    """Squared distances (n, k) by differences in float64."""
    return torch.stack([(x.double() - c.double()).square().sum(1) for c in centroids], dim=1)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 9, generator=generator)
    return x, x[::71].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_right_labels_are_right(problem, dtype, offset):
    x, centroids = (problem[0] + offset).to(dtype), (problem[1] + offset).float()
    dist2 = reference(x, centroids)
    found = examine(x, centroids, dist2.argmin(1).int())
    assert (found.wrong, found.checked, found.mislabel_rate) == (0, 500, 0.0)
    assert found.inertia == pytest.approx(dist2.amin(1).sum().item(), rel=1e-12)
    assert torch.equal(nearest_labels(x, centroids), dist2.argmin(1))


def test_every_wrong_label_is_counted(problem):
    x, centroids = problem
    labels = reference(x, centroids).argmin(1)
    labels[::7] = (labels[::7] + 1) % len(centroids)
    labels[3], labels[4] = -1, len(centroids)
    found = examine(x, centroids, labels)
    assert found.wrong == len(labels[::7]) + 2
    assert found.mislabel_rate == found.wrong / 500


def test_either_of_two_equal_centroids_is_right(problem):
    x, centroids = problem
    twice = torch.cat([centroids, centroids])
    labels = reference(x, centroids).argmin(1)
    assert examine(x, twice, labels).wrong == 0
    assert examine(x, twice, labels + len(centroids)).wrong == 0


def test_a_near_tie_is_decided_by_differences():
    # One centroid is nearer by a part in 1e10 of the distance: a float32 product cannot see it, and it is no rounding.
    x = torch.tensor([[1e3, 1.0]], dtype=torch.float64)
    centroids = torch.tensor([[1e3, 0.0], [1e3, 2.0 + 1e-10]], dtype=torch.float64)
    assert examine(x, centroids, torch.tensor([0])).wrong == 0
    assert examine(x, centroids, torch.tensor([1])).wrong == 1


def test_a_sample_is_seeded_and_says_its_size(problem, monkeypatch):
    x, centroids = problem
    monkeypatch.setattr(quality, "_BUDGET_OTHERWISE", 100 * x.shape[1] * len(centroids))
    labels = reference(x, centroids).argmin(1)
    labels[::2] = (labels[::2] + 1) % len(centroids)
    found = [examine(x, centroids, labels, seed) for seed in (0, 0, 1)]
    assert [one.checked for one in found] == [100] * 3
    assert found[0] == found[1]
    assert 25 < found[0].wrong < 75
    assert found[0].inertia == pytest.approx(inertia(x, centroids, labels))


def test_labels_of_another_length_are_an_error(problem):
    x, centroids = problem
    with pytest.raises(ValueError, match="there are 500 rows"):
        examine(x, centroids, torch.zeros(499))
