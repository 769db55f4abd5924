"""`gpuclust.plan`: what a run would do, from data, or for images and a GPU that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases_run as cases
import pytest

import gpuclust
from gpuclust.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_folder(tmp_path_factory.mktemp("data") / "pictures")


def test_the_plan_counts_what_the_run_holds_and_reads_few_images() -> None:
    pictures = cases.Pictures()
    plan = gpuclust.plan(cases.small_net(), pictures, layers="conv*", dtype="float16")
    assert [(row.name, row.d, row.bytes) for row in plan.rows] == [("conv1", 2048, 24 * 4096), ("conv2", 384, 24 * 768)]
    assert pictures.read == 2 + len(cases.CLASSES)


def test_the_plan_downloads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    plan = gpuclust.plan("alexnet", folder, per_class=2)
    assert [(row.name, row.d) for row in plan.rows][:2] == [("conv1", 193_600), ("conv2", 139_968)]
    # The weights' own transform counts: these take 384 pixels, the others of this network 224.
    plan = gpuclust.plan("regnet_y_16gf", folder, weights="IMAGENET1K_SWAG_E2E_V1", layers="stem")
    assert plan.rows[0].d == 32 * 192 * 192
    with pytest.raises(InputError, match="unknown weights 'IMAGENET1K_V9'"):
        gpuclust.plan("alexnet", folder, weights="IMAGENET1K_V9")


def test_a_plan_for_images_that_are_not_there_counts_the_classes_it_is_given() -> None:
    for options, k in (({}, 10), ({"clusters": 3}, 3), ({"classes": ("a", "b")}, 2)):
        plan = gpuclust.plan("squeezenet1_1", images=40, card="8GB", weights="none", **options)
        assert plan.n == 40
        assert plan.device == "cuda:0"
        assert plan.rows[0].bytes == 40 * 64 * 111 * 111 * 4
        assert plan.room.free_bytes == int(8e9 * 0.95)
        with pytest.raises(InputError, match=f"{k} clusters were asked for, and there are 1 images"):
            gpuclust.plan("squeezenet1_1", images=1, card="8GB", weights="none", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "at least one image; got --images 0"),
        ({"images": 10, "card": "nonsense"}, "a size is a number with .*; got 'nonsense'"),
        ({}, "give one of the two"),
    ],
)
def test_a_plan_for_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        gpuclust.plan("squeezenet1_1", weights="none", **options)
