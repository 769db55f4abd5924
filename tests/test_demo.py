"""The demonstration's network and pictures, and the script that made them."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.cluster import KMeans

import gpuclust.demo
from gpuclust.capture.datasets import read_dataset
from gpuclust.capture.layers import choose_layers, find_layers
from gpuclust.capture.models import load_network
from gpuclust.capture.stream import ActivationStream
from gpuclust.compare.scores import compare
from gpuclust.demo import demo_dataset, demo_network
from gpuclust.demo.dataset import CLASSES, IMAGES
from gpuclust.demo.network import WEIGHTS, DemoNet, normalise, to_input
from gpuclust.demo.train import augment, correct, first_of_each_class, main, read_idx

DATA = Path(gpuclust.demo.__file__).parent / "data"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """The shipped images, as the network's input."""
    return torch.stack([to_input(picture) for picture, _ in demo_dataset()])


def test_files_are_small_and_their_licence_is_with_them():
    assert WEIGHTS.stat().st_size < 2_000_000
    assert IMAGES.stat().st_size < 1_000_000
    assert sorted(path.name for path in DATA.iterdir()) == ["LICENSE-fashion-mnist", WEIGHTS.name, IMAGES.name]
    licence = (DATA / "LICENSE-fashion-mnist").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_network_has_alexnets_shape_and_weights_in_single_precision():
    state = load_file(WEIGHTS)
    assert {name: tuple(value.shape) for name, value in state.items() if name.endswith("weight")} == {
        "features.0.weight": (32, 1, 5, 5),
        "features.3.weight": (64, 32, 3, 3),
        "features.6.weight": (96, 64, 3, 3),
        "features.8.weight": (64, 96, 3, 3),
        "features.10.weight": (64, 64, 3, 3),
        "classifier.1.weight": (256, 576),
        "classifier.4.weight": (128, 256),
        "classifier.6.weight": (10, 128),
    }
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert sum(value.numel() for value in state.values()) == 348_906
    network, _ = demo_network()
    assert not network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_layers_have_the_papers_names():
    layers = choose_layers(find_layers(demo_network()[0], torch.zeros(1, 1, 28, 28)), ["auto"])
    assert [(layer.name, layer.module, layer.values, layer.kind) for layer in layers] == [
        ("conv1", "features.1", 25_088, "conv"),
        ("conv2", "features.4", 12_544, "conv"),
        ("conv3", "features.7", 4_704, "conv"),
        ("conv4", "features.9", 3_136, "conv"),
        ("conv5", "features.11", 3_136, "conv"),
        ("fc6", "classifier.2", 256, "linear"),
        ("fc7", "classifier.5", 128, "linear"),
        ("fc8", "classifier.6", 10, "linear"),
    ]


def test_accuracy_is_what_the_weights_file_says(pictures):
    network = load_network("gpuclust.demo:demo_network").module
    right = correct(network, pictures, torch.tensor(demo_dataset().targets))
    about = metadata(WEIGHTS)
    assert f"{right.float().mean():.4f}" == about["demo_accuracy"]
    assert float(about["test_accuracy"]) >= 0.91
    assert {"seed", "epochs", "torch", "threads", "data"} <= about.keys()


def test_the_deeper_the_layer_the_nearer_its_clusters_are_to_the_classes(pictures):
    network, _ = demo_network()
    layers = choose_layers(find_layers(network, pictures[:1]), ["conv1", "conv3", "conv5", "fc7"])
    rows: dict[str, np.ndarray] = {}
    with ActivationStream(network, layers) as stream:
        stream.forward(pictures, lambda layer, values: rows.update({layer.name: values.flatten(1).numpy().copy()}))
    scores = {}
    for name, x in rows.items():
        clusters = KMeans(10, n_init=3, random_state=0).fit_predict(x)
        scores[name] = compare(clusters, np.array(demo_dataset().targets), 10, 10)[2]
    for score in ("ari", "ami", "accuracy"):
        values = [scores[name][score] for name in ("conv1", "conv3", "conv5", "fc7")]
        assert np.diff(values).min() > 0.05, (score, values)
    assert scores["conv1"]["ari"] < 0.5 * scores["fc7"]["ari"]
    assert scores["fc7"]["accuracy"] > 0.85


def test_dataset_is_balanced_and_names_its_classes():
    dataset = demo_dataset()
    assert len(dataset) == 1000
    assert np.bincount(dataset.targets).tolist() == [100] * 10
    assert sorted(set(dataset.positions)) == dataset.positions
    assert 0 <= dataset.positions[0] < dataset.positions[-1] < 10_000
    picture, label = dataset[0]
    assert (picture.size, picture.mode, CLASSES[label]) == ((28, 28), "L", "Ankle boot")
    assert len({picture.tobytes() for picture, _ in dataset}) == 1000
    assert sum(1 for _ in dataset) == 1000
    catalog = read_dataset(dataset)
    assert tuple(catalog.counts) == CLASSES
    assert set(catalog.counts.values()) == {100}


