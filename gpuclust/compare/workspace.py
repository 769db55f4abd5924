"""What `gpuclust.compare.similarity.geometry` takes beside the rows, in bytes, and how many passes it makes over rows
that don't lie on the device. Arithmetic alone.

With n rows of d values of b bytes, k clusters, m = min(n, most) sampled rows, slices of w features, blocks of r rows,
and g = 1 where the sample is not all rows, else 0, the most that is held at a time is 8 n + 8 m and the largest of

    summing     8 m^2 + 8 w (m + 2) + 8 g d    + b m w g of rows that lie on the device, else b m W
    solving     8 m^2 + 32 m^2 (m <= 512, else 10 KiB m) + 8 g d
    projecting  8 m^2 + (24 d + 8 r d + b r d + 24 n) g
    scoring     8 m^2 + 18 m k + 40 m

where W, a multiple of w, is the features of the sample that are held in their own dtype: so many as the limit leaves
room for. Where all d fit beside solving and projecting, too, the sample stays until all rows are projected.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuclust.config import show_bytes
from gpuclust.errors import MemoryLimitError

# Bytes of float64 values that are converted at a time: a slice of features of the sample, or a block of rows. The bits
# of what is summed depend on them, so no limit changes them.
_SLICE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
# Rows of a block at least: each is one more reading of two axes.
_LEAST_BLOCK = 2
# Up to this many rows all eigenvectors are computed; above, the leading two from a Krylov space of 8 x 32 dimensions.
EIGEN_ROWS = 512
KRYLOV_BLOCK, KRYLOV_STEPS = 8, 32


@dataclass(frozen=True)
class Workspace:
    """Shapes in which rows are read, and what they take.

    Attributes
    ----------
    n, d, k : int
        Rows, values of a row, clusters.
    itemsize : int
        Bytes of a value.
    resident : bool
        Whether the rows lie on the device.
    device : str
        Type of the device.
    most : int
        Rows of the sample at most.
    """

    n: int
    d: int
    k: int
    itemsize: int
    resident: bool
    device: str
    most: int

    @property
    def m(self) -> int:
        """Rows of the sample."""
        return min(self.n, self.most)

    @property
    def sampled(self) -> bool:
        """Whether the sample is not all rows."""
        return self.n > self.m

    @property
    def width(self) -> int:
        """Features of a slice of the sample."""
        return min(self.d, max(1, self._slice_bytes // (8 * self.m)))

    @property
    def block(self) -> int:
        """Rows of a block."""
        return min(self.n, max(_LEAST_BLOCK, self._slice_bytes // (8 * self.d)))

    @property
    def least_bytes(self) -> int:
        """What is held at a time at most, where the sample of streamed rows is read a slice at a time."""
        read = self.itemsize * self.m * self.width * (self.sampled or not self.resident)
        return self._always + max(self._summing + read, self._solving, self._projecting, self._scoring)

    @property
    def held_bytes(self) -> int:
        """What is held at a time at most, where the sample of streamed rows stays."""
        sample = self.itemsize * self.m * self.d
        return self._always + max(sample + max(self._summing, self._solving, self._projecting), self._scoring)

    def features(self, memory_limit: int | None) -> int:
        """Features of the sample of streamed rows that are read in a pass: all, or a multiple of the width.

        Raises
        ------
        MemoryLimitError
            If the limit is too small for one slice.
        """
        if memory_limit is None:
            return self.d
        if memory_limit < self.least_bytes:
            raise MemoryLimitError(
                f"the geometry of {self.n:,} rows of {self.d:,} values takes {show_bytes(self.least_bytes)}; the "
                f"memory limit leaves {show_bytes(memory_limit)} for it"
            )
        if self.resident or memory_limit >= self.held_bytes:
            return self.d
        room = (memory_limit - self._always - self._summing) // (self.itemsize * self.m)
        # Where all fit, but not beside what comes later, they are read again.
        return min(self.d, room // self.width * self.width)

    def passes(self, memory_limit: int | None) -> int:
        """Passes over streamed rows, a `take` of the sampled ones among them."""
        features = self.features(memory_limit)
        return -(-self.d // features) + self.sampled * (1 if self.holds(memory_limit) else 2)

    def holds(self, memory_limit: int | None) -> bool:
        """Whether the sample of streamed rows is copied to the device, and stays until the axes are known."""
        return not self.resident and (memory_limit is None or memory_limit >= self.held_bytes)

    @property
    def _slice_bytes(self) -> int:
        return _SLICE_BYTES.get(self.device, _SLICE_BYTES["cpu"])

    @property
    def _always(self) -> int:
        return 8 * self.n + 8 * self.m

    @property
    def _summing(self) -> int:
        return 8 * self.m**2 + 8 * self.width * (self.m + 2) + 8 * self.d * self.sampled

    @property
    def _solving(self) -> int:
        spectrum = 32 * self.m**2 if self.m <= EIGEN_ROWS else 40 * KRYLOV_BLOCK * KRYLOV_STEPS * self.m
        return 8 * self.m**2 + spectrum + 8 * self.d * self.sampled

    @property
    def _projecting(self) -> int:
        block = (8 + self.itemsize) * self.block * self.d
        return 8 * self.m**2 + self.sampled * (24 * self.d + block + 24 * self.n)

    @property
    def _scoring(self) -> int:
        return 8 * self.m**2 + 18 * self.m * self.k + 40 * self.m


def geometry_bytes(n: int, d: int, k: int, itemsize: int, *, resident: bool, device: str, most: int = 2048) -> int:
    """Bytes that `geometry` takes at least, beside the rows and what their source holds for a pass.

    For rows on the device (``resident``) this is all that it ever takes. ``device`` is the type: "cpu" or "cuda".
    """
    return Workspace(n, d, k, itemsize, resident, device, most).least_bytes


def geometry_passes(
    n: int, d: int, k: int, itemsize: int, memory_limit: int | None, *, device: str, most: int = 2048
) -> int:
    """Passes that `geometry` makes over rows that don't lie on the device, with so many bytes for itself.

    Raises
    ------
    MemoryLimitError
        If `geometry_bytes` are more.
    """
    return Workspace(n, d, k, itemsize, False, device, most).passes(memory_limit)
