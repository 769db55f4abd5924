"""Chunks through two buffers: right rows, one ahead of the caller, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from gpuclust.cluster.sources.staging import Piece, Staging

CPU = torch.device("cpu")


def pieces(x: torch.Tensor, size: int) -> Iterator[Piece]:
    for start in range(0, len(x), size):
        part = x[start : start + size]
        yield Piece(start, len(part), lambda out, part=part: out.copy_(part))  # type: ignore[misc]


def read(x: torch.Tensor, size: int, device: torch.device = CPU) -> list[tuple[int, torch.Tensor]]:
    staging = Staging(size, x.shape[1], x.dtype, device)
    return [(start, rows.clone()) for start, rows in staging.stream(pieces(x, size))]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_all_rows_come_in_order(size: int) -> None:
    x = torch.randn(20, 3)
    found = read(x, size)
    assert [start for start, _ in found] == list(range(0, 20, size))
    assert torch.equal(torch.cat([rows for _, rows in found]), x)


def test_the_next_piece_is_filled_while_the_caller_has_this_one() -> None:
    x = torch.arange(12.0).view(6, 2)
    filled = [threading.Event() for _ in range(3)]

    def fill(index: int, out: torch.Tensor) -> None:
        out.copy_(x[2 * index : 2 * index + 2])
        filled[index].set()

    stream = Staging(2, 2, x.dtype, CPU).stream(Piece(2 * i, 2, partial(fill, i)) for i in range(3))
    for index, (start, rows) in enumerate(stream):
        if index < 2:
            assert filled[index + 1].wait(10), "the next piece comes without being asked for"
        assert torch.equal(rows, x[start : start + 2]), "and leaves this one as it is"


def test_no_thread_outlives_its_piece_wherever_a_pass_ends() -> None:
    before = threading.active_count()
    x = torch.randn(20, 3)
    stream = Staging(4, 3, x.dtype, CPU).stream(pieces(x, 4))
    next(stream)
    held = stream  # as the traceback of an error would hold it
    for thread in threading.enumerate():
        if thread.name == "gpuclust-staging":
            thread.join(10)
    assert threading.active_count() == before
    held.close()
    stream = Staging(4, 3, x.dtype, CPU).stream(pieces(x, 4))
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert threading.active_count() == before
    assert len(read(x, 4)) == 5


def test_what_a_read_raises_reaches_the_caller_after_the_rows_before_it() -> None:
    def fail(out: torch.Tensor) -> None:
        raise OSError(5, "Input/output error")

    good = Piece(0, 2, lambda out: out.zero_())  # type: ignore[arg-type, return-value]
    stream = Staging(2, 3, torch.float32, CPU).stream([good, Piece(2, 2, fail)])
    assert next(stream)[0] == 0
    with pytest.raises(OSError, match="Input/output error"):
        next(stream)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_works_in_the_modes_of_the_caller(mode: type) -> None:
    with mode():
        x = torch.randn(9, 3)
        assert torch.equal(torch.cat([rows for _, rows in read(x, 2)]), x)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_rows_reach_the_gpu_in_order_while_it_works(pinned: bool) -> None:
    x = torch.randn(1000, 129)
    x = x.pin_memory() if pinned else x
    device = torch.device("cuda")
    slow = torch.randn(2000, 2000, device=device)
    found, rows = [], 64
    parts = [
        Piece(start, len(x[start : start + rows]), partial(_copy, x[start : start + rows]), x[start : start + rows])
        if pinned
        else Piece(start, len(x[start : start + rows]), partial(_copy, x[start : start + rows]))
        for start in range(0, len(x), rows)
    ]
    for _, part in Staging(rows, 129, x.dtype, device).stream(parts):
        for _ in range(20):
            slow = (slow @ slow).clamp_(-1, 1)  # the copy of the next chunk must not overtake what reads this one
        found.append(part + slow[:1, :1] * 0)
    assert torch.equal(torch.cat(found).cpu(), x)


def _copy(part: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(part)
