"""Classes and items of torch data sets, DataLoaders and torchvision's data sets."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import keys
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gpuclust.capture.datasets import open_torchvision, read_dataset
from gpuclust.errors import InputError, UnavailableError


class Pairs(Dataset):
    """(image, label) of given labels; an Exception in their place is raised."""

    def __init__(self, given, **attributes):
        self.given = given
        self.reads = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        self.reads += 1
        if isinstance(self.given[index], Exception):
            raise self.given[index]
        return torch.zeros(1, 2, 2), self.given[index]


def write_fashion_mnist(root: Path, count: int = 20) -> np.ndarray:
    """Raw IDX files as torchvision keeps them; label i % 10, the grey of an image is its index."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pictures = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, 28, 28) + pictures.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return pictures


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0, 1, 2],
        [torch.tensor(1), torch.tensor(0), torch.tensor([1]), torch.tensor(2)],
        [np.int64(1), np.int64(0), np.array([1]), np.int32(2)],
    ],
)
def test_labels_are_read_from_the_items(labels):
    catalog = read_dataset(Pairs(labels))
    assert keys(catalog) == {"0": ["1"], "1": ["0", "2"], "2": ["3"]}
    assert catalog.parts == {"0": ("0",), "1": ("1",), "2": ("2",)}
    assert (catalog.kind, catalog.data) == ("dataset", "Pairs")


@pytest.mark.parametrize(
    "stored",
    [
        {"targets": [1, 0, 1]},
        {"targets": torch.tensor([1, 0, 1])},
        {"labels": np.array([1, 0, 1])},
        {"samples": [("x", 1), ("y", 0), ("z", 1)]},
    ],
)
def test_stored_labels_are_taken_if_one_item_of_each_class_says_the_same(stored):
    data = Pairs([1, 0, 1], **stored)
    assert keys(read_dataset(data)) == {"0": ["1"], "1": ["0", "2"]}
    assert data.reads == 2


def test_at_most_sixteen_items_are_read_to_trust_stored_labels():
    labels = [i % 40 for i in range(120)]
    data = Pairs(labels, targets=labels)
    assert len(read_dataset(data).counts) == 40
    assert 8 <= data.reads <= 16


def test_labels_that_a_subclass_returns_in_place_of_the_stored_ones_are_the_classes():
    data = Pairs([0, 0, 1, 1], targets=[0, 1, 2, 3], classes=["a", "b", "c", "d"])
    assert keys(read_dataset(data)) == {"a": ["0", "1"], "b": ["2", "3"]}


def test_stored_labels_that_the_items_may_not_return_are_not_taken():
    changed = Pairs([5, 6], targets=[0, 1], target_transform=lambda label: label + 5)
    assert keys(read_dataset(changed)) == {"5": ["0"], "6": ["1"]}
    other_length = Pairs([5, 6], targets=[0, 1, 2])
    assert keys(read_dataset(other_length)) == {"5": ["0"], "6": ["1"]}
    files = Pairs([5, 6], samples=["a.png", "b.png"])
    assert keys(read_dataset(files)) == {"5": ["0"], "6": ["1"]}


def test_classes_are_named_by_the_data_set():
    catalog = read_dataset(Pairs([1, 0], classes=["zebra", "ant"]))
    assert list(keys(catalog).items()) == [("zebra", ["1"]), ("ant", ["0"])]
    synonyms = read_dataset(Pairs([0, 1, 2], classes=[("crane", "bird"), ("crane",), ("crane",)]))
    assert list(synonyms.counts) == ["crane, bird", "crane (1)", "crane (2)"]
    too_few = read_dataset(Pairs([0, 3], classes=["zebra", "ant"]))
    assert list(too_few.counts) == ["0", "3"]


def test_classes_without_names_are_in_natural_order():
    assert list(read_dataset(Pairs(["b10", "b9", "a"])).counts) == ["a", "b9", "b10"]
    assert list(read_dataset(Pairs([10, 9, -1])).counts) == ["-1", "9", "10"]
    assert list(read_dataset(Pairs([1.5, 0.5])).counts) == ["0.5", "1.5"]


def test_subsets_and_concatenations():
    whole = Pairs([0, 1, 0, 1], targets=[0, 1, 0, 1], classes=["x", "y"])
    assert keys(read_dataset(Subset(Subset(whole, [3, 2, 1]), [0, 1]))) == {"x": ["1"], "y": ["0"]}
    assert whole.reads == 2
    assert keys(read_dataset(ConcatDataset([whole, Pairs([2])]))) == {"0": ["0", "2"], "1": ["1", "3"], "2": ["4"]}
    tensors = TensorDataset(torch.zeros(3, 1, 2, 2), torch.tensor([1, 0, 1]))
    assert keys(read_dataset(tensors)) == {"0": ["1"], "1": ["0", "2"]}


