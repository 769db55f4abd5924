"""FolderLock: one run at a time in a folder, however a run ends.

The lock is a POSIX record lock on ``.state/lock``, which holds the process and the host for people to read. The
kernel drops it with the process that took it. Processes forked from it, which read images, do not inherit it (they
would inherit an flock, and keep it when they outlive a run that is killed). Such a lock belongs to the process as a
whole, and is lost as soon as the process closes any descriptor of the file: hence the list of what is locked here.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from gpuclust.errors import InputError
from gpuclust.files import make_folder

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EACCES, errno.EAGAIN)  # the one or the other, as the system likes
_TRIES = 100
_locked_here: set[tuple[int, int]] = set()
_taking = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locked_here.clear)


class FolderLock:
    """The lock on ``folder``, taken when it is made, until `release`.

    Parameters
    ----------
    folder : Path
        Made if need be.

    Raises
    ------
    InputError
        If another run holds it, which is named.
    OSError
        If the folder cannot be written into.

    Warns
    -----
    UserWarning
        Where there are no locks (some network file systems): nothing keeps another run out, then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / ".state" / "lock"
        self._made: list[Path] = []
        self._process = os.getpid()
        with _taking:
            # The run that held the lock removes its file, and its folder where nothing came of it: then once more.
            for _ in range(_TRIES):
                try:
                    self._made += make_folder(self._path.parent)
                    if _at(self._path) in _locked_here:
                        raise self._refusal(_holder())
                    self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                except FileNotFoundError:
                    continue
                self._file = _file(os.fstat(self._descriptor))
                self._lock()
                if self.stands():
                    break
                os.close(self._descriptor)
            else:
                raise OSError(f"its lock came and went {_TRIES} times")
            _locked_here.add(self._file)
        with suppress(OSError):  # only people need it
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _holder().encode(), 0)

    def stands(self) -> bool:
        """Whether the file of the lock is still there, and so the folder that it was taken in."""
        return _at(self._path) == self._file

    def release(self) -> None:
        """Let others in. Folders that were made for the lock go where nothing was written into them."""
        if os.getpid() != self._process:
            return
        try:
            with suppress(OSError):
                if self.stands():
                    self._path.unlink()
        finally:
            with _taking:
                _locked_here.discard(self._file)
                with suppress(OSError):  # of a file system that is gone
                    os.close(self._descriptor)
        with suppress(OSError):
            for folder in dict.fromkeys((self._path.parent, *reversed(self._made))):
                folder.rmdir()

    def _lock(self) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no locks on files")
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.pread(self._descriptor, 300, 0).decode(errors="replace")
                os.close(self._descriptor)
                raise self._refusal(holder or "another process") from None
            warnings.warn(
                f"{str(self._folder)!r} cannot be locked ({error.strerror or error}): nothing keeps another run out of "
                "it",
                stacklevel=2,
            )

    def _refusal(self, holder: str) -> InputError:
        return InputError(
            f"a run is going on in {str(self._folder)!r} ({holder}): wait for its end, or take another folder with "
            "--out"
        )


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _file(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _at(path: Path) -> tuple[int, int] | None:
    try:
        return _file(os.stat(path))
    except OSError:
        return None
