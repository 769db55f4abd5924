"""Thumbs: the small pictures of a run in a file, not in memory: 1.5 kB for each of what may be a million images."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO, Any, overload

from gpuclust.errors import GpuclustError


class Thumbs(Sequence[bytes]):
    """Small pictures one after the other in a file, each read when it is asked for; 8 bytes of each are in memory.

    The file has no name, so nothing of it is left when the process ends, however that may be.

    Parameters
    ----------
    folder : path, optional
        On whose disk the file is; by default the system's folder for temporary files, which some keep in memory.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when nothing needs it any more
        self._begin(file, 0, array("q"))

    @classmethod
    def inside(cls, file: IO[bytes], start: int, ends: array[int]) -> Thumbs:
        """Pictures that are in a file already: from `start` on, each up to its end, which is counted from there."""
        thumbs = cls.__new__(cls)
        thumbs._folder = None
        thumbs._begin(file, start, ends)
        return thumbs

    def _begin(self, file: IO[bytes], start: int, ends: array[int]) -> None:
        self._file, self._start, self._ends = file, start, ends
        weakref.finalize(self, _close, file)

    def extend(self, pictures: Iterable[bytes]) -> None:
        """Add pictures after those that are there.

        Raises
        ------
        GpuclustError
            If the disk is full.
        """
        end = self._ends[-1] if self._ends else 0
        try:
            self._file.seek(self._start + end)
            for picture in pictures:
                self._file.write(picture)
                end += len(picture)
                self._ends.append(end)
            self._file.flush()
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise GpuclustError(f"cannot write into {str(where)!r}: {error.strerror or error} (thumbnails)") from error

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...
    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        self._file.seek(self._start + start)
        return self._file.read(self._ends[index] - start)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:  # a copy, or what another process gets, holds the pictures in memory
        return tuple, (list(self),)


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # what a full disk left unwritten
        file.close()
