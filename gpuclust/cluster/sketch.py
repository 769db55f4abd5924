"""Sketch: the rows in a few dimensions, in which most labels can be told for certain at a part of a pass's price.

The centroids of all restarts lie close to a space of few dimensions, and after the first iterations they hardly leave
it. Let Q (d, m) be an orthonormal basis of such a space, x~ = (x - m) s a row, c~ a centroid, y = Q^T x~ and
z = Q^T c~. Then x~ . c~ is y . z within

    ||x~ - Q y|| ||c~ - Q z|| + (3 ||Q^T Q - I|| + f) (||x~|| + ||m|| s) ||c~||,

by Cauchy-Schwarz, where f bounds the rounding of y. That is formed in float32, from rows as they are stored where they
may be, in sums of `_SLICE` products that are then added: f = sqrt(m) (K + S + 4) u, as in `gpuclust.cluster.exact`; and
since y is not quite Q^T x~, ||x~ - Q y||^2 is known within 2 f (||x~|| + ||m|| s)^2. So a pass over y (n, m), with the
first term as one more share of the bound of `gpuclust.cluster.exact`, certifies most labels; the few rows that it
leaves open are read in full. No label depends on whether there was a sketch.

Where the data has no such space the sketch leaves many rows open, and `Sketches` goes without. The bound is that of
dimension reduction before nearest neighbours; that it holds for a basis of the centroids rather than of the rows, and
may therefore be so short, is used here as in Drineas et al., "Clustering large graphs via the singular value
decomposition", Machine Learning 56, 2004, which clusters in the space of the leading singular vectors.
"""

from __future__ import annotations

import math

import torch

from gpuclust.cluster.backends.base import Backend, Bounded, Operand
from gpuclust.cluster.backends.torch import propose
from gpuclust.cluster.exact import FLOAT32, bounded, relative_error, summing_error
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.relief import relieved
from gpuclust.cluster.sources.base import ChunkSource, block_rows

# Below so many values of X a pass costs less than the care for a sketch; with fewer rows, the centroids' own sketch.
_LEAST_VALUES, _LEAST_ROWS = 1 << 20, 1 << 12
# Dimensions of a sketch at most, and the share of d that they may be.
_MOST, _SHARE = 64, 12
# Fewer dimensions are not worth a pass.
_FEWEST = 8
# Centroids that a space is for, at most: finding it takes the cube of them.
_MOST_CENTROIDS = 256
# Rows on which a sketch is tried, and the part of a pass's price that it may cost.
_SAMPLE, _WORTH = 512, 0.4
# Products that are summed before these partial sums are added, and rows that are multiplied at a time.
_SLICE, _ROWS = 256, 1024
# Rows that are read in full at a time, at least.
_LEAST_READ = 64
# Passes before the first sketch: until then the centroids move too far.
_FIRST = 2
# What a row's distance to the space counts as at least, as a share of its distance to the mean.
_FLOOR = 2.0**-4


