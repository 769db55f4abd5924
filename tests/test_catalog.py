"""Where images come from: class folders, manifests, data sets by name or as objects, and what is none of these."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import Pictures, run, transform, write_images
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from gpuclust.capture.images import Skipped, open_images
from gpuclust.errors import InputError


def test_class_folders(tmp_path):
    source = open_images(write_images(tmp_path, {"dog": 5, "cat": 3, "ant": 4}))
    assert source.classes == ("ant", "cat", "dog")
    assert source.class_paths == (("ant",), ("cat",), ("dog",))
    assert source.available == {"ant": 4, "cat": 3, "dog": 5}
    assert (source.per_class, source.n) == (3, 9)  # what the smallest class has
    images, labels, paths, thumbs, _ = run(source)
    assert images.shape == (9, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labels.dtype == np.int64
    for row, path in enumerate(paths):
        name, number = path.removesuffix(".png").split("/")
        assert images[row, :2, 0, 0].tolist() == [int(number), ["dog", "cat", "ant"].index(name)]
        assert source.classes[labels[row]] == name
    for thumb in thumbs:
        assert isinstance(thumb, bytes)
        with Image.open(io.BytesIO(thumb)) as small:
            assert (small.format, small.size) == ("JPEG", (10, 12))


def test_thumbs_are_small(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (300, 200)).save(tmp_path / name / "x.jpg")
    [batch] = open_images(tmp_path).batches(transform, 8)
    assert {Image.open(io.BytesIO(thumb)).size for thumb in batch.thumbs} == {(64, 43)}


def test_nested_folders_keep_their_path_and_are_cut_at_a_level(tmp_path):
    write_images(tmp_path, {"animal/cat": 2, "animal/dog/hound": 3, "thing/cup": 4})
    deep = open_images(str(tmp_path))
    assert deep.classes == ("animal/cat", "animal/dog/hound", "thing/cup")
    assert deep.class_paths == (("animal", "cat"), ("animal", "dog", "hound"), ("thing", "cup"))
    assert deep.per_class == 2
    flat = open_images(tmp_path, class_level=1)
    assert flat.available == {"animal": 5, "thing": 4}
    assert open_images(tmp_path, class_level=2).classes == ("animal/cat", "animal/dog", "thing/cup")
    with pytest.raises(InputError, match="class_level is at least 1; got 0"):
        open_images(tmp_path, class_level=0)


def test_numbers_in_class_names_count_as_numbers(tmp_path):
    source = open_images(write_images(tmp_path, {"class10": 1, "class9": 1, "class1/b": 1}))
    assert source.classes == ("class1/b", "class9", "class10")


def test_what_is_no_image_is_counted_and_not_in_a_class(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "notes.txt").write_text("words")
    (tmp_path / "loose.png").write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".ds.png").write_bytes(b"")
    source = open_images(tmp_path)
    assert source.available == {"a": 2, "b": 2}
    assert source.describe()["ignored_files"] == 2


def test_links_to_folders_are_followed_once(tmp_path):
    write_images(tmp_path / "real", {"a": 2, "b": 2})
    write_images(tmp_path / "elsewhere", {"": 3})
    (tmp_path / "real" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "a" / "loop").symlink_to(tmp_path / "real")
    assert open_images(tmp_path / "real").available == {"a": 2, "b": 2, "c": 3}


def write_manifest(path: Path, rows: list[tuple[str, str]], header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *(f'"{image}",{label}' for image, label in rows)]) + "\n", encoding="utf-8-sig")
    return path


def test_a_manifest(tmp_path):
    write_images(tmp_path / "pictures", {"x": 4, "y": 1})
    outside = tmp_path / "pictures" / "y" / "00.png"
    rows = [(f"pictures/x/0{i}.png", ("pets/cat", "pets/dog")[i % 2]) for i in range(4)]
    manifest = write_manifest(tmp_path / "list.csv", [*rows, (str(outside), "cup"), rows[0]])
    source = open_images(manifest)
    assert source.classes == ("cup", "pets/cat", "pets/dog")
    assert source.class_paths[1] == ("pets", "cat")
    assert source.available == {"cup": 1, "pets/cat": 2, "pets/dog": 2}
    assert source.describe()["ignored_files"] == 1  # the line that is there twice
    images, labels, paths, *_ = run(source)
    assert paths[0] == str(outside)
    assert set(paths[1:]) < {path for path, _ in rows}
    assert images[0, 1, 0, 0] == 1
    assert labels.tolist() == [0, 1, 2]
    assert open_images(manifest, class_level=1).available == {"cup": 1, "pets": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\n", "has no column path: a manifest has path,label; its header is"),
        ("", "has no column path and label"),
        ("path,label\n", "lists no image"),
        ("path,label\na.png,\n", "line 2: label is empty"),
        ("path,label\n,x\n", "line 2: path is empty"),
        ("path,label\na.png\n", "line 2: label is empty"),
        ("path,label\na.png,x\na.png,y\n", "line 3: a.png is in class 'x' already, and now in 'y'"),
        ('path,label\n"a.png,x\n', "is not a comma-separated table"),
        (b"path,label\n\xff\xfe.png,x\n", "is not UTF-8 text"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        open_images(path)
    assert "\n" not in str(caught.value)


def test_one_file_written_in_two_ways_is_one_image(tmp_path):
    write_images(tmp_path, {"x": 2, "y": 2})
    rows = [("x/00.png", "x"), ("y/../x/01.png", "x"), (str(tmp_path / "x/01.png"), "x"), ("y/00.png", "y")]
    source = open_images(write_manifest(tmp_path / "list.csv", rows))
    assert source.available == {"x": 2, "y": 1}
    rows[2] = (rows[2][0], "y")
    with pytest.raises(InputError, match=r"line 4: .*01.png is in class 'x' already, and now in 'y'"):
        open_images(write_manifest(tmp_path / "list.csv", rows))


def test_a_path_that_no_file_can_have_is_a_bad_image(tmp_path):
    write_images(tmp_path, {"x": 2, "y": 2})
    rows = [("x/00.png", "x"), ("x/\0.png", "x"), ("y/00.png", "y"), ("y/01.png", "y")]
    source = open_images(write_manifest(tmp_path / "list.csv", rows))
    assert len(source.fingerprint()) == 64
    assert len(run(source)[0]) == 3
    assert [skipped.class_name for skipped in source.skipped] == ["x"]


def test_a_file_of_a_manifest_that_is_not_there_is_a_bad_image(tmp_path):
    write_images(tmp_path, {"x": 2, "y": 2})
    rows = [("x/00.png", "x"), ("gone.png", "x"), ("y/00.png", "y"), ("y/01.png", "y")]
    source = open_images(write_manifest(tmp_path / "list.csv", rows))
    assert len(run(source)[0]) == 3
    assert source.skipped == [Skipped("gone.png", "x", "No such file or directory")]


def test_fashion_mnist_by_name(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pictures = np.repeat(np.arange(40, dtype=np.uint8), 784)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 40, 28, 28) + pictures.tobytes())
        labels = bytes(i % 10 for i in range(40))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 40) + labels)
    source = open_images(f"torchvision:FashionMNIST:{tmp_path}?train=false", per_class=3, classes=["Bag", "Trouser"])
    assert source.classes == ("Trouser", "Bag")  # the data set's own order
    images, labels, paths, *_ = run(source)
    assert images[:, 0, 0, 0].tolist() == [float(path) for path in paths]
    assert [int(path) % 10 for path in paths] == [1, 1, 1, 8, 8, 8]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_fake_data_by_name_needs_no_root():
    source = open_images("torchvision:FakeData:?size=30&image_size=3,9,9&num_classes=3", per_class=2)
    assert source.classes == ("0", "1", "2")
    assert run(source)[0].shape == (6, 3, 8, 8)


def test_a_data_set_and_a_loader_in_order():
    for data in (Pictures(), DataLoader(Pictures(), batch_size=5)):
        source = open_images(data, per_class=4)
        images, labels, paths, thumbs, sizes = run(source)
        assert images[:, 2, 3, 3].tolist() == [float(path) for path in paths]
        assert labels.tolist() == [0] * 4 + [1] * 4 == [int(path) % 2 for path in sorted(paths, key=paths.index)]
        assert (len(thumbs), sizes) == (8, [4, 4])
    with pytest.raises(InputError, match="the DataLoader shuffles"):
        open_images(DataLoader(Pictures(), shuffle=True))


def test_tensors_pass_as_they_are_without_a_transform():
    tensors = torch.arange(8 * 12.0).reshape(8, 3, 2, 2)
    source = open_images(TensorDataset(tensors, torch.tensor([0, 1] * 4)))
    [batch] = source.batches(None, 99)
    assert torch.equal(batch.images, tensors[[int(path) for path in batch.paths]])
    scaled = open_images(TensorDataset(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8), torch.tensor([0, 1] * 2)))
    [batch] = scaled.batches(None, 99)
    assert batch.images.unique().tolist() == pytest.approx([0.2])
    with pytest.raises(InputError, match=r"image .*needs a transform"):
        list(open_images(Pictures()).batches(None, 99))


def test_a_callable_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_images_for_this.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def data():\n    return TensorDataset(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))\n"
        "def words():\n    return 'words'\n"
    )
    source = open_images("own_images_for_this:data")
    assert (source.classes, source.n) == (("0", "1"), 4)
    assert source.describe()["data"] == "own_images_for_this:data"
    with pytest.raises(InputError, match=r"returns a torch Dataset or DataLoader of .*; got str"):
        open_images("own_images_for_this:words")
    with pytest.raises(InputError, match="has no 'dat'; close: data"):
        open_images("own_images_for_this:dat")
    with pytest.raises(InputError, match="class_level cuts folder paths"):
        open_images("own_images_for_this:data", class_level=1)


def test_what_is_no_data(tmp_path):
    (tmp_path / "file.txt").write_text("words")
    for data, message in (
        (tmp_path / "nowhere", "is not there: data is a folder of class folders, a manifest .csv"),
        (str(tmp_path / "file.txt"), "is a file that is no manifest .csv"),
        (3, "got int"),
        ("torchvision:FashionMINST:x", "close: FashionMNIST"),
    ):
        with pytest.raises(InputError, match=message):
            open_images(data)


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no class folder in .* holds an image \(\.jpg"):
        open_images(tmp_path)
    (tmp_path / "loose.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 lie in it directly, without a class folder"):
        open_images(tmp_path)
