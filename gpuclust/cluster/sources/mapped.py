"""Files behind memory-mapped arrays: their pages are given back, and a change is noticed."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from gpuclust.errors import InputError


class Mapped:
    """The file behind a memory-mapped array.

    Pages that were read stay in the process's count until the kernel needs the room; `release` gives them back, and
    leaves them in the kernel's cache of the file.
    """

    def __init__(self, pages: mmap.mmap, path: Any) -> None:
        self._pages = pages
        self._path = path
        self._known = self._state()

    @classmethod
    def of(cls, x: Any) -> Mapped | None:
        """The file of a NumPy array that is one, or a view of one; None for an array in memory.

        A copy-on-write map (mode "c") counts as memory: what was written there is nowhere else.
        """
        path, mode = None, None
        while isinstance(x, np.ndarray):
            if isinstance(x, np.memmap):
                path, mode = getattr(x, "filename", None), getattr(x, "mode", None)
            x = x.base
        return cls(x, path) if isinstance(x, mmap.mmap) and mode in ("r", "r+", "w+") else None

    def release(self) -> None:
        """Give the pages back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Nothing, if the file is as it was; one that was deleted or replaced is still the map's, as it was.

        Raises
        ------
        InputError
            If its size or its time of change are others.
        """
        now = self._state()
        if self._known and now and now[:2] == self._known[:2] and now != self._known:
            raise InputError(
                f"the file {str(self._path)!r} changed while it was read: a fit reads X many times, so nothing may "
                "write to it meanwhile"
            )

    def _state(self) -> tuple[int, ...] | None:
        """Device and number of the file, then its size and time of change; None where there is no such file."""
        try:
            found = os.stat(self._path)
        except (OSError, TypeError):
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
