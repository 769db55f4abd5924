"""Staging: chunks that come through two buffers, the next one on its way while this one is worked on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """Rows that are still to be read.

    Attributes
    ----------
    start, size : int
        The first row's number, and how many there are.
    fill : Callable
        Writes them into a tensor (size, d) in host memory; called from another thread.
    pinned : tensor (size, d) or None
        The rows themselves, where the device can read them without help; they must stay as they are.
    """

    start: int
    size: int
    fill: Callable[[torch.Tensor], None]
    pinned: torch.Tensor | None = None


class Staging:
    """Two buffers of ``rows`` rows on a device and, for CUDA, two of page-locked host memory before them.

    A thread fills the buffer of the next piece (and, for CUDA, starts its copy on a stream of its own) while the
    caller works on this one. It ends with its piece, so that nothing is left running wherever a pass is given up.
    """

    def __init__(self, rows: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._places = [torch.empty(rows, d, dtype=dtype, device=device) for _ in range(2)]
        self._cuda = _Copies(rows, d, dtype, device) if device.type == "cuda" else None

    def stream(self, pieces: Iterable[Piece]) -> Generator[tuple[int, torch.Tensor], None, None]:
        """The rows of the pieces in order, on the device; each tensor is valid until the next is asked for.

        The next piece is asked for when the last one is filled: what it is read from may be used again by then.
        """
        ready: tuple[Piece, int] | None = None
        filling: _Filling | None = None
        try:
            for index, piece in enumerate(pieces):
                slot = index % 2
                filling = _Filling(lambda piece=piece, slot=slot: self._fill(piece, slot))  # type: ignore[misc]
                if ready:
                    yield self._hand_out(*ready)
                    self._hand_back(ready[1])
                filling.wait()
                ready = piece, slot
            if ready:
                yield self._hand_out(*ready)
        finally:
            # The buffers must not go before what is still written into them.
            if filling:
                filling.thread.join()
            if self._cuda:
                self._cuda.stream.synchronize()

    def _fill(self, piece: Piece, slot: int) -> None:
        place = self._places[slot][: piece.size]
        if self._cuda:
            self._cuda.fill(piece, slot, place)
        else:
            piece.fill(place)

    def _hand_out(self, piece: Piece, slot: int) -> tuple[int, torch.Tensor]:
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_event(self._cuda.copied[slot])
        return piece.start, self._places[slot][: piece.size]

    def _hand_back(self, slot: int) -> None:
        if self._cuda:
            self._cuda.used[slot].record(torch.cuda.current_stream(self.device))


class _Copies:
    """What the copies to a CUDA device need: page-locked buffers, a stream, and events that say who is done.

    ``copied`` of a buffer: its rows are on the device, so its host part may be filled again. ``used``: the caller's
    stream has worked on them, so its device part may be.
    """

    def __init__(self, rows: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.shape, self.dtype = (rows, d), dtype
        self.host: dict[int, torch.Tensor] = {}
        self.stream = torch.cuda.Stream(device)
        # The device's buffers may be memory that work in the caller's stream still uses.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.copied = [torch.cuda.Event() for _ in range(2)]
        self.used = [torch.cuda.Event() for _ in range(2)]

    def fill(self, piece: Piece, slot: int, place: torch.Tensor) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            rows = piece.pinned
            if rows is None:
                if slot not in self.host:
                    self.host[slot] = torch.empty(self.shape, dtype=self.dtype, device="cpu", pin_memory=True)
                rows = self.host[slot][: piece.size]
                self.copied[slot].synchronize()
                piece.fill(rows)
            self.stream.wait_event(self.used[slot])
            place.copy_(rows, non_blocking=True)
            self.copied[slot].record(self.stream)


class _Filling:
    """One call in a thread of its own; what it raises is raised where it is waited for."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        # Modes belong to a thread: tensors of inference mode may only be written in it.
        self._mode = torch.is_inference_mode_enabled()
        self.thread = threading.Thread(target=self._run, name="gpuclust-staging")
        self.thread.start()

    def wait(self) -> None:
        self.thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with torch.inference_mode() if self._mode else contextlib.nullcontext():
                self._call()
        except BaseException as error:
            self._error = error
