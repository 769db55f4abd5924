"""How good labels are, whoever gave them: rows whose centroid is not the nearest in float64, and the inertia."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Pairs of a row and a centroid, times features, that a check may cost: above it a seeded sample of the rows is checked.
_BUDGET = {"cuda": 4e12}
_BUDGET_OTHERWISE = 2e10
_CHUNK_VALUES = {"cuda": 1 << 26}
# Distances that differ by less, relatively, are the same but for the rounding of a float64 sum.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Quality:
    """Of labels against centroids.

    Attributes
    ----------
    wrong : int
        Rows, of those checked, with a centroid that is nearer than their own.
    checked : int
        Rows that were checked.
    inertia : float
        Sum over all rows of the squared distance to their own centroid, in float64.
    """

    wrong: int
    checked: int
    inertia: float

    @property
    def mislabel_rate(self) -> float:
        return self.wrong / max(1, self.checked)

    def __add__(self, other: Quality) -> Quality:
        return Quality(self.wrong + other.wrong, self.checked + other.checked, self.inertia + other.inertia)


def examine(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Quality:
    """Compare labels with the distances to all centroids, in float64 and by differences.

    A product of centred rows says which centroids can be the nearest at all (it is off by less than a share of 1e-11
    of the squared norms); where that is not one alone, the difference form decides.

    Parameters
    ----------
    x : (n, d)
    centroids : (k, d)
    labels : whole numbers (n,)
        A label outside 0 .. k - 1 is wrong.
    seed : int
        Of the sample, where not all rows are checked.
    """
    (n, d), k = x.shape, len(centroids)
    device = x.device
    centroids, labels = centroids.to(device, torch.float64), labels.to(device, torch.int64)
    if labels.shape != (n,):
        raise ValueError(f"labels have the shape {tuple(labels.shape)}, and there are {n} rows")
    checked = min(n, max(1, int(_BUDGET.get(device.type, _BUDGET_OTHERWISE) / (k * d))))
    chosen = torch.ones(n, dtype=torch.bool, device=device)
    if checked < n:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        chosen[order[checked:].to(device)] = False
    inside = (labels >= 0) & (labels < k)
    own = labels.clamp(0, k - 1)
    mean = centroids.mean(0)
    moved = centroids - mean
    square = moved.square().sum(1)
    wrong, inertia = 0, 0.0
    size = max(1, _CHUNK_VALUES.get(device.type, 1 << 20) // max(d, k))
    for start in range(0, n, size):
        part = slice(start, start + size)
        rows = x[part].double()
        mine = (rows - centroids[own[part]]).square_().sum(1)
        inertia += mine.sum().item()
        keep = chosen[part]
        wrong += int((~inside[part] & keep).sum())
        keep = keep & inside[part]
        rows, mine = rows[keep], mine[keep]
        centred = rows - mean
        norms = centred.square().sum(1)[:, None]
        dist2 = torch.addmm(norms + square, centred, moved.t(), alpha=-2.0)
        slack = 1e-11 * (norms + square.amax())
        possible = dist2 <= dist2.amin(1, keepdim=True) + slack
        right = possible.gather(1, own[part][keep][:, None])[:, 0]
        wrong += int((~right).sum())
        unsure = (right & (possible.sum(1) > 1)).nonzero()[:, 0]
        least = mine[unsure]
        row, which = possible[unsure].nonzero(as_tuple=True)
        for some, centroid in zip(row.split(size), which.split(size), strict=True):
            found = (rows[unsure[some]] - centroids[centroid]).square_().sum(1)
            least.scatter_reduce_(0, some, found, "amin")
        wrong += int((mine[unsure] > least * (1 + _ROUNDING)).sum())
    return Quality(wrong, checked, inertia)


def inertia(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of the squared distances of the rows (n, d) to the centroids (k, d) of their labels (n,), in float64."""
    centroids, labels = centroids.to(x.device, torch.float64), labels.to(x.device, torch.int64)
    size = max(1, _CHUNK_VALUES.get(x.device.type, 1 << 20) // x.shape[1])
    parts = zip(x.split(size), labels.split(size), strict=True)
    return sum((rows.double() - centroids[some]).square_().sum().item() for rows, some in parts)


def nearest_labels(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each row by a float64 product, int64 (n,): near ties may go either way."""
    centroids = centroids.to(x.device, torch.float64)
    mean = centroids.mean(0)
    moved = centroids - mean
    square = moved.square().sum(1)
    size = max(1, _CHUNK_VALUES.get(x.device.type, 1 << 20) // max(centroids.shape))
    return torch.cat(
        [torch.addmm(square, rows.double() - mean, moved.t(), alpha=-2.0).argmin(1) for rows in x.split(size)]
    )