class Sketch:
    """Rows in the space, of ``most`` dimensions or fewer, of some centroids (r, k, d)."""

    def __init__(self, source: ChunkSource, moments: Moments, centroids: torch.Tensor, most: int) -> None:
        self.source, self.moments, self.frame = source, moments, moments.frame
        # Of float32 numbers, so that only what it lacks of being orthonormal is an error.
        self.narrow = self._basis(centroids, most).float()
        self.basis = self.narrow.double()
        d, m = self.basis.shape
        product = self.basis.t() @ self.basis
        product.diagonal().sub_(1)
        self.error = torch.linalg.vector_norm(product).item() + (m + 4) * (d + 4) * 2.0**-52
        terms = (min(d, _SLICE) + math.ceil(d / _SLICE) + 4) * FLOAT32.adding
        self.forming = math.sqrt(m) * terms / (1 - terms)
        self.lift = self.frame.offset * self.frame.scale if self.frame.stored else 0.0
        self.rows = self.norms = self.basis.new_empty(0)

    def read(self) -> None:
        """Sketch all rows: ``rows`` float32 (n, m), and ``norms`` float32 (n,), what bounds are multiplied with."""
        n, device = self.source.shape[0], self.source.device
        self.rows = torch.empty(n, self.basis.shape[1], dtype=torch.float32, device=device)
        self.norms = torch.empty(n, dtype=torch.float32, device=device)
        for start, x in self.source.chunks(relieved(_ROWS)):
            part = slice(start, start + x.shape[0])
            self.rows[part], self.norms[part] = self.of(x, self.moments.dist2[part])

    def of(self, x: torch.Tensor, dist2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sketch of rows (b, d) and their norms."""
        frame, d = self.frame, x.shape[1]
        y = torch.zeros(x.shape[0], self.basis.shape[1], dtype=torch.float32, device=x.device)
        for start in range(0, d, _SLICE):
            span = slice(start, start + _SLICE)
            y += (x[:, span] if frame.stored else frame.moved(x[:, span], span).float()) @ self.narrow[span]
        if frame.stored:
            y = (y.double() - frame.centre @ self.basis).mul_(frame.scale).float()
        far = dist2.sqrt() * frame.scale
        reach = far + self.lift
        left = far.square() * (1 + self.error) - y.double().square_().sum(1) * (1 - self.error)
        left += 2 * self.forming * reach.square()
        # At least a share of the length, so that this one number bounds the rounding, too.
        far = torch.maximum(left.clamp_(min=0).sqrt_(), _FLOOR * reach)
        return y, (far * (1 + 2.0**-20) + 2.0**-100).float()

    def open_share(self, operand: Bounded) -> float:
        """The share of labels that the sketch leaves open, on a sample of the rows."""
        n = self.source.shape[0]
        some = torch.arange(0, n, max(16, n // _SAMPLE), device=self.source.device)
        labels = torch.empty(len(operand.centroids), len(some), dtype=torch.int32, device=some.device)
        row, restart, _ = propose(*self.of(self.source.take(some), self.moments.dist2[some]), operand, labels)
        return torch.unique_consecutive(row * len(labels) + restart).numel() / labels.numel()

    def _basis(self, centroids: torch.Tensor, most: int) -> torch.Tensor:
        moved = self.frame.moved(centroids.flatten(0, 1)[:_MOST_CENTROIDS])
        vectors = torch.linalg.eigh(moved @ moved.t()).eigenvectors
        leading = moved.t() @ vectors[:, -most:]
        return torch.linalg.qr(leading / torch.linalg.vector_norm(leading, dim=0).clamp(min=2.0**-500)).Q

    def operand(self, centroids: torch.Tensor) -> Bounded:
        """The centroids (r, k, d) for a pass over the sketch."""
        flat = centroids.flatten(0, 1)
        z = torch.empty(len(flat), self.basis.shape[1], dtype=torch.float64, device=flat.device)
        square, left = z.new_empty(len(flat)), z.new_empty(len(flat))
        size = block_rows(flat.shape[1], flat.device)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            moved = self.frame.moved(flat[part])
            square[part] = torch.linalg.vecdot(moved, moved)
            z[part] = moved @ self.basis
            moved.addmm_(z[part], self.basis.t(), alpha=-1.0)
            left[part] = torch.linalg.vector_norm(moved, dim=1)
        length = square.sqrt()
        rounding = relative_error(z.shape[1], FLOAT32) + 4 * FLOAT32.rounding + 4 * self.error + self.forming
        slope = 2 * (left + length * (self.error + rounding / _FLOOR))
        margin = self.frame.margin(square, flat.shape[1], summing_error(z.shape[1], FLOAT32))
        return bounded(centroids, (z * -2.0).float(), square, slope, margin)


class Sketches:
    """When a sketch is made, used, made anew, and done without; times are in passes over all rows and centroids."""

    def __init__(
        self, backend: Backend, source: ChunkSource, moments: Moments, norms: torch.Tensor, spare_bytes: int
    ) -> None:
        self.backend, self.source, self.moments, self.norms = backend, source, moments, norms
        self.spare_bytes = spare_bytes
        n, d = source.shape
        self.most = min(_MOST, d // _SHARE)
        self.possible = (
            source.device.type == "cpu"
            and source.resident
            and n * d >= _LEAST_VALUES
            and n >= _LEAST_ROWS
            and self.most >= _FEWEST
            and not moments.frame.vanishing
        )
        self.restart()

    def restart(self) -> None:
        """Forget what other restarts needed."""
        self.sketch: Sketch | None = None
        self.start, self.wait, self.passes = _FIRST, 4, 0
        self.lost = self.first = 0.0

    def keep(self, some: list[int]) -> None:
        """Go on with some of the restarts: a sketch is of the rows, not of restarts."""

    def assign(self, operand: Operand, labels: torch.Tensor, precision: str) -> int | None:
        """Label all rows in all restarts, ``labels`` (r, n), if a sketch pays: how many the reference distance decided,
        else None."""
        centroids = operand.centroids
        self.passes += 1
        clusters = centroids.shape[0] * centroids.shape[1]
        if not self.possible or self.passes <= self.start or self._bytes(clusters) > self.spare_bytes:
            return None
        if not isinstance(operand, Bounded):  # of kernels, whose rows are not worth it
            return None
        # A row read alone costs more than its share of a pass that serves all restarts at once.
        price = 1 + 3 * min(1.0, clusters / 100)
        sketch = self.sketch or Sketch(self.source, self.moments, centroids, self.most)
        sketched = sketch.operand(centroids)
        if self.sketch is None:
            if price * sketch.open_share(sketched) > _WORTH:
                self.start, self.wait = self.passes + self.wait, 2 * self.wait
                return None
            sketch.read()
            self.sketch, self.lost, self.first = sketch, 0.0, -1.0
        open_rows = self._propose(sketch, sketched, labels)
        rechecked = self._read(open_rows, operand, labels, precision)
        spent = price * sum(len(rows) for rows in open_rows) / labels.numel()
        self.first = spent if self.first < 0 else self.first
        self.lost += spent - self.first
        # What is lost to the centroids' way since then would pay for a new one.
        if spent > _WORTH or self.lost > 0.3 + 2 * sketch.rows.shape[1] / clusters:
            self.sketch = None
        return rechecked

    def _bytes(self, clusters: int) -> int:
        """What a sketch for so many centroids takes: itself, its basis while that is found, and rows that are read."""
        n, d = self.source.shape
        found = 16 * min(_MOST_CENTROIDS, clusters) + 40 * self.most
        return 4 * n * (self.most + 1) + d * (found + 8 * _LEAST_READ)

    @staticmethod
    def _propose(sketch: Sketch, operand: Bounded, labels: torch.Tensor) -> list[torch.Tensor]:
        """Label the rows in the sketch: for each restart, the rows that are left open."""
        r, (row, restart, _) = len(labels), propose(sketch.rows, sketch.norms, operand, labels)
        pairs = (row * r + restart).unique_consecutive()
        return [pairs[pairs % r == i] // r for i in range(r)]

    def _read(self, open_rows: list[torch.Tensor], operand: Bounded, labels: torch.Tensor, precision: str) -> int:
        """Label the rows left open in each restart in a full pass: how many the reference distance decided."""
        d = operand.centroids.shape[2]
        rechecked = 0
        size = max(_LEAST_READ, 16 * block_rows(d, labels.device))
        for i, rows in enumerate(open_rows):
            one = operand.alone(i)
            for some in rows.split(size) if len(rows) else ():
                found = labels.new_empty(1, len(some))
                x = self.source.take(some)
                rechecked += int(self.backend.assign(x, self.norms[some], one, found, precision))
                labels[i, some] = found[0]
        return rechecked
