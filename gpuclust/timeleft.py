"""TimeLeft: how long a run still takes, from what its plan predicted and what was measured since."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

# A step is of a kind (a pass over the images, a layer's clustering), whose predictions err in the same way.
Step = tuple[str, Hashable]

# Nothing is said before so much was measured: the first batches are slow.
_SURE_S = 2.0
# A kind's prediction counts as much as so large a share of it, measured.
_TRUST = 0.03
# What is shown follows the estimate with this delay, so that it does not jump to and fro.
_CALM_S = 5.0


@dataclass
class _Current:
    step: Step
    predicted: float
    began: float
    share: float = 0.0


class TimeLeft:
    """Seconds left of a run of planned steps.

    Each step has a predicted time. The steps of one kind err alike, so the predictions of those to come are multiplied
    with what was measured of that kind, finished or not, over what was predicted for it; the prediction itself counts
    as 3 % of the kind's whole predicted time, measured as predicted, which keeps the factor near 1 at first. A step
    under way, a share s of which is done after e seconds, is thought to take (1 - s) times its corrected prediction and
    e for the rest, and 1 - s of that is left. Where no share is known, it has its corrected prediction less e left, or
    nothing; once it takes longer than that, the steps of its kind are thought longer, too.

    What is shown counts down with the clock and approaches that estimate within seconds. It is never negative, and
    unknown until something was measured, and without a plan. With predictions that are right it is right at once; with
    wrong ones it is about as wrong as they are at first, and right soon after the first of each kind of step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Step, float] = {}
        self._prior: dict[str, float] = {}
        self._measured, self._predicted = defaultdict[str, float](float), defaultdict[str, float](float)
        self._current: _Current | None = None
        self._shown: tuple[float, float] | None = None

    def plan(self, steps: Mapping[Step, float]) -> None:
        """The steps still to come and their predicted seconds, in place of those before; what was measured stays."""
        self.end()
        self._waiting = dict(steps)
        self._prior = {kind: 0.0 for kind, _ in steps}
        for (kind, _), seconds in steps.items():
            self._prior[kind] += _TRUST * seconds

    def start(self, step: Step) -> None:
        """A step begins, or begins again; the one before has ended. One that the plan lacks is not counted."""
        if self._current and self._current.step == step:
            self._waiting[step], self._current = self._current.predicted, None
        self.end()
        if step in self._waiting:
            self._current = _Current(step, self._waiting.pop(step), self._clock())

    def advance(self, share: float) -> None:
        """So large a share of the step under way is done."""
        if self._current:
            self._current.share = min(1.0, share)

    def end(self) -> None:
        """The step under way has ended."""
        if now := self._current:
            self._measured[now.step[0]] += self._clock() - now.began
            self._predicted[now.step[0]] += now.predicted
            self._current = None

    def seconds(self) -> float | None:
        """What is left, to be shown now; None while that is unknown."""
        now = self._clock()
        under_way = now - self._current.began if self._current and self._current.share else 0.0
        if not sum(self._prior.values()) or sum(self._measured.values()) + under_way < _SURE_S:
            return None
        left = self._estimate(now)
        if self._shown:
            then, before = self._shown
            before = max(0.0, before - (now - then))
            left += (before - left) * math.exp((then - now) / _CALM_S)
        self._shown = now, left
        return left

    def _estimate(self, now: float) -> float:
        left = sum(self._factor(kind, now) * seconds for (kind, _), seconds in self._waiting.items())
        if current := self._current:
            elapsed, told = now - current.began, self._factor(current.step[0], now) * current.predicted
            rest = 1 - current.share
            left += rest * (rest * told + elapsed) if current.share else max(0.0, told - elapsed)
        return left

    def _factor(self, kind: str, now: float) -> float:
        """What predictions of this kind are multiplied with."""
        prior = self._prior.get(kind, 0.0)
        measured, predicted = self._measured[kind] + prior, self._predicted[kind] + prior
        current = self._current
        if current and current.step[0] == kind:
            elapsed, share = now - current.began, current.share
            if not share and elapsed * predicted > measured * current.predicted:
                share = 1.0  # it takes longer than was thought, and is not done yet
            if share:
                measured, predicted = measured + elapsed, predicted + share * current.predicted
        return measured / predicted if predicted else 1.0
