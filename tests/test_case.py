"""Cases: what is refused; rows and starts that are the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from gpuclust.bench.case import Case, make_rows
from gpuclust.cluster import KMeans
from gpuclust.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n is a whole number of at least 1; got 0"),
        ({"d": -1}, "d is a whole number"),
        ({"k": 0}, "k is a whole number"),
        ({"k": 11}, "k is at most n"),
        ({"iterations": 0}, "iterations is"),
        ({"n_init": True}, "n_init is"),
        ({"batch": 0}, "batch is"),
        ({"seed": -1}, "seed is a whole number of at least 0"),
        ({"dtype": "int8"}, "dtype is one of float32, float16, bfloat16"),
    ],
)
def test_what_cannot_be_measured_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Case(**{"n": 10, "d": 3, "k": 2, **values})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_and_starts(dtype):
    case = Case(300, 5, 7, dtype=dtype, n_init=2, batch=3, seed=4)
    rows = make_rows(case, CPU)
    assert rows.x.shape == (3, 300, 5)
    assert rows.x.dtype == case.torch_dtype
    assert rows.starts.shape == (3, 2, 7, 5)
    assert rows.starts.dtype == torch.float32
    assert (rows.x >= 0).all()
    assert 0.1 < (rows.x == 0).float().mean() < 0.9
    assert not torch.equal(rows.x[0], rows.x[1])
    for problem, starts in zip(rows.x.float(), rows.starts, strict=True):
        for start in starts:
            where = (problem[None] == start[:, None]).all(2)
            assert where.any(1).all()  # each is a row
    again = make_rows(case, CPU)
    assert torch.equal(again.x, rows.x)
    assert torch.equal(again.starts, rows.starts)
    assert not torch.equal(make_rows(Case(300, 5, 7, dtype=dtype, n_init=2, batch=3), CPU).x, rows.x)


@pytest.mark.parametrize("d", [4, 600])
def test_rows_still_move_after_ten_iterations(d):
    rows = make_rows(Case(2000, d, 20), CPU)
    model = KMeans(20, init=rows.starts[0, 0], n_init=1, max_iter=10, tol=0).fit(rows.x[0])
    assert model.n_iter_ == 10


def test_rows_that_no_memory_holds_are_refused():
    with pytest.raises(InputError, match=r"X takes 4\d* TB, and cpu has"):
        make_rows(Case(1_000_000_000, 1000, 2), CPU)


def test_memory_that_runs_out_is_said(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(InputError, match="cpu has no memory for the rows"):
        make_rows(Case(10, 2, 2), CPU)
