"""Named ranges around the steps of a run, which Nsight shows, and the trace that ``--profile`` writes.

Ranges nest: in each pass over the images decode, forward and, inside it, store; in each layer seed, iterate, score.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpuclust.errors import GpuclustError, InputError
from gpuclust.files import replacing

# Of the ranges of one name that lie side by side in another, so many are in the trace,
FIRST = 4
# and of each so many of Python's calls and returns; an operation of torch is two, at least.
CALLS = 1000

_P = ParamSpec("_P")
_T = TypeVar("_T")


class named:
    """A block, or each call of a function, as a range of that name: ``with named("seed"):`` or ``@named("seed")``.

    It is there for Nsight (NVTX) once CUDA is in use, and in the trace while one is recorded (`profiled`); else it
    costs less than a microsecond.
    """

    __slots__ = ("_close", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._close: Callable[[], object] | None = None

    def __enter__(self) -> None:
        recorder = _recorder.get()
        if recorder:
            self._close = recorder.open(self._name)
        elif torch.cuda.is_initialized():
            torch.cuda.nvtx.range_push(self._name)
            self._close = torch.cuda.nvtx.range_pop

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._close is not None:
            self._close()
            self._close = None

    def __call__(self, function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def inside(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with named(self._name):
                return function(*args, **kwargs)

        return inside


def each(name: str, items: Iterable[_T]) -> Generator[_T, None, None]:
    """The same items; the wait for each is a range of that name."""
    iterator = iter(items)
    while True:
        with named(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
        del item  # its memory may be wanted for the next


@contextmanager
def profiled(path: str | os.PathLike[str] | None, device: torch.device) -> Iterator[None]:
    """Record what runs in the block, and write it to ``path`` as a trace that Perfetto and chrome://tracing open.

    Recorded are torch's operations and, on a GPU, its kernels and copies. A long run has too many of them: in each
    range the first `FIRST` ranges of one name are recorded with the ranges in them, and no more of that name, and of
    each the first `CALLS` calls, so that a trace has the first batches of every pass and the beginning of each step and
    of the first iterations of every fit. It grows with the passes and layers, not with the images.

    Parameters
    ----------
    path : path or None
        ``.json``, of some 4 MB for each layer, or ``.json.gz``, a tenth of it. It is written when the block ends well,
        whole or not at all. None: nothing is recorded.
    device : torch.device
        Of the run.

    Raises
    ------
    InputError
        Before the block, if nothing can be written there.
    GpuclustError
        After it, if writing fails.
    """
    if path is None:
        yield
        return
    path = _writable(Path(path))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        recorder = _Recorder(profiler)
        outside = _recorder.set(recorder)
        try:
            yield
        finally:
            recorder.stop()
            _recorder.reset(outside)
    try:
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
            if path.name.endswith(".gz"):
                _compress(temporary)
    except OSError as error:
        raise GpuclustError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


class _Recorder:
    """Which ranges are open, and whether what happens now is recorded."""

    def __init__(self, profiler: profile) -> None:
        self._profiler = profiler
        self._on, self._calls = True, 0
        # Another profiler of Python, such as cProfile, goes on; then calls are not counted.
        self._counts = sys.getprofile() is None
        # For each open range, the outermost first: whether it is recorded, and how often each name has come in it.
        self._open: list[tuple[bool, Counter[str]]] = [(True, Counter())]

    def open(self, name: str) -> Callable[[], None]:
        """Begin a range; what ends it. What lies between two ranges is recorded as the one before was."""
        recorded, seen = self._open[-1]
        seen[name] += 1
        recorded = recorded and seen[name] <= FIRST
        self._open.append((recorded, Counter()))
        self._switch(recorded)
        shown = record_function(name) if recorded else None
        if shown:
            shown.__enter__()

        def close() -> None:
            if shown:
                shown.__exit__(None, None, None)
            self._open.pop()

        return close

    def stop(self) -> None:
        """Count no more calls."""
        if self._counts:
            sys.setprofile(None)

    def _switch(self, on: bool) -> None:
        self._calls = 0
        if self._counts:
            sys.setprofile(self._count if on else None)
        if on != self._on:
            # With every kind that torch can switch: for fewer it warns that they may not match.
            self._profiler.toggle_collection_dynamic(
                on, [ProfilerActivity.CPU, ProfilerActivity.CUDA, ProfilerActivity.XPU]
            )
            self._on = on

    def _count(self, *_: object) -> None:
        """What Python calls at each call and return."""
        self._calls += 1
        if self._calls > CALLS:
            self._switch(False)


# Of a thread: ranges of two would not nest.
_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)

if hasattr(os, "register_at_fork"):  # processes that read images are forked with a recorder, which is not theirs
    os.register_at_fork(after_in_child=lambda: _recorder.set(None))


def _writable(path: Path) -> Path:
    """The path, if a file can be written there."""
    if not path.name.endswith((".json", ".json.gz")):
        raise InputError(f"a trace is written as .json or .json.gz; got {str(path)!r}")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder: --profile takes the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{str(path.parent)!r} is no folder: make it, or give another --profile")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"nothing can be written into {str(path.parent)!r}: give another --profile")
    return path


def _compress(path: Path) -> None:
    """gzip a file in its place."""
    with replacing(path) as smaller, open(path, "rb") as plain, gzip.open(smaller, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
