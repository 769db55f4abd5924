"""Memory that runs out in mid-fit: what failed is done again, in chunks of half as many rows, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from gpuclust.errors import is_out_of_memory

T = TypeVar("T")

# How often the rows of a chunk have been halved in the fit that runs in this thread.
_HALVINGS: ContextVar[int] = ContextVar("halvings", default=0)
# Beyond this a chunk is not what takes the memory.
_MOST = 20


def relieved(rows: int) -> int:
    """So many rows of a chunk, halved as often as memory ran out in this fit; one at least."""
    return max(1, rows >> _HALVINGS.get())


class Relief:
    """Repeats what ran out of memory with smaller chunks, for the whole length of a fit.

    What is repeated must begin from the state that it began from, and must not wait for other processes: the others
    know nothing of it.

    Attributes
    ----------
    halvings : int
        How often memory ran out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.halvings = device, 0

    def begin(self, halvings: int) -> None:
        """Rows of a chunk are halved so often from the beginning, to keep within a limit."""
        _HALVINGS.set(_HALVINGS.get() + halvings)

    def run(self, attempt: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """The result of ``attempt()``; after each failure for want of memory ``undo()`` comes first.

        Raises
        ------
        Exception
            What ``attempt`` raised, where that is something else, or where smaller chunks have not helped.
        """
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.halvings >= _MOST:
                    error.add_note(
                        f"gpuclust took rows in chunks of 1/{2**self.halvings} of the usual, and that was "
                        "not what took the memory: lower memory_limit, or give X as chunks"
                    )
                    raise
            # Outside of the handler, whose error keeps alive what the attempt allocated.
            self.halvings += 1
            _HALVINGS.set(_HALVINGS.get() + 1)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            undo()

    @property
    def note(self) -> str | None:
        """For the report; None where memory was enough."""
        if not self.halvings:
            return None
        times = "once" if self.halvings == 1 else f"{self.halvings} times"
        return f"memory ran out {times}: rows were taken in chunks of 1/{2**self.halvings} of the usual"


@contextmanager
def relief(device: torch.device) -> Iterator[Relief]:
    """The `Relief` of a fit; when it ends chunks are as large as before."""
    token = _HALVINGS.set(_HALVINGS.get())
    try:
        yield Relief(device)
    finally:
        _HALVINGS.reset(token)
