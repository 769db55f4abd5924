"""A fitted estimator as it is pickled: what lies on a device travels in host memory, and goes back where it can."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

# DLPack's number of a CPU; arrays of it are pickled by their own library.
_DLPACK_CPU = 1


@dataclass(frozen=True)
class OnHost:
    """An array that lay on a device.

    Attributes
    ----------
    values : torch.Tensor
        In host memory.
    device : str
        Where it lay.
    module : str
        The library that it was of.
    """

    values: torch.Tensor
    device: str
    module: str

    def back(self) -> Any:
        """The array where it lay; where that device or library is missing, a torch tensor in host memory (a NumPy array
        if it was of another library)."""
        here = is_here(torch.device(self.device))
        if self.module == "torch":
            return self.values.to(self.device) if here else self.values
        module = _import(self.module) if here else None
        if module is not None and hasattr(module, "from_dlpack"):
            return module.from_dlpack(self.values.to(self.device))
        return self.values.numpy()


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())


def device_of(value: Any) -> torch.device | None:
    """The device other than the CPU on which an array lies; None for all else."""
    if isinstance(value, torch.Tensor):
        return value.device if value.device.type != "cpu" else None
    if hasattr(value, "__cuda_array_interface__") or (
        hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) != _DLPACK_CPU
    ):
        return _tensor(value).device
    return None


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.as_tensor(value)


def to_host(value: Any) -> Any:
    """The value with every array on a device, in it or in its fields if it is a dataclass, as `OnHost`."""
    device = device_of(value)
    if device is not None:
        return OnHost(_tensor(value).cpu(), str(device), type(value).__module__.partition(".")[0])
    return _in_fields(value, to_host, lambda part: device_of(part) is not None)


def from_host(value: Any) -> Any:
    """What `to_host` was given, as far as this machine has the devices."""
    if isinstance(value, OnHost):
        return value.back()
    return _in_fields(value, from_host, lambda part: isinstance(part, OnHost))


def has_moved(value: Any) -> bool:
    """Whether `to_host` changed something in it."""
    parts = [getattr(value, field.name) for field in fields(value)] if _is_record(value) else []
    return any(isinstance(part, OnHost) for part in [value, *parts])


def _in_fields(value: Any, change: Callable[[Any], Any], wanted: Callable[[Any], bool]) -> Any:
    if not _is_record(value):
        return value
    changed = {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {name: change(part) for name, part in changed.items() if wanted(part)}
    return replace(value, **changed) if changed else value


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _import(name: str) -> Any:
    """The library of that name if it is installed and can be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Portable:
    """A model that is pickled with its results in host memory, and computes on machines without its device."""

    device: Any

    def __getstate__(self) -> dict[str, Any]:
        state = {name: to_host(value) for name, value in vars(self).items() if name != "_away"}
        return state | vars(self).get("_away", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Results that lay on a device go back there when they are first asked for: only then is the device touched."""
        away = {name: value for name, value in state.items() if has_moved(value)}
        vars(self).update({name: value for name, value in state.items() if name not in away})
        vars(self)["_away"] = away

    def __getattr__(self, name: str) -> Any:
        away = vars(self).get("_away", {})
        if name not in away:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        setattr(self, name, from_host(away.pop(name)))
        return vars(self)[name]

    def _device(self) -> Any:
        """Where to predict: a model that came from another machine, whose device this one lacks, does it where X is."""
        if self.device is None or "_away" not in vars(self) or str(self.device) == "auto":
            return self.device
        if is_here(torch.device(self.device)):
            return self.device
        warnings.warn(
            f"this model was fitted on another machine with device={self.device!r}, which is not here: it computes "
            "where X is; set_params(device=None) says so for good",
            UserWarning,
            stacklevel=5,
        )
        return None
