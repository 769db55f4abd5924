"""Gaps: how much farther than its own centroid the next one is from a row, kept from pass to pass.

While the centroids move less than a row's gap its label cannot change, and the row need not be read. With D_j the
distance of a row to centroid j, a its label, and delta_j the way that centroid j has gone,

    min_{j != a} D'_j - D'_a  >=  min_{j != a} D_j - D_a - delta_a - max_{j != a} delta_j,

by the triangle inequality. That is the bound of Hamerly, "Making k-means even faster", SDM 2010, in one number for each
row instead of two. Both distances come from scores, as upper and lower ends of their bound (`gpuclust.cluster.exact`);
what float32 gaps round, pass by pass, and the rounding of the reference distance are taken off as well, so a row whose
gap is left above zero has the label that the reference distance gives. No label depends on whether there were gaps.

They pay for narrow rows; wide ones, whose distances are all alike, have `gpuclust.cluster.sketch`.
"""

from __future__ import annotations

import math

import torch

from gpuclust.cluster.backends.base import Backend, Bounded, Operand
from gpuclust.cluster.backends.torch import Look, places
from gpuclust.cluster.moments import Moments
from gpuclust.cluster.sources.base import ChunkSource, piece_rows

# With fewer scores in a restart a pass is the price of its operations, of which gaps have more.
_LEAST_SCORES = 1 << 20
# Rows on which gaps are tried, and the share of labels that they may leave open.
_SAMPLE, _WORTH = 1024, 0.5
# Passes before the first trial, until when the centroids move too far, and from one to the next.
_FIRST, _WAIT = 2, 2


