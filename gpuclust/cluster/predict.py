"""What known centroids say about rows: labels, distances, inertia. Rows are read once, in chunks, each on its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpuclust.cluster.backends.base import Backend
from gpuclust.cluster.exact import Frame, reference_dist2
from gpuclust.cluster.moments import centroid_dtype, largest_per_column, require_range
from gpuclust.cluster.sources.base import ChunkSource, block_rows

# Below this share of the squared norms, a distance by products has lost too much to cancellation.
_CANCELLED = 2.0**-20


def nearest(
    source: ChunkSource,
    centroids: torch.Tensor,
    backend: Backend,
    precision: str = "exact",
) -> torch.Tensor:
    """The nearest of the centroids (k, d) for every row: int32 (n,).

    Raises
    ------
    InputError
        For NaN and infinity in the rows, and for values whose squared distances overflow float64.
    """
    n, d = source.shape
    labels = torch.empty(1, n, dtype=torch.int32, device=source.device)
    dtype = centroid_dtype(source.dtype)
    most = torch.finfo(dtype).max  # centroids of another type may be beyond it
    centre = centroids.double().mean(0).clamp_(-most, most).to(dtype).double()
    reach2 = _far2(centroids, centre).amax().item()
    for start, x in source.chunks(backend.chunk_rows(1, len(centroids), d, source.device)):
        largest = largest_per_column(x, start, backend).amax().item()
        dist2 = _far2(x, centre) if x.device.type == "cpu" else backend.dist2(x, centre) * (1 + 2.0**-40)
        far2 = dist2.amax().item()
        # No distance of a row to a centroid is above twice the sum of theirs to one point.
        require_range(2 * (far2 + reach2), largest)
        frame = Frame.of(source.dtype, centre, largest, dist2.mean().item(), far2)
        found = labels[:, start : start + x.shape[0]]
        operand = backend.prepare(frame, centroids[None], source.dtype)
        backend.assign(x, frame.norms(dist2), operand, found, precision)
    return labels[0]


def _far2(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Upper bounds of the squared distances of rows (b, d) to one point: float64 (b,), a little above them."""
    dist2 = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    size = block_rows(x.shape[1], x.device)
    for start in range(0, x.shape[0], size):
        away = x[start : start + size] - centre
        dist2[start : start + size] = torch.linalg.vecdot(away, away)
    return dist2.mul_(1 + (x.shape[1] + 4) * 2.0**-52)


def dist2_to_all(source: ChunkSource, centroids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Chunk by chunk, the rows and their squared distances to all centroids (k, d): float64 (b, k).

    By products of centred values in float64; where they cancel, by the difference form.

    Raises
    ------
    InputError
        For NaN and infinity in the rows, and for values whose squared distances overflow float64.
    """
    centre = centroids.double().mean(0)
    moved = centroids.double() - centre
    square = torch.linalg.vecdot(moved, moved)
    reach2 = square.amax().item()
    for start, x in source.chunks(block_rows(max(centroids.shape), source.device)):
        largest = largest_per_column(x, start).amax().item()
        rows = x.double() - centre
        far2 = torch.linalg.vecdot(rows, rows)
        require_range(2 * (far2.amax().item() + reach2), largest)
        norms = far2[:, None] + square
        dist2 = torch.addmm(norms, rows, moved.t(), alpha=-2.0)
        # Not "less": what overflowed to no number must be read again.
        row, which = (dist2 >= norms * _CANCELLED).logical_not_().nonzero(as_tuple=True)
        dist2[row, which] = reference_dist2(x, centroids, which, row)
        yield slice(start, start + x.shape[0]), dist2
