"""analyze and plan: every number against scikit-learn, what comes back as it was, what is refused."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import cases_run as cases
import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gpuclust
from gpuclust import analysis
from gpuclust.capture.store import LayerStore
from gpuclust.cluster.backends.torch import TorchBackend
from gpuclust.compare.result import COLUMNS
from gpuclust.errors import InputError, MemoryLimitError, UnavailableError
from gpuclust.prepare import placed

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_folder(tmp_path_factory.mktemp("data") / "pictures")


def model(seed: int = 0) -> Any:
    return cases.small_net(seed), cases.to_tensor


def activations(network: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """Each layer of SmallNet computed step by step, without hooks."""
    network = network.eval()
    with torch.no_grad():
        conv1 = torch.relu(network.features[0](images))
        conv2 = torch.relu(network.features[3](network.features[2](conv1)))
        pool = conv2.mean((2, 3))
        fc3 = network.classifier(pool)
    return {
        name: x.flatten(1).double().numpy() for name, x in zip(cases.LAYERS, (conv1, conv2, pool, fc3), strict=True)
    }


def same_results(one: gpuclust.Report, other: gpuclust.Report) -> bool:
    columns = [name for name in COLUMNS if name not in cases.TIMES]
    return one.layers[columns].equals(other.layers[columns]) and one.assignments.iloc[:, 1:].equals(
        other.assignments.iloc[:, 1:]
    )


def test_the_solver_changes_no_cluster(folder: Path) -> None:
    dual, primal = (gpuclust.analyze(model(), folder, solver=solver) for solver in ("dual", "primal"))
    for one, other in zip(dual.results, primal.results, strict=True):
        assert (one.solver, other.solver) == ("dual", "primal")
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.inertia, one.n_iter) == (other.inertia, other.n_iter)


def test_every_number_is_what_scikit_learn_says_of_the_same_activations(folder: Path) -> None:
    report = gpuclust.analyze(model(), folder)
    assert [result.layer for result in report.results] == cases.LAYERS
    assert report.samples.classes == cases.CLASSES
    images = torch.stack([cases.to_tensor(cases.Image.open(folder / path)) for path in report.samples.paths])
    classes = report.samples.labels
    assert [path.split("/")[0] for path in report.samples.paths] == [cases.CLASSES[label] for label in classes]
    expected = activations(cases.small_net(), images)
    for result in report.results:
        x, labels = expected[result.layer], result.labels
        assert result.d == x.shape[1]
        centroids = np.stack([x[labels == j].mean(0) for j in range(3)])
        dist2 = ((x[:, None] - centroids) ** 2).sum(2)
        assert result.inertia == pytest.approx(dist2.min(1).sum(), rel=1e-4)
        assert result.dist2 == pytest.approx(dist2[np.arange(24), labels], rel=1e-3, abs=1e-9)
        assert result.dist2.sum() == pytest.approx(result.inertia, rel=1e-12)
        scores = result.scores
        assert scores["ari"] == metrics.adjusted_rand_score(classes, labels)
        assert scores["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(classes, labels), abs=1e-12)
        assert scores["nmi"] == metrics.normalized_mutual_info_score(classes, labels)
        assert scores["silhouette"] == pytest.approx(metrics.silhouette_score(x, labels), abs=1e-4)
        centred = x - x.mean(0)
        width = np.linalg.norm(centred @ np.linalg.svd(centred)[2][0])
        assert np.linalg.norm(result.projection[:, 0]) == pytest.approx(width, rel=1e-4)
    assert report.run["times"]["capture_s"] == pytest.approx(sum(result.capture_s for result in report.results))
    assert report.chance["ari"] == 0.0
    assert 1 / 3 < report.chance["accuracy"] < 0.6


def test_a_dataset_a_loader_and_the_same_tensors_in_memory_give_the_same_results() -> None:
    pictures = cases.Pictures()
    stacked = TensorDataset(torch.stack([image for image, _ in pictures]), torch.tensor(pictures.targets))
    reports = [
        gpuclust.analyze(cases.small_net(), data)
        for data in (pictures, DataLoader(pictures, batch_size=5), DataLoader(stacked, batch_size=7))
    ]
    assert same_results(reports[0], reports[1])
    assert reports[0].layers["inertia"].tolist() == reports[2].layers["inertia"].tolist()


def test_the_same_call_gives_the_same_bits_whatever_workers_and_limit(folder: Path) -> None:
    first = gpuclust.analyze(model(), folder, workers=0)
    again = gpuclust.analyze(model(), folder, workers=2, memory_limit="90 MB")
    assert same_results(first, again)
    assert all(np.array_equal(a.dist2, b.dist2) for a, b in zip(first.results, again.results, strict=True))


def test_nothing_is_written_without_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpuclust.analyze(model(), folder, layers="pool")
    assert list(tmp_path.iterdir()) == []


def test_what_out_holds_is_the_report(folder: Path, tmp_path: Path) -> None:
    report = gpuclust.analyze(model(), folder, out=tmp_path / "run", layers=["conv*", "fc3"])
    assert [result.layer for result in report.results] == ["conv1", "conv2", "fc3"]
    loaded = gpuclust.load_report(tmp_path / "run")
    assert same_results(report, loaded)
    assert loaded.samples.thumbs == report.samples.thumbs
    assert loaded.run["options"]["batch_size"] == 32
    assert loaded.run["options"]["device"] in ("cpu", "cuda:0")
    assert loaded.run["images"]["delivered"] == dict.fromkeys(cases.CLASSES, 8)
    assert loaded.run["plan"]["activations_bytes"] == 24 * (2048 + 384 + 3) * 4


# ---- the network comes back as it was


def state_of(network: nn.Module) -> list[Any]:
    tensors = [*network.parameters(), *network.buffers()]
    return [
        [(id(value), value.data_ptr(), value.device, value.dtype, id(value.grad)) for value in tensors],
        [part.training for part in network.modules()],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in network.modules()],
        [value.clone() for value in tensors],
    ]


def unchanged(before: list[Any], after: list[Any]) -> bool:
    return before[:3] == after[:3] and all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))


def half_trained() -> cases.SmallNet:
    """Some parts in train mode and some not, with gradients."""
    network = cases.small_net().train()
    network.features[3].eval()
    network(torch.rand(2, 3, 16, 16)).sum().backward()
    return network


def test_the_network_comes_back_as_it_was(folder: Path) -> None:
    network = half_trained()
    before = state_of(network)
    gpuclust.analyze((network, cases.to_tensor), folder)
    assert unchanged(before, state_of(network))


class _Dies(nn.Module):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner, self.after = half_trained(), after

    def forward(self, images: Tensor) -> Tensor:
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return self.inner(images)


@pytest.mark.parametrize("after", [0, 1, 2], ids=["listing the layers", "first batch", "second batch"])
def test_the_network_comes_back_when_the_run_dies(folder: Path, after: int) -> None:
    network = _Dies(after)
    before = state_of(network)
    with pytest.raises(KeyboardInterrupt):
        gpuclust.analyze((network, cases.to_tensor), folder, batch_size=5)
    assert unchanged(before, state_of(network))


def test_a_network_moved_to_another_device_gets_its_own_tensors_back() -> None:
    network = half_trained()
    before = state_of(network)
    with placed(network, torch.device("meta")):
        assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"meta"}
    assert unchanged(before, state_of(network))
    with pytest.raises(ZeroDivisionError), placed(network, torch.device("meta")):
        1 / 0  # noqa: B018
    assert unchanged(before, state_of(network))


def test_a_recurrent_layer_survives_the_move() -> None:
    network = nn.LSTM(3, 4)
    x = torch.rand(2, 1, 3)
    with torch.no_grad():
        expected = network(x)[0]
        with placed(network, torch.device("meta")):
            pass
        assert torch.equal(network(x)[0], expected)


def test_a_network_without_values_is_refused(folder: Path) -> None:
    with torch.device("meta"):
        network = cases.SmallNet()
    with pytest.raises(InputError, match=r"SmallNet cannot be moved to \w+.*meta"):
        gpuclust.analyze((network, cases.to_tensor), folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_network_of_another_precision_computes_in_its_own(folder: Path, dtype: torch.dtype) -> None:
    usual = gpuclust.analyze(model(), folder, layers="conv1")
    other = gpuclust.analyze((cases.small_net().to(dtype), cases.to_tensor), folder, layers="conv1")
    error = {torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    assert other.results[0].inertia == pytest.approx(usual.results[0].inertia, rel=error)
    assert other.results[0].inertia != usual.results[0].inertia


def test_a_network_of_mixed_precision_is_refused_in_one_line(folder: Path) -> None:
    network = cases.small_net()
    network.features[2].double()
    with pytest.raises(
        InputError, match=r"SmallNet does not take an image of 3x16x16 \(float32, on .*RuntimeError"
    ) as caught:
        gpuclust.analyze((network, cases.to_tensor), folder)
    assert "\n" not in str(caught.value)


# ---- options


def test_an_unknown_option_is_refused_with_close_names(folder: Path) -> None:
    with pytest.raises(InputError, match="no option 'perclass'; close: per_class"):
        gpuclust.analyze(model(), folder, perclass=3)


def test_an_unknown_layer_is_refused_with_close_names(folder: Path) -> None:
    with pytest.raises(InputError, match="no layer is called 'conv7'; close: conv"):
        gpuclust.analyze(model(), folder, layers="conv7")


def test_more_clusters_than_images_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"25 clusters were asked for, and there are 24 images \(3 classes x 8\)"):
        gpuclust.analyze(model(), folder, clusters=25)
    assert gpuclust.analyze(model(), folder, clusters=24, layers="conv1").results[0].inertia == 0.0


def test_more_clusters_than_readable_images_are_refused(tmp_path: Path) -> None:
    data = cases.write_folder(tmp_path / "pictures", per_class=3)
    (data / "cat/00.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="9 clusters were asked for, and 8 images could be read"):
        gpuclust.analyze(model(), data, clusters=9)


def test_too_little_memory_is_refused_before_the_pass(tmp_path: Path) -> None:
    pictures = cases.Pictures()
    with pytest.raises(
        MemoryLimitError, match=r"needs .*\([\d,]+ bytes\).*the memory limit is 2 MB \(2,000,000 bytes\)"
    ):
        gpuclust.analyze(cases.small_net(), pictures, memory_limit="2 MB", out=tmp_path / "run")
    # For its kind and shape; of each class for its label and the identity.
    assert pictures.read <= 2 + 2 * len(cases.CLASSES)
    assert not (tmp_path / "run").exists()


def test_the_memory_limit_of_the_environment_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCLUST_MEMORY_LIMIT", "1MiB")
    with pytest.raises(MemoryLimitError, match="1,048,576 bytes"):
        gpuclust.analyze(model(), folder)
    assert not gpuclust.plan(model(), folder).fits
    assert gpuclust.plan(model(), folder, memory_limit="1GiB").fits


def test_memory_that_runs_out_all_the_same_is_planned_again_then_said_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, allocate, calls = gpuclust.analyze(model(), folder), LayerStore.__init__, []

    def scarce(self: LayerStore, *arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing[0]:
            failing.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(self, *arguments, **options)

    monkeypatch.setattr(LayerStore, "__init__", scarce)
    failing = [2, -1]
    found = gpuclust.analyze(model(), folder)
    assert same_results(found, whole)
    assert all(
        "memory ran out (CUDA out of memory): planned again for" in each.notes["memory"] for each in found.results
    )
    failing = list(range(1 + len(calls), 1000))
    with pytest.raises(MemoryLimitError, match=r"needs .*, and the memory limit is|memory ran out where") as caught:
        gpuclust.analyze(model(), folder)
    assert "\n" not in str(caught.value)


def test_rows_whose_clustering_ran_out_of_memory_are_gone_before_they_come_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, allocate, alive, held = analysis.study, LayerStore.__init__, [], []

    def scarce(setup: Any, rows: Any, *arguments: Any) -> Any:
        alive.append(weakref.ref(rows.source))
        if len(alive) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cluster(setup, rows, *arguments)

    def watched(self: LayerStore, *arguments: Any, **options: Any) -> None:
        held.append([each() for each in alive[:1] if each() is not None])
        allocate(self, *arguments, **options)

    monkeypatch.setattr(analysis, "study", scarce)
    monkeypatch.setattr(LayerStore, "__init__", watched)
    found = gpuclust.analyze(model(), folder)
    assert len(alive) == len(found.results) + 1
    assert held == [[]] * len(held)


@pytest.mark.parametrize("option", [{"backend": "cupy"}, {"backend": "cuml"}, {"device": "cuda:97"}], ids=str)
def test_what_cannot_run_is_refused_before_the_pass(option: dict[str, str]) -> None:
    pictures = cases.Pictures()
    with pytest.raises(UnavailableError, match=next(iter(option.values()))):
        gpuclust.analyze(cases.small_net(), pictures, **option)
    assert pictures.read <= 2 + len(cases.CLASSES)


def test_the_device_of_the_environment_counts_where_none_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCLUST_DEVICE", "cuda:97")
    with pytest.raises(UnavailableError, match="cuda:97"):
        gpuclust.plan(model(), folder)
    assert gpuclust.plan(model(), folder, device="cpu").device == "cpu"


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rows_of_less_precision_are_reported_in_the_units_of_the_activations(
    folder: Path, dtype: str, error: float
) -> None:
    network = cases.small_net()
    network.features[0].weight.data.mul_(1000)  # far from 1, so that a scale matters
    whole, half = (gpuclust.analyze((network, cases.to_tensor), folder, dtype=name) for name in ("float32", dtype))
    for a, b in zip(whole.results[:1], half.results[:1], strict=True):
        assert np.array_equal(a.labels, b.labels)
        assert b.inertia == pytest.approx(a.inertia, rel=error)
        assert b.dist2.sum() == pytest.approx(b.inertia, rel=1e-12)
        assert np.abs(b.projection) == pytest.approx(
            np.abs(a.projection), rel=0.1, abs=error * float(np.abs(a.projection).max())
        )
        assert ("scale" in b.notes) == (dtype == "float16")
    assert half.run["plan"]["activations_bytes"] * 2 == whole.run["plan"]["activations_bytes"]


def test_precision_and_restarts_reach_k_means(folder: Path) -> None:
    report = gpuclust.analyze(model(), folder, precision="fast", n_init=1, max_iter=1, backend="torch", layers="conv1")
    (result,) = report.results
    assert (result.precision, result.n_iter, result.backend, result.recheck_share) == ("fast", 1, "torch", 0.0)


def test_a_layer_whose_fit_ran_out_of_memory_has_a_note_and_the_same_clusters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gpuclust.analyze(model(), folder, layers="conv1", solver="primal")
    monkeypatch.setattr("gpuclust.analysis.touch_code", lambda: None)
    assign, calls = TorchBackend.assign, list[int]()

    def scarce(self: TorchBackend, *arguments: Any) -> Any:
        calls.append(arguments[0].shape[0])
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return assign(self, *arguments)

    monkeypatch.setattr(TorchBackend, "assign", scarce)
    found = gpuclust.analyze(model(), folder, layers="conv1", solver="primal")
    assert "memory ran out" in found.results[0].notes["k-means"]
    np.testing.assert_array_equal(found.results[0].labels, plain.results[0].labels)
    assert found.results[0].inertia == plain.results[0].inertia


def test_a_layer_with_too_few_distinct_rows_has_a_note_and_no_warning(folder: Path) -> None:
    network = cases.small_net()
    network.classifier.weight.data.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = gpuclust.analyze((network, cases.to_tensor), folder, layers="fc3")
    assert "1 of 3 hold images" in report.results[0].notes["clusters"]
    assert caught == []


def test_activations_that_are_not_finite_name_the_layer(folder: Path) -> None:
    network = cases.small_net()
    network.classifier.bias.data[1] = float("nan")
    with pytest.raises(InputError, match="fc3: the network's activation of image 0, value 1, is nan"):
        gpuclust.analyze((network, cases.to_tensor), folder)


class _Drops(nn.Module):
    """Drops out in eval mode too, and learns its shapes from the first image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(3)
        self.unused = nn.LazyLinear(2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.dropout(self.conv(images).relu(), 0.3).flatten(1))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_random_numbers_of_the_network_come_from_the_seed(folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    reports = [
        gpuclust.analyze((_Drops(), cases.to_tensor), folder, seed=seed, batch_size=5, out=tmp_path / str(i))
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert same_results(*reports[:2])
    assert not same_results(*reports[1:])
    (tmp_path / "0/.state/001.npz").unlink()
    again = gpuclust.analyze((_Drops(), cases.to_tensor), folder, seed=3, batch_size=5, out=tmp_path / "0", resume=True)
    assert same_results(again, reports[0])


def test_a_network_that_fails_on_a_batch_is_refused_in_one_line(folder: Path) -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = cases.small_net().features, nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.inner(images).mean((2, 3)).squeeze()
            if x.ndim == 1:
                raise ValueError("one\ntwo")
            return self.fc(x)

    with pytest.raises(InputError, match=r"^Squeezes on 1 images raised ValueError: one \(test_analysis.py, "):
        gpuclust.analyze((Squeezes(), cases.to_tensor), folder, batch_size=23)


def test_rows_go_to_no_folder_that_is_not_there(tmp_path: Path) -> None:
    for place in (tmp_path / "none", Path(__file__)):
        with pytest.raises(InputError, match="is no folder: make it, or give another --spill"):
            gpuclust.analyze(cases.small_net(), cases.Pictures(), spill=place)


# ---- images


def test_bad_images_are_replaced_listed_and_counted(tmp_path: Path) -> None:
    data = cases.write_folder(tmp_path / "pictures", per_class=6)
    for name in ("dog/00.png", "dog/01.png", "owl/05.png"):
        (data / name).write_bytes((data / name).read_bytes()[:60])
    report = gpuclust.analyze(model(), data, per_class=5)
    images = report.run["images"]
    assert {item["path"] for item in images["skipped"]} <= {"dog/00.png", "dog/01.png", "owl/05.png"}
    assert images["delivered"] == {"cat": 5, "dog": 4, "owl": 5}
    assert np.bincount(report.samples.labels).tolist() == [5, 4, 5]
    assert all(result.n == 14 and result.table.sum() == 14 for result in report.results)
    with pytest.raises(InputError, match=r"image dog/0[01].png of class 'dog' is bad"):
        gpuclust.analyze(model(), data, on_bad_image="fail")


def test_names_that_mean_something_in_html_stay_text(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>".replace("/", "∕"), 'a"b&c', "{{7*7}}")
    data = cases.write_folder(tmp_path / "pictures", names, per_class=3)
    gpuclust.analyze(model(), data, out=tmp_path / "run", layers="pool")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert names[0] not in page
    assert "{{7*7}}" in page
    assert gpuclust.load_report(tmp_path / "run").samples.classes == tuple(sorted(names))


def test_pictures_without_a_transform_get_the_usual_one_and_a_note(folder: Path) -> None:
    from torchvision.transforms import v2

    usual = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    options: dict[str, Any] = {"layers": "fc3", "per_class": 4}
    plain = gpuclust.analyze(cases.small_net(), folder, **options)
    assert "none came with the network" in plain.run["network"]["notes"]["transform"]
    told = gpuclust.analyze((cases.small_net(), usual), folder, **options)
    assert "transform" not in told.run["network"]["notes"]
    assert plain.results[0].inertia == pytest.approx(told.results[0].inertia, rel=1e-6)
    tensors = gpuclust.analyze(cases.small_net(), cases.Pictures(), layers="fc3")
    assert tensors.run["network"]["notes"] == {}
    with pytest.raises(InputError, match="does not take an image of 3x224x224"):
        gpuclust.analyze(nn.Sequential(nn.Conv2d(1, 2, 3)), folder)


def test_tensors_of_another_size_than_the_network_is_known_for_are_taken() -> None:
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.tensor([0, 0, 0, 1, 1, 1]))
    report = gpuclust.analyze("resnet18", data, weights="none", layers="conv1,avgpool")
    assert [result.shape for result in report.results] == [(64, 32, 32), (512, 1, 1)]
