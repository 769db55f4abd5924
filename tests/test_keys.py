"""Keys and their seeded order: what a choice holds, and that what it doesn't hold changes nothing."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import tracemalloc
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from cases_images import Pictures, keys, run, write_images

from gpuclust.capture import keys as keys_module
from gpuclust.capture.catalog import read_folder
from gpuclust.capture.images import open_images
from gpuclust.capture.keys import Keys, SeededOrder, Wanted
from gpuclust.capture.manifest import read_manifest
from gpuclust.errors import InputError


def in_order(names: Iterable[str], seed: int = 0) -> list[str]:
    """What the README says, and nothing else."""

    def rank(key: str) -> tuple[bytes, str]:
        text = f"{seed}:{unicodedata.normalize('NFC', key)}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), key

    return sorted(names, key=rank)


class Classes:
    """Classes of keys that count how often they are walked through."""

    def __init__(self, keys: dict[str, list[str]]) -> None:
        self.keys = keys
        self.walks: list[list[str]] = []

    def __call__(self, wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        self.walks.append(list(wanted))
        for name, want in wanted.items():
            yield name, filter(want, self.keys[name])

    def order(self, seed: int = 0) -> SeededOrder:
        return SeededOrder(self, {name: len(some) for name, some in self.keys.items()}, seed)


def empty_files(root: Path, classes: int, count: int) -> Path:
    for i in range(classes):
        folder = root / f"class{i}"
        folder.mkdir(parents=True)
        for j in range(count):
            os.close(os.open(folder / f"{j:06}.jpg", os.O_CREAT))
    return root


# ---- many texts in one piece


def test_keys_are_the_texts_they_were_made_of():
    texts = ["a/b.png", "a/é.png", "a/caf\udce9.png", "a/", "a/\0x", "a/" + "ü" * 300]
    for prefix in ("", "a", "a/"):
        held = Keys(texts, prefix)
        assert list(held) == texts
        assert (held[2], held[-1], held[1:4]) == (texts[2], texts[-1], texts[1:4])
        assert (len(held), texts[3] in held, len(Keys())) == (6, True, 0)
        with pytest.raises(IndexError):
            held[6]


def test_keys_take_a_fraction_of_a_list():
    texts = [f"n01440764/n01440764_{i}.JPEG" for i in range(10_000)]
    tracemalloc.start()
    held = Keys(texts, "n01440764/n01440764_")
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(held) == 10_000
    assert taken < 25 * 10_000  # a str of that length takes 78 bytes, and its place in a list 8


# ---- the order


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_is_that_of_the_hashes_however_much_of_it_is_asked_for(seed):
    counts = {"a": 1, "b": 40, "c": 3000}
    classes = {name: [f"{name}/{i}é.png" for i in range(count)] for name, count in counts.items()}
    expected = {name: in_order(some, seed) for name, some in classes.items()}
    order = Classes(classes).order(seed)
    for need in (1, 2, 5, 30, 100, 700, 2999, 10_000):
        order.reach(dict.fromkeys(classes, need))
        for name in classes:
            assert len(order[name]) >= min(need, counts[name])
            assert list(order[name]) == expected[name][: len(order[name])]


def test_what_is_held_is_what_was_asked_for_and_a_margin():
    classes = Classes({name: [f"{name}/{i}" for i in range(5000)] for name in "ab"})
    order = classes.order()
    order.reach({"a": 5, "b": 5})
    assert classes.walks == [["a", "b"]]
    assert all(5 < len(order[name]) < 60 for name in "ab")
    order.reach({"a": len(order["a"]), "b": 3})
    assert classes.walks == [["a", "b"]]  # nothing is missing
    order.reach({"a": 400, "b": 3})
    assert classes.walks == [["a", "b"], ["a"]]  # only where something is
    assert 400 <= len(order["a"]) < 620


def test_a_class_that_is_used_up_bit_by_bit_is_walked_through_a_few_times():
    classes = Classes({"a": [str(i) for i in range(3000)]})
    order = classes.order()
    for need in range(1, 3002):
        order.reach({"a": need})
    assert list(order["a"]) == in_order(classes.keys["a"])
    assert len(classes.walks) <= 9


def test_a_limit_that_takes_too_few_is_raised(monkeypatch):
    texts = [str(i) for i in range(1000)]
    # Hashes that are anything but uniform, and all the same.
    for pretended in (lambda seed, key: b"\xf0" + key.encode(), lambda seed, key: b"\xff" * 32):
        monkeypatch.setattr(keys_module, "key_hash", pretended)
        order = Classes({"a": texts}).order()
        order.reach({"a": 7})
        assert order["a"][:7] == sorted(texts)[:7]


def test_files_that_go_while_they_are_counted_end_no_choice():
    classes = Classes({"a": [str(i) for i in range(100)]})
    order = classes.order()
    del classes.keys["a"][10:]
    order.reach({"a": 50})
    assert list(order["a"]) == in_order(map(str, range(10)))


# ---- with folders, manifests and data sets


def test_replacements_go_beyond_what_is_held(tmp_path):
    """More bad images than the margin: the folder is read again, and the order is as if all had been held."""
    write_images(tmp_path, {"cat": 90, "dog": 90})
    cats = in_order(f"cat/{i:02}.png" for i in range(90))
    dogs = in_order(f"dog/{i:02}.png" for i in range(90))
    for path in cats[:80]:
        (tmp_path / path).write_bytes(b"")
    source = open_images(tmp_path, per_class=4)
    held = len(source._order["cat"])
    assert held < 80
    for workers in (0, 1):
        _, labels, paths, *_ = run(source, workers=workers)
        assert paths == [*dogs[:4], *cats[80:84]]
        assert labels.tolist() == [1] * 4 + [0] * 4
        assert [skipped.path for skipped in source.skipped] == cats[:80]
        assert source.replaced == 4
    for path in cats[80:]:
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(InputError, match=f"^all 90 images of class 'cat' are bad; the last, {cats[-1]}"):
        run(open_images(tmp_path, per_class=4))


@pytest.mark.parametrize("per_class", [2, 40, None])
def test_a_manifest_and_its_folder_give_one_choice(tmp_path, per_class):
    root = empty_files(tmp_path, 3, 60)
    rows = [f"class{i}/{j:06}.jpg,class{i}" for i in range(3) for j in range(60)]
    random.Random(0).shuffle(rows)
    repeated = [f"./{rows[5]}", rows[9], rows[9]]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,label", *rows[:30], *repeated, *rows[30:]]))
    folder, table = (open_images(data, per_class=per_class) for data in (root, manifest))
    assert table.available == folder.available == {f"class{i}": 60 for i in range(3)}
    assert table.describe()["ignored_files"] == 3
    for name in folder.classes:
        expected = in_order(f"{name}/{j:06}.jpg" for j in range(60))
        for source in (folder, table):
            assert source._order[name][: per_class or 60] == expected[: per_class or 60]


def test_the_first_spelling_of_a_file_counts(tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,label\nx//b.png,x\n./x/a.png,x\nx/b.png,x\n{tmp_path}/x/./a.png,x\ny/z.png,y\n")
    catalog = read_manifest(manifest)
    assert keys(catalog) == {"x": ["x/b.png", "x/a.png"], "y": ["y/z.png"]}
    assert (catalog.counts, catalog.ignored) == ({"x": 2, "y": 1}, 2)


def test_a_folder_is_walked_through_as_it_was_counted(tmp_path):
    write_images(tmp_path, {"a": 2, "a/deep": 1, "b": 3})
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    (tmp_path / "a" / "folder.png" / "void").mkdir(parents=True)
    (tmp_path / "b" / "linked.png").symlink_to(tmp_path / "a")  # a folder that was seen before
    (tmp_path / "b" / "notes.txt").write_text("words")
    for level in (None, 1):
        catalog = read_folder(tmp_path, level)
        listed = keys(catalog)
        assert {name: len(some) for name, some in listed.items()} == catalog.counts
        every = sorted(key for some in listed.values() for key in some)
        assert every == [
            *("a/00.png", "a/01.png", "a/deep/00.png", "a/folder.png", "a/gone.png", "a/self.png"),
            *("b/00.png", "b/01.png", "b/02.png"),
        ]


def test_classes_that_take_no_part_are_not_ranked(tmp_path, monkeypatch):
    empty_files(tmp_path, 4, 50)
    ranked = []
    plain = keys_module.key_hash
    monkeypatch.setattr(keys_module, "key_hash", lambda seed, key: ranked.append(key) or plain(seed, key))
    open_images(tmp_path, classes=["class1", "class3"], per_class=2)
    assert {key.split("/")[0] for key in ranked} == {"class1", "class3"}
    del ranked[:]
    items = Pictures(labels=[0, 1, 2] * 50)
    open_images(items, classes=["0", "2"], per_class=2)
    assert {int(key) % 3 for key in ranked} == {0, 2}


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_memory_is_that_of_the_choice_not_of_the_files(tmp_path, kind):
    peaks = []
    for count in (1000, 4000):
        root = empty_files(tmp_path / str(count), 5, count)
        if kind == "manifest":
            rows = (f"class{i}/{j:06}.jpg,class{i}\n" for j in range(count) for i in range(5))
            (root / "list.csv").write_text("path,label\n" + "".join(rows))
        gc.collect()
        tracemalloc.start()
        open_images(root if kind == "folder" else root / "list.csv", per_class=5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A path of these takes 75 bytes as Python holds it. A manifest takes 8 bytes a line, and what its array grows by.
    assert peaks[1] - peaks[0] < {"folder": 30_000, "manifest": 15_000 * 12 + 30_000}[kind]