def test_images_are_the_test_sets_first():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Fashion-MNIST (Debian's dataset-fashion-mnist) is not installed")
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    dataset = demo_dataset()
    positions = first_of_each_class(labels, 100)
    assert positions.tolist() == dataset.positions
    assert np.array_equal(images[positions].numpy(), dataset.pixels)
    assert labels[positions].tolist() == dataset.targets


def test_transform_takes_grey_and_rgb_and_any_size():
    picture, _ = demo_dataset()[0]
    tensor = to_input(picture)
    assert (tensor.shape, tensor.dtype) == ((1, 28, 28), torch.float32)
    expected = (np.asarray(picture, np.float64) / 255 - 0.2860) / 0.3530
    assert np.allclose(tensor[0].numpy(), expected, atol=1e-6)
    assert torch.equal(to_input(picture.convert("RGB")), tensor)
    # Shrinking filters first: torch's way of doing that is within the rounding to whole greys, done twice.
    twice = picture.resize((56, 56), Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.array(twice)).float()[None, None]
    smaller = F.interpolate(pixels, size=(28, 28), mode="bilinear", antialias=True)[0]
    assert (to_input(twice) - normalise(smaller)).abs().max() <= 1.01 / 255 / 0.3530
    assert to_input(Image.new("RGB", (400, 300), "red")).shape == (1, 28, 28)


def test_dataset_and_transform_can_be_sent_to_workers():
    dataset, transform = pickle.loads(pickle.dumps((demo_dataset(), to_input)))
    assert torch.equal(transform(dataset[7][0]), to_input(demo_dataset()[7][0]))


def test_augmentation_moves_and_mirrors():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 10, 5] = 255
    black = float(normalise(torch.zeros(1)))
    seen = set()
    for moved in augment(normalise(image).expand(400, -1, -1, -1), torch.Generator().manual_seed(3)):
        lit = (moved[0] != black).nonzero().tolist()
        assert len(lit) == 1
        seen.add(tuple(lit[0]))
    straight = {(row, column) for row in range(8, 13) for column in range(3, 8)}
    assert seen == straight | {(row, 27 - column) for row, column in straight}


def test_first_of_each_class_keeps_the_order():
    labels = torch.tensor([3, 3, *range(10), *range(10)])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, *(i for i in range(2, 22) if i not in (5, 15))]
    with pytest.raises(ValueError, match="T-shirt/top has 2 images, and 3 are wanted"):
        first_of_each_class(labels, 3)


# ---- the training script


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Forty training and thirty test images: each class a bar of its own, and noise."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "idx"
    folder.mkdir()
    for split, count in (("train", 40), ("t10k", 30)):
        labels = rng.permutation(np.arange(count) % 10)
        images = rng.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 6] += 180
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def test_training_is_the_same_every_time(tiny, tmp_path, capsys):
    options = ["--epochs", "2", "--batch", "16", "--per-class", "2"]
    state_before = torch.random.get_rng_state()
    threads_before = torch.get_num_threads()
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        main([str(tiny), "--out", str(tmp_path / name), "--seed", seed, *options])
    assert torch.equal(torch.random.get_rng_state(), state_before)
    assert torch.get_num_threads() == threads_before
    assert not torch.are_deterministic_algorithms_enabled()
    a, b, c = (load_file(tmp_path / name / WEIGHTS.name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    about = metadata(tmp_path / "a" / WEIGHTS.name)
    assert about == metadata(tmp_path / "b" / WEIGHTS.name)
    assert (about["seed"], about["epochs"], about["torch"]) == ("4", "2", torch.__version__)
    printed = capsys.readouterr().out
    assert f"accuracy {about['test_accuracy']} on 30 test images, {about['demo_accuracy']} on the 20 kept" in printed

    # What it states is what the written weights reach on the written images.
    network = DemoNet()
    network.load_state_dict(a)
    kept = load_file(tmp_path / "a" / IMAGES.name)
    labels = read_idx(tiny / "t10k-labels-idx1-ubyte.gz")
    assert kept["positions"].tolist() == first_of_each_class(labels, 2).tolist()
    assert torch.equal(kept["labels"], labels[kept["positions"].long()])
    assert torch.equal(kept["images"], read_idx(tiny / "t10k-images-idx3-ubyte.gz")[kept["positions"].long()])
    right = correct(network.eval(), normalise(kept["images"][:, None]), kept["labels"].long())
    assert f"{right.float().mean():.4f}" == about["demo_accuracy"]


def test_training_learns(tiny, tmp_path):
    main([str(tiny), "--out", str(tmp_path), "--epochs", "120", "--batch", "20", "--per-class", "1"])
    assert float(metadata(tmp_path / WEIGHTS.name)["test_accuracy"]) >= 0.5  # 0.1 by chance


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(bytes((0, 0, 13, 1)) + struct.pack(">I", 4) + bytes(16)))
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes: it begins with 00 00 0d 01"):
        read_idx(path)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 40) + bytes(3)))
    with pytest.raises(ValueError, match=r"holds 3 values where its header says \(40,\)"):
        read_idx(path)