class Gaps:
    """The gaps of all restarts: when they are found, used, and done without.

    Attributes
    ----------
    gaps : float32 (r, n) or None
        In the operand's scale.
    labels : int32 (r, n)
        What they are of.
    before : (r, k, d) or None
        Centroids of the last pass.
    aged : int
        Passes since the oldest of the gaps were found.
    reach : float
        No distance of a row to a centroid was longer in these passes, in the operand's scale.
    slack : float
        What a gap must be above in this pass.
    """

    gaps: torch.Tensor | None
    labels: torch.Tensor
    before: torch.Tensor | None
    aged: int
    reach: float
    slack: float

    def __init__(
        self, backend: Backend, source: ChunkSource, moments: Moments, norms: torch.Tensor, spare_bytes: int
    ) -> None:
        self.backend, self.source, self.moments, self.norms = backend, source, moments, norms
        self.spare_bytes = spare_bytes
        self.possible = source.device.type == "cpu" and source.resident and not moments.frame.vanishing
        self.restart()

    def restart(self) -> None:
        """Forget what other restarts needed."""
        self.start, self.passes = _FIRST, 0
        self.gaps = self.before = None

    def keep(self, some: list[int]) -> None:
        """Go on with some of the restarts."""
        if self.before is not None:
            self.before = self.before[some]
        if self.gaps is not None:
            self.gaps, self.labels = self.gaps[some], self.labels[some]

    def assign(self, operand: Operand, labels: torch.Tensor, precision: str) -> int | None:
        """Label all rows in all restarts, ``labels`` (r, n), if gaps pay: how many the reference distance decided, else
        None."""
        r, k, d = operand.centroids.shape
        self.passes += 1
        if not self.possible or k == 1 or labels.shape[1] * k < _LEAST_SCORES or not isinstance(operand, Bounded):
            return None
        before, self.before = self.before, operand.centroids.clone()
        # Equal centroids, of which a pass sees one, may part.
        repeated = bool(operand.repeated.any())
        if before is None or self.passes <= self.start or repeated or self._bytes(r, k, d) > self.spare_bytes:
            self.gaps = None
            return None
        steps = self._steps(operand, before)
        if self.gaps is not None:
            for gaps, label, step in zip(self.gaps, self.labels, steps, strict=True):
                gaps.sub_(step.index_select(0, label))
            self.aged += 1
            self.slack = self._slack(operand)
            open_rows = [places((gaps > self.slack).logical_not_()) for gaps in self.gaps]
            if sum(map(len, open_rows)) <= _WORTH * labels.numel():
                self.labels = labels.copy_(self.labels)
                return self._read(open_rows, operand, precision)
        elif self._price(operand, steps) <= _WORTH:
            self.gaps, self.labels = torch.empty(labels.shape, dtype=torch.float32, device=labels.device), labels
            self.aged, self.reach = 0, 0.0
            self.slack = self._slack(operand)
            return self._read_all(operand, precision)
        self.gaps, self.start = None, self.passes + _WAIT
        return None

    def _bytes(self, r: int, k: int, d: int) -> int:
        """What gaps take: themselves, centroids, rows that are read and what is known of each."""
        n, size = self.source.shape[0], piece_rows(k, d, self.norms.device)
        return r * (4 * n + 16 * k * d) + min(n, size) * (16 * d + 64)

    def _steps(self, operand: Operand, before: torch.Tensor) -> torch.Tensor:
        """What the gaps of a cluster's rows lose by the last step of the centroids, float32 (r, k)."""
        way = torch.linalg.vector_norm(operand.centroids.double() - before.double(), dim=2)
        (longest, which), k = way.max(1, keepdim=True), way.shape[1]
        itself = torch.arange(k, device=way.device) == which
        others = torch.where(itself, way.masked_fill(itself, 0).amax(1, keepdim=True), longest)
        return ((way + others) * (operand.scale * (1 + 2.0**-20)) + 2.0**-140).float()

    def _slack(self, operand: Operand) -> float:
        """What a gap must be above: what it and the reference distance have rounded. A gap is at most ``reach``."""
        frame = self.moments.frame
        away = torch.linalg.vector_norm(operand.centroids.double() - frame.centre, dim=2).amax().item()
        self.reach = max(self.reach, (math.sqrt(frame.far2) + away) * operand.scale)
        return self.reach * (2.0**-38 + (self.aged + 2) * 2.0**-23)

    def _see(
        self, x: torch.Tensor, norms: torch.Tensor, dist2: torch.Tensor, operand: Bounded, labels: torch.Tensor
    ) -> torch.Tensor:
        """Label rows (b, d) by their scores, ``labels`` (r, b): how far the other centroids are beyond at least,
        float32 (r, b). Where that is not above zero the label is not certain."""
        r, k, d = operand.centroids.shape
        gaps = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        # What squared distances are more than scores.
        term = dist2 * operand.scale * operand.scale
        size = min(len(x), piece_rows(r * k, d, x.device))
        look = Look(operand, size, x.device)
        slope, margin = (part[:, 0] for part in look.most)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            scores = look.score(x[part]).view(r, k, -1)
            near, first = look.least(scores)
            place = first.long()
            labels[:, part] = place
            far = scores.scatter_(1, place[:, None], math.inf).amin(1).double()
            off = (slope * norms[part] + margin).double() * (1 + 2.0**-19) + term[part] * 2.0**-46
            near, far = (side.add_(term[part]).clamp_(min=0).sqrt_() for side in (near + off, far - off))
            gaps[:, part] = far - near
        return gaps

    def _price(self, operand: Bounded, steps: torch.Tensor) -> float:
        """The share of labels that steps as long as the last one leave open in each pass, on a sample of the rows."""
        n = self.source.shape[0]
        some = torch.arange(0, n, max(1, n // _SAMPLE), device=self.source.device)
        labels = torch.empty(len(steps), len(some), dtype=torch.int32, device=some.device)
        gaps = self._see(self.source.take(some), self.norms[some], self.moments.dist2[some], operand, labels)
        # Every so many passes a row's gap is used up.
        return (steps.gather(1, labels.long()) / gaps.clamp(min=0)).nan_to_num(1.0).clamp(max=1).mean().item()

    def _label(
        self, x: torch.Tensor, which: slice | torch.Tensor, operand: Bounded, labels: torch.Tensor, precision: str
    ) -> tuple[torch.Tensor, int]:
        """Label rows (b, d), ``labels`` (r, b): their gaps, and how many the reference distance decided."""
        norms = self.norms[which]
        gaps, rechecked = self._see(x, norms, self.moments.dist2[which], operand, labels), 0
        for i, (gap, label) in enumerate(zip(gaps, labels, strict=True)):
            rows = places((gap > self.slack).logical_not_())
            if len(rows):
                found = label.new_empty(1, len(rows))
                rechecked += int(self.backend.assign(x[rows], norms[rows], operand.alone(i), found, precision))
                label[rows], gap[rows] = found[0], -math.inf  # it was another label's
        return gaps, rechecked

    def _read_all(self, operand: Bounded, precision: str) -> int:
        """Label all rows, and find their gaps."""
        assert self.gaps is not None
        (r, k, d), rechecked = operand.centroids.shape, 0
        for start, x in self.source.chunks(self.backend.chunk_rows(r, k, d, self.source.device)):
            part = slice(start, start + x.shape[0])
            self.gaps[:, part], decided = self._label(x, part, operand, self.labels[:, part], precision)
            rechecked += decided
        return rechecked

    def _read(self, open_rows: list[torch.Tensor], operand: Bounded, precision: str) -> int:
        """The same for these rows of each restart."""
        assert self.gaps is not None
        (_, k, d), rechecked = operand.centroids.shape, 0
        size = piece_rows(k, d, self.source.device)
        for i, rows in enumerate(open_rows):
            one = operand.alone(i)
            for some in rows.split(size) if len(rows) else ():
                found = self.labels.new_empty(1, len(some))
                gaps, decided = self._label(self.source.take(some), some, one, found, precision)
                self.labels[i].index_copy_(0, some, found[0])
                self.gaps[i].index_copy_(0, some, gaps[0])
                rechecked += decided
        return rechecked
