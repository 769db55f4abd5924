"""The answer of a report in plain words: which layer groups the images by class, and how the scores get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gpuclust.report.report import Report

# A score this small a part of the way from chance to perfect is called "near chance", and a smaller change of it level.
NEAR_CHANCE = 0.05
LEVEL = 0.01

Show = Callable[[float], str]


@dataclass(frozen=True)
class Answer:
    """The page's opening: a headline, the sentences under it, and the layer it speaks of."""

    headline: str
    sentences: tuple[str, ...]
    best: int


def answer(report: Report) -> Answer:
    """Say what the curve over the layers says, with its numbers.

    Matched accuracy is the score where there are as many clusters as classes, as in the paper. Otherwise at most
    min(clusters, classes) groups can be matched, and AMI is the score instead.
    """
    results, classes = report.results, len(report.samples.classes)
    k = results[0].k
    score = "accuracy" if k == classes else "ami"
    values = np.array([result.scores[score] for result in results])
    chance = report.chance.get(score, 0.0)
    lift = (values - chance) / (1 - chance) if chance < 1 else np.zeros_like(values)
    best = report.best(score)
    names = [result.layer for result in results]
    show = _percent if score == "accuracy" else _plain

    near = lift < NEAR_CHANCE
    sentences = [_mismatch(k, classes)] if k != classes else []
    if min(k, classes) < 2:
        unit = "class" if classes < 2 else "cluster"
        return Answer(f"With a single {unit} there is nothing to compare.", tuple(sentences), best)
    headline = _headline(names[best], score, values[best], chance, bool(near.all()))
    if len(results) == 1:
        if score == "accuracy":
            sentences.append(_by_ami(report, best))
        return Answer(headline, tuple(sentences), best)
    if near.all():
        spread = f"{show(values.min())} to {show(values.max())}"
        sentences.append(f"Over the {len(names)} layers it stays within {spread}: no layer shows the classes.")
        return Answer(headline, tuple(sentences), best)
    ties = np.flatnonzero(values == values[best])
    if len(ties) > 1:
        others = [names[i] for i in ties[1:]]
        sentences.append(f"{_listed(others)} {'reaches' if len(others) == 1 else 'reach'} the same value.")
    if score == "accuracy":
        sentences.append(_by_ami(report, best))
    sentences += [_start(names, values, near, show), _rise(names, values, show), _end(names, values, best, show)]
    return Answer(headline, tuple(sentence for sentence in sentences if sentence), best)


def _headline(name: str, score: str, value: float, chance: float, flat: bool) -> str:
    if score == "ami":
        if flat:
            return f"No layer groups the images by class: the highest AMI, at {name}, is {value:.2f}; chance is 0."
        if value >= 1:
            return f"{name} groups the images by class without a mistake: AMI 1, where chance is 0."
        return f"{name} groups the images by class best: AMI {value:.2f}, where chance is 0 and a perfect match 1."
    if flat:
        return (
            f"No layer groups the images by class: {_percent(value)} lie in the right cluster at best, at {name}; "
            f"chance is {_percent(chance)}."
        )
    if value >= 1:
        return f"{name} groups the images by class without a mistake; chance is {_percent(chance)}."
    return (
        f"{name} groups the images by class best: {_percent(value)} of them lie in the cluster of their class; "
        f"chance is {_percent(chance)}."
    )


def _mismatch(k: int, classes: int) -> str:
    most = "cluster" if k > classes else "class"
    left = k - classes if k > classes else classes - k
    plural = {"cluster": "clusters", "class": "classes"}[most]
    return (
        f"There are {k} clusters for {classes} classes, so {left} {most if left == 1 else plural} can't be matched and "
        "accuracy can't reach what it could with equal numbers: AMI is the score to read."
    )


def _by_ami(report: Report, best: int) -> str:
    first = report.best("ami")
    value = report.results[first].scores["ami"]
    if first == best:
        return f"AMI, which is corrected for chance, is {value:.2f} there" + (
            ", the highest too." if len(report.results) > 1 else "."
        )
    there = report.results[best].scores["ami"]
    name = report.results[first].layer
    if value - there < LEVEL:
        return f"By AMI, which is corrected for chance, {name} is level with it ({value:.2f})."
    return f"By AMI, which is corrected for chance, the best layer is {name} ({value:.2f} against {there:.2f})."


def _start(names: list[str], values: np.ndarray, near: np.ndarray, show: Show) -> str:
    first = int(np.argmin(near))  # the first layer that is not near chance
    if first == 0:
        return f"The first layer, {names[0]}, is above chance already ({show(values[0])})."
    if first == 1:
        return f"The first layer, {names[0]}, is near chance ({show(values[0])})."
    low, high = show(values[:first].min()), show(values[:first].max())
    spread = low if low == high else f"{low} to {high}"
    return f"The first {first} layers, {names[0]} to {names[first - 1]}, are near chance ({spread})."


def _rise(names: list[str], values: np.ndarray, show: Show) -> str:
    steps = np.diff(values)
    top = int(np.argmax(steps))
    if steps[top] < LEVEL:
        return ""
    return f"The largest step is from {names[top]} to {names[top + 1]}: {show(values[top])} to {show(values[top + 1])}."


def _end(names: list[str], values: np.ndarray, best: int, show: Show) -> str:
    if (np.diff(values) > 0).all():
        return "It rises with every layer."
    fall = values[best] - values[-1]
    if best == len(names) - 1:
        return "The last layer is the best."
    if fall < LEVEL:
        return f"From {names[best]} to the last layer, {names[-1]}, it stays level."
    return f"After {names[best]} it falls again, to {show(values[-1])} at the last layer, {names[-1]}."


def _percent(value: float) -> str:
    # A share short of 100 % must not be rounded up to it.
    return "100%" if value >= 1 else f"{min(value, 0.999):.1%}"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _listed(names: list[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more layers"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
