"""Group: the processes that share one fit, each holding some of the rows."""

from __future__ import annotations

from typing import Protocol

import torch


class Group(Protocol):
    """What the Lloyd loop asks of the processes that share a fit.

    Sums travel as they are: they are exact (`gpuclust.cluster.sums`), so the order in which processes add is no matter.
    """

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the processes; ``tensor`` keeps this process's share."""
        ...


class OneProcess:
    """The group of a process that works alone."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself: there is nobody to add to."""
        return tensor
