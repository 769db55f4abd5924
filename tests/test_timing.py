"""Timing: calls in turn, what a call returns is freed, rounds that fit a budget, percentiles."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch

from gpuclust.bench.timing import Clock, Guarded, Kept, in_turn, rounds_for, spread, turn

CPU = torch.device("cpu")


def test_a_call_takes_as_long_as_it_takes():
    slept_s = Clock(CPU).time(lambda: time.sleep(0.03))
    assert 0.03 <= slept_s < 1


def test_calls_alternate_and_warm_up_rounds_do_not_count():
    order = []
    times = in_turn(Clock(CPU), [lambda: order.append("a"), lambda: order.append("b")], rounds=3, warmup=2)
    assert "".join(order) == "ab" * 5
    assert [len(seconds) for seconds in times] == [3, 3]
    assert turn(Clock(CPU), []) == []


def test_no_garbage_is_collected_while_it_measures_and_then_again():
    during = []
    in_turn(Clock(CPU), [lambda: during.append(gc.isenabled())], rounds=2)
    assert during == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        in_turn(Clock(CPU), [lambda: 1 / 0], rounds=1)
    assert gc.isenabled()


def test_what_a_call_returns_is_freed():
    made = []

    def call():
        tensor = torch.zeros(8)
        made.append(weakref.ref(tensor))
        return tensor

    Clock(CPU).time(call)
    assert made[0]() is None
    kept = Kept(call)
    Clock(CPU).time(kept)
    assert made[1]() is kept.result


def test_a_guarded_call_keeps_its_first_error_and_is_not_called_again():
    calls = []

    def fail():
        calls.append(1)
        raise RuntimeError("no\nmore")

    guarded = Guarded(fail)
    guarded()
    guarded()
    assert (len(calls), guarded.error) == (1, "RuntimeError: no")


@pytest.mark.parametrize(
    ("once_s", "budget_s", "expected"), [(1.0, 10.0, 10), (9.0, 10.0, 3), (0.001, 10.0, 20), (0.0, 1.0, 20)]
)
def test_rounds_fit_a_budget(once_s, budget_s, expected):
    assert rounds_for(once_s, budget_s) == expected


def test_spread_is_the_median_and_percentiles():
    assert spread("time{}_s", [5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {
        "time_s": 2.5,
        "time_p20_s": 1.0,
        "time_p80_s": 4.0,
    }


@pytest.mark.gpu
def test_a_gpus_time_waits_for_the_work():
    device = torch.device("cuda", 0)
    x = torch.randn(4096, 4096, device=device)
    clock = Clock(device)
    clock.time(lambda: x @ x)
    one_s = min(clock.time(lambda: x @ x) for _ in range(5))
    many_s = min(clock.time(lambda: [x @ x for _ in range(20)]) for _ in range(3))
    # In float32 a product is 1.4e11 operations, which no GPU does in a launch's time.
    assert 10 * one_s < many_s < 40 * one_s
