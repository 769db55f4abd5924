"""Places for a layer's rows that the device has no room for: page-locked host memory, or a file without a name."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gpuclust.capture.store import LayerStore
from gpuclust.cluster.sources.host import HostSource
from gpuclust.cluster.sources.mapped import Mapped
from gpuclust.config import show_bytes
from gpuclust.errors import InputError


def pinned(n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Rows (n, d) in page-locked host memory, which a CUDA device reads by itself."""
    return torch.empty(n, d, dtype=dtype, device="cpu", pin_memory=True)


class Spill:
    """Rows in a file of a folder, which is gone when the process ends, however it ends.

    Parameters
    ----------
    folder : path
        On a disk with room for the rows.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.file: Mapped | None = None

    def __call__(self, n: int, d: int, dtype: torch.dtype) -> Tensor:
        """The rows, uninitialised: (n, d).

        Raises
        ------
        InputError
            If the folder cannot be written, or has no room for them.
        """
        size = n * d * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self._folder, prefix="gpuclust-") as file:
                # Reserved at once: a mapped file that finds no room later ends the process.
                os.posix_fallocate(file.fileno(), 0, size)
                pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            hint = f", which {show_bytes(size)} of rows need" if error.errno == errno.ENOSPC else ""
            raise InputError(
                f"cannot write rows into {str(self._folder)!r} (--spill): {error.strerror}{hint}"
            ) from error
        self.file = Mapped(pages, None)
        return torch.frombuffer(pages, dtype=dtype).view(n, d)


def read_back(store: LayerStore, device: torch.device, limit: int, file: Mapped | None) -> HostSource:
    """The rows of a store in host memory, or in a file, as a device reads them chunk by chunk."""
    return HostSource(store.rows, device, limit, file=file)
