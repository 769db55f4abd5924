"""What users hand over as rows, as a chunk source; and results back as the same kind, on the same device."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpuclust.cluster.distributed import Group, OneProcess, in_all, require_same
from gpuclust.cluster.source import ChunkSource, TensorSource
from gpuclust.errors import InputError, UnavailableError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rows:
    """Rows that were handed over.

    Attributes
    ----------
    source : ChunkSource (n, d)
    back : Callable
        A result tensor as the caller's kind of array, on the caller's device.
    """

    source: ChunkSource
    back: Callable[[torch.Tensor], Any]


def read_rows(x: Any, device: str | torch.device | None = None, name: str = "KMeans") -> Rows:
    """Rows from a tensor, a NumPy array, anything that becomes one, DLPack, or a chunk source.

    Parameters
    ----------
    x : (n, d)
        Floating tensors and arrays are used where they are, without a copy; whole numbers become float64.
    device : str or torch.device, optional
        Where to compute; where ``x`` is by default.
    name : str
        The estimator, for messages.

    Raises
    ------
    InputError
        If it is not two-dimensional, is empty, or holds what is not a real number.
    TypeError
        If it is sparse.
    """
    if hasattr(x, "chunks") and hasattr(x, "take") and hasattr(x, "shape") and not hasattr(x, "__array__"):
        return Rows(x, lambda result: result)
    tensor, back = read_array(x, name)
    return Rows(TensorSource(tensor.to(find_device(device)) if device is not None else tensor), back)


def read_array(x: Any, name: str = "KMeans") -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """An array of any kind as a floating tensor (n, d), and the way back; see `read_rows`."""
    if type(x).__module__.startswith("scipy.sparse") or (isinstance(x, torch.Tensor) and x.layout != torch.strided):
        raise TypeError("Sparse data was passed for X, but dense data is required: use X.toarray() (or X.to_dense()).")
    back: Callable[[torch.Tensor], Any]
    if isinstance(x, torch.Tensor):
        tensor, back = x.detach(), _to(x.device)
    elif isinstance(x, np.ndarray) or not (hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")):
        tensor, back = _from_numpy(x), _to_numpy
    else:
        tensor, back = _from_dlpack(x)
    _require_rows(tensor, name)
    if tensor.dtype not in FLOATS:
        tensor = tensor.double()
    return tensor, back


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the CUDA device if there is one.

    Raises
    ------
    UnavailableError
        If it is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is auto, cpu, cuda or cuda:INDEX; got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"device {device!r} was asked for, and torch sees {torch.cuda.device_count()} CUDA devices: "
            "`gpuclust doctor` says why; use device='auto' or 'cpu'"
        )
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
    with in_all(group):
        values = _read_weights(weights, source)
    facts = group.gather((bool((values > 0).any()), bool((values == 1).all())))
    if not any(positive for positive, _ in facts):
        raise InputError("sample_weight is zero for every row: at least one needs a weight above zero.")
    return None if all(ones for _, ones in facts) else values


def _read_weights(weights: Any, source: ChunkSource) -> torch.Tensor:
    n = source.shape[0]
    values = weights.detach() if isinstance(weights, torch.Tensor) else torch.as_tensor(np.array(weights, np.float64))
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


def _require_rows(tensor: torch.Tensor, name: str) -> None:
    if tensor.device.type == "meta":
        raise InputError("X is on the device meta: it has a shape and no values")
    if tensor.is_complex():
        raise InputError(f"Complex data not supported\n{tensor.dtype}\n")
    if tensor.ndim != 2:
        shown = f"{tensor.ndim}D" if tensor.ndim else "scalar"
        raise InputError(
            f"Expected 2D array, got {shown} array instead: shape {tuple(tensor.shape)}.\n"
            "Reshape your data either using array.reshape(-1, 1) if your data has a single feature or "
            "array.reshape(1, -1) if it contains a single sample."
        )
    for size, what in zip(tensor.shape, ("sample", "feature"), strict=True):
        if size == 0:
            raise InputError(
                f"Found array with 0 {what}(s) (shape={tuple(tensor.shape)}) while a minimum of 1 is "
                f"required by {name}."
            )


def _from_numpy(x: Any) -> torch.Tensor:
    if hasattr(x, "__array__") and hasattr(x, "to_numpy"):
        array = x.to_numpy()
        if array.dtype.kind == "O" and hasattr(x, "dtypes"):  # a table of columns of which some may be missing
            with contextlib.suppress(TypeError, ValueError):
                array = x.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        array = np.asarray(x)
    if array.dtype.kind in "OUSV":
        if array.dtype.kind == "O" and any(hasattr(item, "shape") for item in array.flat):
            raise InputError("X holds arrays inside an array: rows need the same number of plain values each")
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            kind = TypeError if "argument must be" in str(error) else InputError
            raise kind(f"X must hold numbers; got {array.dtype}: {error}") from error
    if array.dtype.kind not in "fiubc":
        raise InputError(f"X must hold numbers; got {array.dtype}")
    if array.dtype.kind == "f" and (array.dtype.itemsize > 8 or not array.dtype.isnative):
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else f"f{array.dtype.itemsize}")
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    if any(stride < 0 for stride in array.strides) or any(stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        # The rows are only read, so it is no matter that they cannot be written.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _from_dlpack(x: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    tensor = torch.from_dlpack(x) if hasattr(x, "__dlpack__") else torch.as_tensor(x)
    if hasattr(x, "__array_namespace__"):
        module = x.__array_namespace__()
    else:
        module = sys.modules[type(x).__module__.partition(".")[0]]
    if not hasattr(module, "from_dlpack"):
        return tensor, _to(tensor.device)
    move = _to(tensor.device)
    return tensor, lambda result: module.from_dlpack(move(result))


def _to(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda result: result.to(device)


def _to_numpy(result: torch.Tensor) -> np.ndarray:
    return result.cpu().numpy()


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number (not a bool) of at least ``least``."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def is_real(value: Any, least: float) -> bool:
    """Whether it is a finite number of at least ``least``."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return bool(real and math.isfinite(value) and value >= least)
