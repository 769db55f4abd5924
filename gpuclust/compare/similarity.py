"""Where the rows of a layer lie: two principal components to draw, and the silhouette of its clusters.

Both come from one Gram matrix of (a sample of) the centred rows, summed in float64 over slices of features, so that no
second copy of the rows is ever made, and they stay on their device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpuclust.compare.passes import Picked, Resident, Source
from gpuclust.compare.workspace import EIGEN_ROWS, KRYLOV_BLOCK, KRYLOV_STEPS, Workspace
from gpuclust.errors import InputError

# Rows and columns of the Gram matrix that are multiplied at a time: only the blocks on and above the diagonal are.
_TILE = 512


@dataclass(frozen=True)
class Geometry:
    """The rows of a layer seen from outside.

    Attributes
    ----------
    projection : float32 array (n, 2)
        Coordinates of the rows on the first two principal components, in the units of the rows.
    explained : tuple of float
        Share of the variance (of the sampled rows) that each of the two explains.
    silhouette : float
        Mean silhouette of the sampled rows in Euclidean distance; NaN where it is not defined, which is with fewer than
        2 clusters among them or with every row a cluster of its own.
    silhouette_n : int
        Number of sampled rows; n where all of them were taken.
    """

    projection: np.ndarray
    explained: tuple[float, float]
    silhouette: float
    silhouette_n: int


def sample_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Rows to look at: all where ``n <= most``, otherwise ``most`` distinct ones, the same on every machine.

    Returns
    -------
    int64 array (min(n, most),), sorted
    """
    if n <= most:
        return np.arange(n)
    # Raw bits: unlike what is derived from them, numpy promises that they stay the same.
    keys = np.random.PCG64(seed).random_raw(n)
    return np.sort(np.argsort(keys, kind="stable")[:most])


def geometry(
    rows: torch.Tensor | Source,
    labels: np.ndarray | torch.Tensor,
    k: int,
    *,
    seed: int,
    most: int = 2048,
    memory_limit: int | None = None,
) -> Geometry:
    """Principal components and silhouette of the rows of a layer.

    Parameters
    ----------
    rows : torch.Tensor or source (n, d), floating
        Any device that has float64, any strides. Nothing of it is copied to the host but the result. Of a source whose
        rows don't lie on the device, `geometry_passes` passes are made.
    labels : integer array or tensor (n,)
        Cluster of each row, 0 to ``k - 1``.
    k : int
        Number of clusters.
    seed : int
        Of the sample that is taken where ``n > most``.
    most : int
        Rows of the sample. With ``n <= most`` everything is exact; otherwise the silhouette is that of the sample, as
        ``sklearn.metrics.silhouette_score(rows[sample], labels[sample])`` with ``sample_rows(n, most, seed)``, and
        the components are fitted to the sample and all rows projected on them.
    memory_limit : int, optional
        Bytes that may be held at a time beside the rows (and what their source holds for a pass, of chunks that need
        not be longer than a block), `geometry_bytes` at least. By default, what one pass over the sample needs.

    Returns
    -------
    Geometry
        The same bits for the same rows, labels, k, seed and most on one kind of device and number of threads, wherever
        the rows lie, whatever their chunks and the limit. The sign of a component is such that the sampled row farthest
        out on it lies on the positive side.

    Raises
    ------
    InputError
        If the shapes do not fit or there are no rows.
    MemoryLimitError
        If the limit leaves too little room.

    Notes
    -----
    `gpuclust.compare.workspace` has the formula of the workspace: about 8 bytes per pair of sampled rows (32 MiB for
    2048), a slice of features (8 MiB on the CPU, 64 MiB on a GPU) and, where n > most, five vectors of d float64. Time
    is that of multiplying ``min(n, most)`` rows with one another in float64, the precision in which distances between
    equal and nearly equal rows are still right.

    The Gram matrix of the sample is a sum over slices of the features, so of streamed rows the sample is held so many
    slices at a time as the limit leaves room for, one pass each. Where all fit they are held for the axes, too;
    otherwise these, sums over the sampled rows, take one more pass. Where n > most the last pass projects all rows.
    """
    n, d = rows.shape if len(rows.shape) == 2 else (0, 0)
    labels = torch.as_tensor(labels, device=rows.device).long()
    if not n or not d or labels.shape != (n,) or k < 1 or most < 2:
        raise InputError(
            "geometry takes rows (n, d) with a label each, k of at least 1 and most of at least 2; "
            f"got rows {tuple(rows.shape)}, labels {tuple(labels.shape)}, k={k}, most={most}"
        )
    source = Resident(rows) if isinstance(rows, torch.Tensor) else rows
    work = Workspace(n, d, k, source.dtype.itemsize, source.resident, source.device.type, most)
    index = sample_rows(n, most, seed)
    gram, sample, means = _sum_products(Picked(source, index, work), work, memory_limit)
    _mirror(gram)
    coordinates, explained = _components(gram, seed)
    if means is not None:
        coordinates = _project(Picked(source, None, work), sample, coordinates, means)
    del sample, means
    projection = coordinates.float().cpu().numpy()
    del coordinates
    return Geometry(
        projection=projection,
        explained=explained,
        silhouette=_silhouette(gram, labels[torch.as_tensor(index, device=labels.device)], k),
        silhouette_n=len(index),
    )


