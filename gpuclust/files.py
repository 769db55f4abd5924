"""Files that are whole or as they were: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``: it becomes ``path`` when the block ends well and is removed when it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let ``writer`` fill a temporary file beside ``path``, then rename it: ``path`` is whole or as it was."""
    with replacing(path) as temporary:
        writer(temporary)


def put(content: bytes, path: Path) -> None:
    """What `write` takes to write bytes: ``write(path, partial(put, content))``."""
    path.write_bytes(content)
