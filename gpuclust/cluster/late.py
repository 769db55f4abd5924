"""Numbers that the device computes and the host reads later, so that it can ask for more work without waiting."""

from __future__ import annotations

import torch


class Late:
    """A small tensor on its way to the host.

    Parameters
    ----------
    numbers : (r, c), on any device
        May be overwritten once this has been made: the copy stands in line before what is asked for next.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True, copy=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[list[float]]:
        """The numbers; waits until they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
