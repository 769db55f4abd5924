"""A fitted estimator as it is pickled: what lies on a device travels in host memory, and goes back where it can."""

from __future__ import annotations

import importlib
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
