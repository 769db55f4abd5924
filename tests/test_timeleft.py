"""The time left, of runs that are played with a clock of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from gpuclust.timeleft import Step, TimeLeft


@dataclass
class Played:
    """A run of passes, each told of in a hundred batches, and of layers that tell nothing on their way."""

    predicted: dict[Step, float]
    true: dict[Step, float]
    now: float = 1000.0
    shown: list[tuple[float, float | None]] = field(default_factory=list)  # what was truly left, and what was said

    def play(self) -> Played:
        left = TimeLeft(lambda: self.now)
        left.plan(self.predicted)
        end = self.now + sum(self.true.values())
        for step, seconds in self.true.items():
            left.start(step)
            began = self.now
            for i in range(100):
                if step[0] == "pass" and i:
                    left.advance(i / 100)
                self.shown.append((end - self.now, left.seconds()))
                self.now = began + seconds * (i + 1) / 100
        left.end()
        self.shown.append((0.0, left.seconds()))
        return self

    def said(self, after: float = 0.0) -> list[tuple[float, float]]:
        """What was truly left and what was said, once this share of the run was over."""
        whole = self.shown[0][0]
        return [(true, said) for true, said in self.shown if said is not None and true <= (1 - after) * whole]


def steps(passes: float, layers: float) -> dict[Step, float]:
    """Three passes, each before the five layers that it captures."""
    return {
        step: seconds
        for i in range(3)
        for step, seconds in ((("pass", i), passes), *((("layer", f"{i}.{j}"), layers * (1 + j)) for j in range(5)))
    }


def test_right_predictions_are_right_from_the_first_on() -> None:
    played = Played(steps(100, 10), steps(100, 10)).play()
    assert played.shown[0][1] is None
    assert len(played.said()) > len(played.shown) - 5
    assert all(abs(true - said) < 1e-6 * played.shown[0][0] for true, said in played.said())


@pytest.mark.parametrize(("passes", "layers"), [(3.0, 3.0), (0.3, 0.3), (3.0, 0.5), (0.5, 3.0)])
def test_wrong_predictions_are_put_right_by_what_was_measured(passes: float, layers: float) -> None:
    played = Played(steps(100, 10), steps(100 * passes, 10 * layers)).play()
    whole = played.shown[0][0]
    # A third of the run has had passes and layers.
    assert all(abs(true - said) < 0.18 * whole for true, said in played.said(after=0.34))
    assert all(abs(true - said) < 0.02 * whole for true, said in played.said(after=0.9))


@pytest.mark.parametrize(("factor", "after"), [(0.3, 0.0), (1.0, 0.0), (3.0, 0.34)])
def test_it_counts_down_and_is_never_negative(factor: float, after: float) -> None:
    said = [said for _, said in Played(steps(100, 10), steps(100 * factor, 10 * factor)).play().said(after)]
    assert min(said) >= 0
    assert sum(max(0.0, later - earlier) for earlier, later in pairwise(said)) < 0.01 * said[0]


def test_a_layer_that_overruns_makes_the_others_longer_before_it_ends() -> None:
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    left.plan({("pass", 0): 10.0, ("layer", "a"): 10.0, ("layer", "b"): 10.0})
    left.start(("pass", 0))
    now[0] = 10.0
    left.start(("layer", "a"))
    assert left.seconds() == pytest.approx(20)
    now[0] = 200.0
    said = left.seconds()
    assert said is not None
    assert said > 100
    left.end()
    now[0] = 300.0
    assert left.seconds() == pytest.approx(10 * (190 + 0.6) / (10 + 0.6))  # 3 % of twenty predicted seconds


def test_it_is_unknown_without_a_plan_and_before_anything_was_measured() -> None:
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    left.start(("pass", 0))
    now[0] = 100.0
    assert left.seconds() is None
    left.plan({("pass", 0): 5.0})
    assert left.seconds() is None
    left.start(("pass", 0))
    left.advance(0.01)
    now[0] += 1.0
    assert left.seconds() is None
    now[0] += 1.5
    assert left.seconds() is not None


def test_a_new_plan_keeps_what_was_measured() -> None:
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    left.plan({("pass", 0): 10.0})
    left.start(("pass", 0))
    now[0] = 30.0
    left.plan({("pass", i): 10.0 for i in range(2)})
    assert left.seconds() == pytest.approx(20 * (30 + 0.6) / (10 + 0.6))


def test_a_step_that_begins_again_is_counted_once() -> None:
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    left.plan({("pass", i): 10.0 for i in range(2)})
    left.start(("pass", 0))
    left.advance(0.5)
    now[0] = 50.0
    left.start(("pass", 0))
    now[0] = 60.0
    left.start(("pass", 1))
    assert left.seconds() == pytest.approx(10)


def test_predictions_of_nothing_say_nothing() -> None:
    assert Played(dict.fromkeys(steps(1, 1), 0.0), steps(100, 10)).play().said() == []
