"""The errors that gpuclust raises on purpose: what was asked, what is allowed, what was got, what to do."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OUT_OF_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|_ALLOC_FAILED")


class GpuclustError(Exception):
    """Base of every error that gpuclust raises on purpose; the command line answers exit code 1."""


class InputError(GpuclustError, ValueError):
    """Arguments or input that cannot be used as given; the command line answers exit code 2."""


class ParameterError(InputError, TypeError):
    """A parameter of an estimator that cannot be used as given; a TypeError, too, as scikit-learn's is."""


class UnavailableError(InputError):
    """Something asked for by name cannot run on this machine: a backend, a device, weights behind a network."""


class MemoryLimitError(InputError):
    """The run needs more memory than there is, known before any pass is made."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, or of Python, says that memory ran out."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def users_code(says: str) -> Iterator[None]:
    """Whatever a user's own code raises inside the block, as an `InputError` of one line that begins with ``says``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, GpuclustError) or is_out_of_memory(error):
            raise
        raise InputError(f"{says} {told(error)}") from error


def told(error: BaseException) -> str:
    """An error that a user's own code raised, in one line: its type, what it says, and where in that code."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {"torch", "gpuclust", "importlib"} & set(Path(frame.filename).parts[-4:-1]) and "<" not in frame.filename
    ]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"
