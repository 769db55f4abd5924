"""Arrays of any kind as k-means sees them: what they hold, what is read in place, and the way back to their kind."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpuclust.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def row_dtype(x: torch.Tensor | np.ndarray) -> torch.dtype:
    """The type in which rows are computed with: that of floating rows; float64 for whole numbers and all else."""
    if isinstance(x, torch.Tensor):
        return x.dtype if x.dtype in FLOATS else torch.float64
    narrow = {2: torch.float16, 4: torch.float32}
    return narrow.get(x.dtype.itemsize, torch.float64) if x.dtype.kind == "f" else torch.float64


def in_place(x: torch.Tensor | np.ndarray) -> bool:
    """Whether the rows can be computed with as they lie in memory."""
    if isinstance(x, torch.Tensor):
        return x.dtype in FLOATS
    return (
        x.dtype.kind == "f"
        and x.dtype.itemsize <= 8
        and x.dtype.isnative
        and all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
    )


def to_rows(x: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The rows as a floating tensor; a copy only where it must be."""
    if isinstance(x, np.ndarray):
        if not in_place(x):
            out = torch.empty(x.shape, dtype=row_dtype(x), device="cpu")
            copy_rows(x, out)
            return out
        with warnings.catch_warnings():
            # The rows are only read, so it is no matter that they cannot be written.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(x)
    return x.to(row_dtype(x))


def copy_rows(x: torch.Tensor | np.ndarray, out: torch.Tensor) -> None:
    """Write rows of any type and byte order into a tensor (b, d) in host memory."""
    if isinstance(x, torch.Tensor):
        out.copy_(x)
    elif in_place(x):
        out.copy_(to_rows(x))
    else:
        np.copyto(out.numpy(), x, casting="unsafe")


def read_array(x: Any, name: str = "KMeans") -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """An array of any kind as a floating tensor (n, d), and the way back; see `read_rows`."""
    refuse_sparse(x)
    given, back, _ = open_array(x)
    require_rows(given, name)
    return to_rows(given), back


def refuse_sparse(x: Any) -> None:
    if type(x).__module__.startswith("scipy.sparse") or (isinstance(x, torch.Tensor) and x.layout != torch.strided):
        raise TypeError("Sparse data was passed for X, but dense data is required: use X.toarray() (or X.to_dense()).")


def open_array(x: Any) -> tuple[torch.Tensor | np.ndarray, Callable[[torch.Tensor], Any], torch.device]:
    """An array of any kind as a tensor or a NumPy array of numbers, the way back, and the device it leads to."""
    if isinstance(x, torch.Tensor):
        return x.detach(), _to(x.device), x.device
    if isinstance(x, np.ndarray) or not (hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")):
        return _from_numpy(x), _to_numpy, torch.device("cpu")
    tensor, back = _from_dlpack(x)
    return tensor, back, tensor.device


def require_real(given: torch.Tensor | np.ndarray) -> None:
    if isinstance(given, torch.Tensor) and given.device.type == "meta":
        raise InputError("X is on the device meta: it has a shape and no values")
    if given.is_complex() if isinstance(given, torch.Tensor) else given.dtype.kind == "c":
        raise InputError(f"Complex data not supported\n{given.dtype}\n")


def require_rows(given: torch.Tensor | np.ndarray, name: str) -> None:
    require_real(given)
    if given.ndim != 2:
        shown = f"{given.ndim}D" if given.ndim else "scalar"
        raise InputError(
            f"Expected 2D array, got {shown} array instead: shape {tuple(given.shape)}.\n"
            "Reshape your data either using array.reshape(-1, 1) if your data has a single feature or "
            "array.reshape(1, -1) if it contains a single sample."
        )
    for size, what in zip(given.shape, ("sample", "feature"), strict=True):
        if size == 0:
            raise InputError(
                f"Found array with 0 {what}(s) (shape={tuple(given.shape)}) while a minimum of 1 is required by {name}."
            )


def _from_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "__array__") and hasattr(x, "to_numpy"):
        array = x.to_numpy()
        if array.dtype.kind == "O" and hasattr(x, "columns"):
            # Columns of which some may be missing; dates, and the real parts of complex numbers, would pass as floats.
            for name, dtype in zip(x.columns, x.dtypes, strict=True):
                if getattr(dtype, "kind", "O") in "mMc":
                    raise InputError(f"X must hold numbers; got {dtype} in column {name!r}")
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
    return array


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
