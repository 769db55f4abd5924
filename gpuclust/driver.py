"""The NVIDIA driver's management library (NVML, by way of pynvml): how it is opened, and which of its cards is which.

The driver numbers cards its own way, and torch another (fastest first, or as CUDA_VISIBLE_DEVICES says).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from gpuclust.errors import first_line

if TYPE_CHECKING:
    import torch


class NoDriver(Exception):
    """The driver cannot be asked; the message says why in one line."""


@contextmanager
def asked() -> Iterator[Any]:
    """The module pynvml, ready to be called.

    Raises
    ------
    NoDriver
        If it is not installed, finds no driver, or if one of the calls in the block fails.
    """
    try:
        import pynvml
    except ImportError:
        raise NoDriver("nvidia-ml-py is not installed, so the driver cannot be asked") from None
    try:
        _open(pynvml)
        yield pynvml
    except pynvml.NVMLError as error:
        raise NoDriver(f"the NVIDIA driver does not answer: {first_line(error)}") from None


@cache
def _open(nvml: Any) -> None:
    """The library stays open until the process ends: to open it takes milliseconds, and free memory is asked often."""
    nvml.nvmlInit()


def card(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of the card, or of the slice of a card (MIG), that torch calls ``device``.

    It is found by its UUID, or by its PCI slot where the driver does not know that.
    """
    import torch

    has: Any = torch.cuda.get_device_properties(device)
    for uuid in (f"GPU-{has.uuid}", f"MIG-{has.uuid}"):
        with suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
    slot = f"{has.pci_domain_id:08x}:{has.pci_bus_id:02x}:{has.pci_device_id:02x}.0"
    return nvml.nvmlDeviceGetHandleByPciBusId(slot)
