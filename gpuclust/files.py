"""Files that are whole or as they were, after a power cut as well: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# What says that a folder cannot be synced as a file can: its file system keeps names safe in a way of its own, or not.
_NO_SYNC = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOTSUP, errno.EPERM}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``: it becomes ``path`` when the block ends well and is removed when it fails."""
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what went wrong is worth more than that this does, too
            temporary.unlink()
        raise
    _keep_names(path.parent)


def temporary_name(path: Path) -> Path:
    """Where a file is written until it is whole; a process that is killed leaves it."""
    return path.with_name(path.name + ".tmp")


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let ``writer`` fill a temporary file beside ``path``, then rename it: ``path`` is whole or as it was."""
    with replacing(path) as temporary:
        writer(temporary)


def put(content: bytes, path: Path) -> None:
    """What `write` takes to write bytes: ``write(path, partial(put, content))``."""
    path.write_bytes(content)


def make_folder(path: Path) -> list[Path]:
    """Make a folder, and those above it, where they are not there; those that were made, the outermost first."""
    if path.is_dir():
        return []
    made = [] if path.parent.exists() else make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return made  # another process was quicker
    _keep_names(path.parent)
    return [*made, path]


def _keep_names(folder: Path) -> None:
    """See to it that the names in a folder outlast a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