def test_items_that_fail_are_listed_and_not_in_a_class():
    catalog = read_dataset(Pairs([0, OSError("disk"), 1]))
    assert catalog.unlabelled == (("1", "OSError: disk"),)
    assert keys(catalog) == {"0": ["0"], "1": ["2"]}
    with pytest.raises(InputError, match="Pairs holds no item that can be read: OSError: disk"):
        read_dataset(Pairs([OSError("disk")]))


@pytest.mark.parametrize("label", [torch.tensor([1, 2]), [1], None, {"a": 1}])
def test_a_label_is_one_number_or_text(label):
    with pytest.raises(InputError, match="a label is one number or text; that of item 0 is"):
        read_dataset(Pairs([label]))


def test_an_item_is_a_pair():
    with pytest.raises(
        InputError, match=r"an item of a data set is \(image, label\); item 0 of TensorDataset is tuple"
    ):
        read_dataset(TensorDataset(torch.zeros(2, 1, 2, 2)))


def test_a_loader_in_order_is_its_data_set():
    data = Pairs([0, 1, 0, 1])
    for loader in (DataLoader(data, batch_size=3), DataLoader(data, batch_size=None), DataLoader(data, drop_last=True)):
        assert keys(read_dataset(loader)) == {"0": ["0", "2"], "1": ["1", "3"]}
    assert read_dataset(DataLoader(data)).data == "DataLoader(Pairs)"
    chosen = DataLoader(data, sampler=[3, 0, 3])
    assert keys(read_dataset(chosen)) == {"0": ["0"], "1": ["3"]}
    batches = DataLoader(data, batch_sampler=[[1, 2], [0]])
    assert keys(read_dataset(batches)) == {"0": ["2", "0"], "1": ["1"]}


class Coin:
    """A sampler of another order at every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([0, 1] if self.passes % 2 else [1, 0])

    def __len__(self):
        return 2


class Distributed:
    """As torch's DistributedSampler: a fixed order within an epoch, and yet a shuffled one."""

    shuffle = True

    def __iter__(self):
        return iter([1, 0])


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, shuffle=True),
        lambda data: DataLoader(data, batch_size=None, sampler=RandomSampler(data)),
        lambda data: DataLoader(data, sampler=WeightedRandomSampler([1.0, 1.0], 2)),
        lambda data: DataLoader(data, sampler=SubsetRandomSampler([0, 1])),
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False)),
        lambda data: DataLoader(data, sampler=Coin()),
        lambda data: DataLoader(data, sampler=Distributed()),
    ],
)
def test_a_shuffling_loader_is_refused(loader):
    with pytest.raises(InputError, match=r"the DataLoader shuffles \(.*per_class and seed choose"):
        read_dataset(loader(Pairs([0, 1])))


def test_a_batch_sampler_around_an_ordered_one_is_in_order():
    data = Pairs([0, 1])
    loader = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False))
    assert keys(read_dataset(loader)) == {"0": ["0"], "1": ["1"]}


def test_a_loaders_own_collation_and_a_stream_are_refused():
    with pytest.raises(InputError, match=r"own collate_fn would not be used.*loader.dataset"):
        read_dataset(DataLoader(Pairs([0, 1]), collate_fn=lambda items: items))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(InputError, match=r"needs __len__ and __getitem__.*got .*Stream"):
        read_dataset(Stream())


def test_fashion_mnist_from_its_raw_files(tmp_path):
    write_fashion_mnist(tmp_path)
    data = open_torchvision(f"torchvision:FashionMNIST:{tmp_path}?train=false")
    catalog = read_dataset(data, "fashion")
    assert catalog.data == "fashion"
    assert list(catalog.counts)[:2] == ["T-shirt/top", "Trouser"]
    assert keys(catalog)["Ankle boot"] == ["9", "19"]
    assert data.train is False
    assert np.asarray(data[19][0])[0, 0] == 19


def test_options_of_a_query_have_the_type_of_their_default():
    data = open_torchvision("torchvision:FakeData:?size=6&image_size=1,4,5&num_classes=3&random_offset=2")
    assert (data.size, data.image_size, data.num_classes, data.random_offset) == (6, (1, 4, 5), 3, 2)
    assert data[0][0].size == (5, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:FashionMINST:x", "no data set 'FashionMINST'; close: FashionMNIST.*torchvision:NAME:ROOT"),
        ("torchvision:", "no data set ''"),
        ("torchvision:wrap_dataset_for_transforms_v2:x", "no data set 'wrap_dataset"),
        ("torchvision:FashionMNIST:x?split=test", "FashionMNIST has no option 'split'.*: it has train"),
        ("torchvision:FashionMNIST:x?download=true", "no option 'download'"),
        ("torchvision:FashionMNIST:x?train=maybe", "train in .* is true or false; got 'maybe'"),
        ("torchvision:FakeData:?size=many", "size in .* is whole numbers; got 'many'"),
    ],
)
def test_an_unknown_torchvision_set_or_option_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        open_torchvision(text)


def test_files_that_are_not_there_are_not_downloaded(tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    with pytest.raises(UnavailableError, match=r"downloads no data: put the files of CIFAR10 under"):
        open_torchvision(f"torchvision:CIFAR10:{tmp_path}")
