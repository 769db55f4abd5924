"""The page's plain words fit every shape of curve."""

from __future__ import annotations

from dataclasses import replace

import cases_report as cases
import pytest

from gpuclust.report import Report
from gpuclust.report.answer import answer

BASE = cases.report(layers=2, classes=5, per_class=10, pictures=False)


def told(accuracy: list[float], ami: list[float] | None = None, k: int = 5, classes: int = 5) -> tuple[str, str]:
    """Headline and text for layers conv1.. with the given scores; chance is .25."""
    scores = BASE.results[0].scores
    results = [
        replace(BASE.results[0], layer=f"conv{index}", k=k, scores={**scores, "accuracy": a, "error": 1 - a, "ami": b})
        for index, (a, b) in enumerate(zip(accuracy, ami or accuracy, strict=True), start=1)
    ]
    samples = replace(BASE.samples, classes=BASE.samples.classes[:classes])
    said = answer(Report(results, samples, {"accuracy": 0.25, "ami": 0.0}))
    return said.headline, " ".join(said.sentences)


def test_a_curve_that_rises_to_the_end() -> None:
    headline, text = told([0.26, 0.27, 0.5, 0.85], [0.0, 0.01, 0.4, 0.8])
    assert headline.startswith("conv4 groups the images by class best: 85.0% of them")
    assert "chance is 25.0%" in headline
    assert "AMI, which is corrected for chance, is 0.80 there, the highest too." in text
    assert "The first 2 layers, conv1 to conv2, are near chance (26.0% to 27.0%)." in text
    assert "The largest step is from conv3 to conv4: 50.0% to 85.0%." in text
    assert text.endswith("It rises with every layer.")


def test_a_peak_in_the_middle() -> None:
    headline, text = told([0.26, 0.8, 0.6], [0.0, 0.5, 0.7])
    assert headline.startswith("conv2 ")
    assert "the best layer is conv3 (0.70 against 0.50)" in text
    assert "The first layer, conv1, is near chance (26.0%)." in text
    assert text.endswith("After conv2 it falls again, to 60.0% at the last layer, conv3.")


def test_a_curve_that_rises_but_not_at_every_step_and_one_that_only_falls() -> None:
    assert told([0.5, 0.4, 0.8])[1].endswith("The last layer is the best.")
    headline, text = told([0.9, 0.7, 0.5])
    assert headline.startswith("conv1 ")
    assert "The first layer, conv1, is above chance already (90.0%)." in text
    assert "largest step" not in text
    assert text.endswith("falls again, to 50.0% at the last layer, conv3.")
    assert told([0.3, 0.8, 0.795])[1].endswith("From conv2 to the last layer, conv3, it stays level.")


def test_chance_everywhere() -> None:
    headline, text = told([0.25, 0.26, 0.24], [0.0, 0.01, 0.0])
    assert headline == (
        "No layer groups the images by class: 26.0% lie in the right cluster at best, at conv2; chance is 25.0%."
    )
    assert text == "Over the 3 layers it stays within 24.0% to 26.0%: no layer shows the classes."


def test_perfect_layers() -> None:
    headline, text = told([0.3, 1.0, 1.0, 1.0])
    assert headline == "conv2 groups the images by class without a mistake; chance is 25.0%."
    assert "conv3 and conv4 reach the same value." in text
    assert told([0.3, 0.99999])[0].startswith("conv2 groups the images by class best: 99.9%")


def test_a_single_layer() -> None:
    headline, text = told([0.7])
    assert headline.startswith("conv1 groups the images by class best: 70.0%")
    assert text == "AMI, which is corrected for chance, is 0.70 there."


@pytest.mark.parametrize(("k", "classes", "left"), [(8, 5, "3 clusters"), (4, 5, "1 class"), (2, 5, "3 classes")])
def test_as_many_clusters_as_classes_or_ami(k: int, classes: int, left: str) -> None:
    headline, text = told([0.4, 0.9, 0.5], [0.0, 0.2, 0.6], k=k, classes=classes)
    assert headline == "conv3 groups the images by class best: AMI 0.60, where chance is 0 and a perfect match 1."
    assert text.startswith(f"There are {k} clusters for {classes} classes, so {left} can't be matched")
    assert "%" not in text


def test_ami_at_chance_or_perfect() -> None:
    assert told([0.4, 0.5], [0.0, 0.01], k=8)[0].startswith("No layer groups the images by class: the highest AMI")
    assert told([0.4, 0.5], [0.0, 1.0], k=8)[0].startswith("conv2 groups the images by class without a mistake: AMI 1")


def test_nothing_to_compare() -> None:
    assert told([1.0, 1.0], k=1)[0] == "With a single cluster there is nothing to compare."
    assert told([1.0, 1.0], k=1, classes=1)[0] == "With a single class there is nothing to compare."
