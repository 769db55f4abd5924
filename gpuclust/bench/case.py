"""A case: a shape, a type, how many iterations; its rows and the centroids that everybody starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpuclust.config import DTYPES, show_bytes
from gpuclust.errors import InputError, first_line, is_out_of_memory
from gpuclust.free import free_bytes

DATA = "relu of gaussian blobs"
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Case:
    """A k-means that is measured.

    Attributes
    ----------
    n, d, k : int
    dtype : str
        Of the stored rows: float32, float16 or bfloat16.
    iterations : int
        Of a fit, from the given centroids, with no other end than labels that repeat.
    n_init : int
        Restarts of a fit, each from centroids of its own.
    batch : int
        Problems of this shape that are solved one beside the other.
    seed : int
    """

    n: int
    d: int
    k: int
    dtype: str = "float32"
    iterations: int = 10
    n_init: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("d", 1), ("k", 1), ("iterations", 1), ("n_init", 1), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is a whole number of at least {least}; got {value!r}")
        if self.k > self.n:
            raise InputError(f"k is at most n, the number of rows; got k {self.k} and n {self.n}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def x_bytes(self) -> int:
        return self.batch * self.n * self.d * self.torch_dtype.itemsize

    def __str__(self) -> str:
        many = f"{self.batch} x " if self.batch > 1 else ""
        restarts = f", n_init {self.n_init}" if self.n_init > 1 else ""
        return f"{many}{self.n:,} x {self.d:,}, k {self.k:,}{restarts}, {self.dtype}, {self.iterations} iterations"


@dataclass(frozen=True)
class Rows:
    """The data of a case.

    Attributes
    ----------
    x : (batch, n, d)
        On the device.
    starts : (batch, n_init, k, d)
        Distinct rows of ``x``, in the type in which gpuclust returns centroids (float32).
    """

    x: torch.Tensor
    starts: torch.Tensor


def make_rows(case: Case, device: torch.device) -> Rows:
    """Rows like the activations behind a ReLU: blobs around more centres than there are clusters, cut at zero.

    The centres lie so close, whatever the width, that an iteration still moves rows after ten others. The same seed
    gives the same rows on one kind of device.

    Raises
    ------
    InputError
        If the device lacks the memory for the rows.
    """
    free = free_bytes(device)
    if case.x_bytes > free:
        raise InputError(f"{case}: X takes {show_bytes(case.x_bytes)}, and {device} has {show_bytes(free)} free")
    try:
        return _make(case, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{case}: {device} has no memory for the rows ({first_line(error)})") from error


def _make(case: Case, device: torch.device) -> Rows:
    generator = torch.Generator(device).manual_seed(case.seed)
    blobs = 2 * case.k + 7
    centres = torch.randn(blobs, case.d, device=device, generator=generator) * (1.5 * case.d**-0.25)
    x = torch.empty(case.batch, case.n, case.d, dtype=case.torch_dtype, device=device)
    size = max(1, _CHUNK_VALUES // case.d)
    for problem in x:
        for rows in problem.split(size):
            which = torch.randint(blobs, (rows.shape[0],), device=device, generator=generator)
            values = torch.randn(rows.shape, device=device, generator=generator)
            rows.copy_(values.add_(centres[which]).relu_())
    # On the CPU, so that the same rows are chosen on every device.
    chooser = torch.Generator().manual_seed(case.seed)
    starts = torch.empty(case.batch, case.n_init, case.k, case.d, dtype=torch.float32, device=device)
    for problem, places in zip(x, starts, strict=True):
        for place in places:
            place.copy_(problem[torch.randperm(case.n, generator=chooser)[: case.k].to(device)])
    return Rows(x, starts)
