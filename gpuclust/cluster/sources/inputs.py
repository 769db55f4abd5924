"""What users hand over as rows, as a chunk source; and results back as the same kind, on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpuclust.arithmetic import subnormals
from gpuclust.cluster.distributed import Group, OneProcess, in_all, require_same
from gpuclust.cluster.sources.arrays import (
    in_place,
    open_array,
    refuse_sparse,
    require_real,
    require_rows,
    row_dtype,
    to_rows,
)
from gpuclust.cluster.sources.base import ChunkSource, TensorSource
from gpuclust.cluster.sources.chunks import ChunksSource
from gpuclust.cluster.sources.host import HostSource
from gpuclust.cluster.sources.mapped import Mapped
from gpuclust.config import show_bytes
from gpuclust.errors import InputError, UnavailableError, first_line
from gpuclust.free import free_bytes

# What is left to a fit on CUDA at least, where no limit is set.
_FIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Rows:
    """Rows that were handed over.

    Attributes
    ----------
    source : ChunkSource (n, d)
    back : Callable
        A result tensor as the caller's kind of array, on the caller's device.
    home : torch.device
        That device.
    how : str
        Where the rows are, and why; for reports.
    held_bytes : int
        What the source itself allocates on its device.
    """

    source: ChunkSource
    back: Callable[[torch.Tensor], Any]
    home: torch.device
    how: str
    held_bytes: int = 0

    def left_of(self, memory_limit: int | None) -> int | None:
        """What the source leaves of a memory limit."""
        return None if memory_limit is None else max(1, memory_limit - self.held_bytes)


def read_rows(
    x: Any,
    device: str | torch.device | None = None,
    name: str = "KMeans",
    memory_limit: int | None = None,
    beside: Callable[[int, int, torch.dtype, torch.device], int] | None = None,
) -> Rows:
    """Rows from a tensor, a NumPy array, anything that becomes one, DLPack, chunks, or a chunk source.

    Parameters
    ----------
    x : (n, d)
        Floating tensors and arrays are used where they are, without a copy; whole numbers become float64. Or chunks:
        a list of arrays or tensors (b, d), or an object whose ``__iter__`` gives them anew each time.
    device : str or torch.device, optional
        Where to compute; where ``x`` is by default.
    name : str
        The estimator, for messages.
    memory_limit : int, optional
        Bytes that may be allocated. Rows of which a copy would take more than three quarters of it, or of what is
        free, or would leave too little, are streamed.
    beside : Callable, optional
        What is needed beside n rows of d features of a dtype on a device, in bytes.

    Raises
    ------
    InputError
        If it is not two-dimensional, is empty, holds what is not a real number, or can be read only once.
    TypeError
        If it is sparse.
    """
    if isinstance(x, Rows):
        return x
    if hasattr(x, "chunks") and hasattr(x, "take") and hasattr(x, "shape") and not hasattr(x, "__array__"):
        return Rows(x, lambda result: result, x.device, "a chunk source")
    place = None if device is None else find_device(device)
    refuse_sparse(x)
    if (first := first_chunk(x)) is not None:
        refuse_sparse(first)
        _, back, home = open_array(first)
        chunks = ChunksSource(x, _read_chunk, place, memory_limit)
        return Rows(chunks, back, home, "chunks, read anew in each pass", chunks.buffer_bytes)
    given, back, home = open_array(x)
    require_rows(given, name)
    place = find_device(home) if place is None else place
    return _place(given, back, home, place, memory_limit, beside or (lambda *_: 0))


def first_chunk(x: Any) -> Any:
    """The first of the chunks that ``x`` gives, where it is no array itself but gives arrays of two dimensions.

    None for all that becomes one array: a list of rows, however written; a table; anything with an array interface.

    Raises
    ------
    InputError
        For a generator or another iterator, and for what gives neither chunks nor can be read by index, as a list.
    """
    arrays = ("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__", "to_numpy")
    if isinstance(x, (torch.Tensor, str, bytes, memoryview, Mapping)) or any(hasattr(x, name) for name in arrays):
        return None
    if isinstance(x, Iterator):
        raise InputError(
            f"X is a {type(x).__name__}, which can be read once, and rows are read many times: give a list of chunks, "
            "or an object whose __iter__ begins anew each time"
        )
    if not isinstance(x, Iterable):
        return None
    first = next(iter(x), None)
    if len(getattr(first, "shape", ())) == 2:
        return first
    if isinstance(x, Sequence) or (hasattr(x, "__getitem__") and hasattr(x, "__len__")):
        return None
    if first is None:
        raise InputError(f"Found array with 0 sample(s): X, a {type(x).__name__}, gave nothing to read.")
    shape = getattr(first, "shape", None)
    shown = f"of shape {tuple(shape)}" if shape is not None else "that is no array"
    raise InputError(
        f"X, a {type(x).__name__}, gives a {type(first).__name__} {shown}: what is iterated over gives chunks of rows, "
        "arrays or tensors of shape (b, d)"
    )


def _read_chunk(chunk: Any) -> torch.Tensor:
    refuse_sparse(chunk)
    if len(getattr(chunk, "shape", ())) != 2:
        shape = getattr(chunk, "shape", None)
        shown = f"of shape {tuple(shape)}" if shape is not None else "that is no array"
        raise InputError(f"the chunks of X are arrays or tensors of shape (b, d); got a {type(chunk).__name__} {shown}")
    given = open_array(chunk)[0]
    require_real(given)
    return to_rows(given)


def _place(
    given: torch.Tensor | np.ndarray,
    back: Callable[[torch.Tensor], Any],
    home: torch.device,
    device: torch.device,
    memory_limit: int | None,
    beside: Callable[[int, int, torch.dtype, torch.device], int],
) -> Rows:
    """Rows where they are, copied to where they are computed with, or streamed, by what a copy takes and what is free.

    A file that is mapped is streamed on a CPU, too, which there costs no copy: its pages are given back after each
    chunk if all of them would be too many.
    """
    if home.type != "cpu":
        there = TensorSource(to_rows(given).to(device))
        return Rows(there, back, home, f"on {home}" if there.device == home else f"copied to {there.device}")
    whole, mapped = in_place(given), Mapped.of(given) is not None
    if device.type == "cpu" and whole and not mapped:
        return Rows(TensorSource(to_rows(given)), back, home, "in memory")
    (n, d), dtype = given.shape, row_dtype(given)
    size = n * d * dtype.itemsize
    room = _room_bytes(beside(n, d, dtype, device), device, memory_limit)
    fits = size <= room
    if fits and not (device.type == "cpu" and whole):
        copied = TensorSource(to_rows(given).to(device))
        return Rows(copied, back, home, f"copied to {copied.device} ({show_bytes(size)})", size)
    streamed = HostSource(given, device, memory_limit, release=not fits)
    origin = "a mapped file" if mapped else "memory"
    how = f"streamed from {origin}: {show_bytes(size)}, and there is room for {show_bytes(room)}"
    return Rows(streamed, back, home, f"in {origin}" if fits else how, streamed.buffer_bytes)


def _room_bytes(beside: int, device: torch.device, memory_limit: int | None) -> int:
    """Bytes that rows may take on a device: three quarters of the limit, or of what is free, and what is needed beside
    them must be left."""
    free = free_bytes(device)
    if memory_limit is not None:
        free = min(free, memory_limit)
    elif device.type == "cuda":
        beside = max(beside, _FIT_BYTES)
    return max(0, min(free * 3 // 4, free - beside))


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the CUDA device if there is one.

    Raises
    ------
    InputError
        If torch knows no such device.
    UnavailableError
        If it is not there, or cannot compute in float64.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is auto, cpu, cuda or cuda:INDEX; got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"device {device!r} was asked for, and torch sees {torch.cuda.device_count()} CUDA devices: "
            "`gpuclust doctor` says why; use device='auto' or 'cpu'"
        )
    if found.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, dtype=torch.float64, device=found).item()
        except Exception as error:  # each device has its own way to say that it is not there
            raise UnavailableError(
                f"device {str(device)!r} was asked for, and torch cannot compute in float64 there "
                f"({first_line(error).partition('. ')[0]}): use device='auto', 'cpu' or 'cuda'"
            ) from error
    return found


def read_weights(weights: Any, source: ChunkSource, group: Group | None = None) -> torch.Tensor | None:
    """Weights of the rows as float64 (n,) on their device; None where all are the same, in all processes.

    Raises
    ------
    InputError
        For a wrong length, NaN, infinity, a negative weight, none above zero in any process, or weights in some alone.
    """
    group = group or OneProcess()
    require_same(group, sample_weight="given" if weights is not None else None)
    if weights is None:
        return None
    with in_all(group), subnormals(source.device):
        values = _read_weights(weights, source)
        found = bool((values > 0).any()), bool((values == 1).all())
    facts = group.gather(found)
    if not any(positive for positive, _ in facts):
        raise InputError("sample_weight is zero for every row: at least one needs a weight above zero.")
    return None if all(ones for _, ones in facts) else values


def _read_weights(weights: Any, source: ChunkSource) -> torch.Tensor:
    n = source.shape[0]
    plain = isinstance(weights, np.ndarray) or not hasattr(weights, "__dlpack__")
    try:
        given = np.asarray(weights) if plain else open_array(weights)[0]
        require_real(given)
        values = torch.from_numpy(np.array(given, np.float64)) if isinstance(given, np.ndarray) else given
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"sample_weight must hold numbers; got a {type(weights).__name__}: {error}") from error
    values = values.to(source.device, torch.float64)
    if values.ndim == 0:
        values = values.expand(n).clone()
    if values.ndim != 1:
        raise InputError(f"Sample weights must be 1D array or scalar, got {values.ndim}D array.")
    if values.shape != (n,):
        raise InputError(f"sample_weight.shape == {tuple(values.shape)}, expected ({n},)!")
    if not bool(values.isfinite().all()):
        raise InputError("Input sample_weight contains NaN or infinity.")
    if bool((values < 0).any()):
        raise InputError("Negative values in data passed to `sample_weight`: weights are at least 0.")
    return values
