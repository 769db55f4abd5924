"""The energy that a run took, from the counter of the GPU itself."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpuclust.driver import NoDriver, asked, card


class Energy:
    """The energy that a GPU has drawn since this was made.

    Cards of NVIDIA since Volta count it themselves: of the whole card, idle power and other processes included. What
    the host draws is not in it.

    Parameters
    ----------
    device : torch.device
        Of the run. On a CPU nothing is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._began, self._first = time.perf_counter(), _joules(device)

    def describe(self) -> dict[str, Any]:
        """The energy up to now, for JSON.

        Returns
        -------
        dict
            ``joules`` and ``mean_watts``, both None where there is no telling, and ``note``: what they count, or why
            not.
        """
        first, last, seconds = self._first, _joules(self.device), time.perf_counter() - self._began
        if isinstance(first, str) or isinstance(last, str):
            return {"joules": None, "mean_watts": None, "note": first if isinstance(first, str) else last}
        note = "of the whole card while the run went on, other processes included; the host's is not in it"
        return {"joules": last - first, "mean_watts": (last - first) / seconds, "note": note}


def _joules(device: torch.device) -> float | str:
    """The card's counter, of the energy since its driver was loaded; or why it cannot be read."""
    if device.type != "cuda":
        return f"energy is read of NVIDIA cards, and the run was on {device}"
    try:
        with asked() as nvml:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(card(nvml, device)) / 1000
    except NoDriver as error:
        return str(error)