def _sum_products(
    sample: Picked, work: Workspace, memory_limit: int | None
) -> tuple[torch.Tensor, Picked, torch.Tensor | None]:
    """Gram matrix (m, m) of the centred sample; the sample, as it is read best from now on; and its mean (d,), where
    other rows are to be centred, too."""
    device, features = sample.source.device, work.features(memory_limit)
    if work.holds(memory_limit):
        sample = sample.held()
    gram = torch.zeros(work.m, work.m, dtype=torch.float64, device=device)
    means = torch.empty(work.d, dtype=torch.float64, device=device) if work.sampled else None
    for span, part, mean in sample.slices(features):
        _add_products(gram, part)
        if means is not None:
            means[span] = mean
    return gram, sample, means


def _add_products(gram: torch.Tensor, part: torch.Tensor) -> None:
    """Add the products of the rows of ``part`` to the blocks of ``gram`` on and above its diagonal."""
    for start in range(0, len(part), _TILE):
        block = part[start : start + _TILE]
        gram[start : start + _TILE, start:].addmm_(block, part[start:].t())


def _mirror(gram: torch.Tensor) -> None:
    """Fill in what is below the diagonal."""
    for start in range(0, len(gram), _TILE):
        tile = slice(start, start + _TILE)
        gram[tile, tile] = gram[tile, tile].triu() + gram[tile, tile].triu(1).t()
        gram[start + _TILE :, tile] = gram[tile, start + _TILE :].t()


def _components(gram: torch.Tensor, seed: int) -> tuple[torch.Tensor, tuple[float, float]]:
    """Coordinates (m, 2) on the first two principal components, and the share of the variance of each."""
    m = len(gram)
    total = gram.diagonal().sum()
    if m <= EIGEN_ROWS:
        values, vectors = torch.linalg.eigh(gram)
    else:
        values, vectors = _leading(gram, seed)
    coordinates = torch.zeros(m, 2, dtype=gram.dtype, device=gram.device)
    shares = [0.0, 0.0]
    for j in range(min(2, m)):
        value, vector = values[-1 - j], vectors[:, -1 - j]
        # What is left after the last real component is rounding, not a direction.
        if float(value) > float(total) * m * torch.finfo(gram.dtype).eps:
            coordinates[:, j] = vector * vector[vector.abs().argmax()].sign() * value.sqrt()
            shares[j] = float(value / total)
    return coordinates, (shares[0], shares[1])


def _leading(gram: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ritz values and vectors of a block Krylov space (Musco and Musco 2015); the largest are those of ``gram``."""
    start = np.random.PCG64(seed).random_raw(len(gram) * KRYLOV_BLOCK).astype(np.float64) / 2.0**64 - 0.5
    block = torch.as_tensor(start.reshape(len(gram), KRYLOV_BLOCK), device=gram.device)
    blocks: list[torch.Tensor] = []
    for _ in range(KRYLOV_STEPS):
        block = gram @ block
        for earlier in blocks:
            block -= earlier @ (earlier.t() @ block)
        block = torch.linalg.qr(block).Q
        blocks.append(block)
    # Once more over all: where the rank is exhausted the last blocks are not orthogonal to the others.
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    values, vectors = torch.linalg.eigh(basis.t() @ (gram @ basis))
    return values, basis @ vectors


def _project(rows: Picked, sample: Picked, coordinates: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """All rows on the components whose coordinates (m, 2) of the sampled rows, of this mean (d,), are given."""
    axes = _axes(sample, coordinates, means)
    projected = torch.empty(rows.count, 2, dtype=torch.float64, device=means.device)
    for start, block in rows.blocks():
        torch.mm(block.sub_(means), axes, out=projected[start : start + len(block)])
    return projected


def _axes(sample: Picked, coordinates: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Unit vectors (d, 2) along the components; 0 where there is none."""
    lengths = coordinates.square().sum(0)
    weights = torch.where(lengths > 0, coordinates / lengths.sqrt().clamp_min(torch.finfo(lengths.dtype).tiny), 0.0)
    axes = torch.zeros(len(means), 2, dtype=torch.float64, device=means.device)
    for start, block in sample.blocks():
        axes.addmm_(block.sub_(means).t(), weights[start : start + len(block)])
    axes /= torch.where(lengths > 0, lengths.sqrt(), 1.0)
    return axes


def _silhouette(gram: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Mean silhouette from products of centred rows; ``gram`` (m, m) is overwritten with the distances."""
    m = len(gram)
    counts = torch.bincount(labels, minlength=k).double()
    if not 2 <= int((counts > 0).sum()) < m:
        return float("nan")
    norms = gram.diagonal().clone()
    member = torch.zeros(m, k, dtype=torch.float64, device=gram.device)
    member.scatter_(1, labels[:, None], 1.0)
    dist = gram.mul_(-2).add_(norms).add_(norms[:, None]).clamp_min_(0).sqrt_().fill_diagonal_(0)
    sums = dist @ member
    own = sums.gather(1, labels[:, None])[:, 0] / (counts[labels] - 1)
    sums /= counts
    sums.masked_fill_((member > 0) | (counts == 0), float("inf"))
    other = sums.amin(1)
    # A cluster of one row counts 0 (its own distance is 0 / 0), and so does a row at distance 0 from two clusters.
    return float(((other - own) / torch.maximum(own, other)).nan_to_num_(0.0).mean())
