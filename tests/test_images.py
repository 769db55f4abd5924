"""Image sources: which images take part, in which order and batches, and what stands in for bad ones."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import Pictures, run, transform, write_images
from PIL import Image
from torch.utils.data import TensorDataset

from gpuclust.capture.images import Skipped, open_images
from gpuclust.errors import InputError

# ---- which of them


# What seed 0 chooses of 12 images each, in order: the same on every machine, now and later.
CHOSEN = [
    "cat/00.png",
    "cat/09.png",
    "cat/11.png",
    "cat/02.png",
    "cat/01.png",
    "dog/10.png",
    "dog/05.png",
    "dog/01.png",
    "dog/00.png",
    "dog/04.png",
]


def test_the_choice_is_the_same_on_every_machine(tmp_path):
    write_images(tmp_path, {"cat": 12, "dog": 12})
    assert run(open_images(tmp_path, per_class=5, seed=0))[2] == CHOSEN
    other = run(open_images(tmp_path, per_class=5, seed=1))[2]
    assert other != CHOSEN
    # More images of a class are the same and then others; another class changes nothing.
    write_images(tmp_path, {"eel": 9})
    assert run(open_images(tmp_path, per_class=3))[2][:3] == CHOSEN[:3]


def test_the_choice_does_not_depend_on_how_a_file_system_writes_accents(tmp_path):
    names = [f"é{i}.png" for i in range(6)]
    chosen = []
    for form in ("NFC", "NFD"):
        for folder in ("a", "b"):
            (tmp_path / form / folder).mkdir(parents=True)
            for i, name in enumerate(names):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / form / folder / unicodedata.normalize(form, name))
        chosen.append(run(open_images(tmp_path / form, per_class=3))[0])
    assert torch.equal(*chosen)


def test_a_name_that_is_not_utf8_is_shown_escaped(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    os.rename(tmp_path / "a" / "00.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    paths = run(open_images(tmp_path))[2]
    assert paths == ["a/caf\\xe9.png", "b/00.png"]
    json.dumps(paths).encode("utf-8")


def test_classes_are_chosen_by_name_in_their_own_order(tmp_path):
    write_images(tmp_path, {"ant": 2, "bee": 5, "cat": 4})
    (tmp_path / "void").mkdir()
    source = open_images(tmp_path, classes=["cat", "bee"])
    assert (source.classes, source.per_class) == (("bee", "cat"), 4)
    with pytest.raises(InputError, match=r"no class 'catt' in .*, which has 3; close: cat"):
        open_images(tmp_path, classes=["catt", "bee"])
    with pytest.raises(InputError, match=r"no class 'zzz' in .*; close: ant, bee, cat$"):
        open_images(tmp_path, classes=["zzz"])
    with pytest.raises(InputError, match=r"class 'void' of .* holds no image"):
        open_images(tmp_path, classes=["void", "bee"])
    with pytest.raises(InputError, match=r"no image in class folder 'void' of .*: remove it, or name the classes"):
        open_images(tmp_path)


@pytest.mark.parametrize("classes", [["ant"], ["ant", "ant"], []])
def test_one_class_is_too_few(tmp_path, classes):
    write_images(tmp_path, {"ant": 2, "bee": 2})
    with pytest.raises(InputError, match="two classes or more"):
        open_images(tmp_path, classes=classes)


def test_a_folder_of_one_class_is_too_few(tmp_path):
    with pytest.raises(InputError, match=r"two classes or more; .* has 1, of which 1 take part: ant$"):
        open_images(write_images(tmp_path, {"ant": 2}))


def test_more_images_than_a_class_has(tmp_path):
    write_images(tmp_path, {"ant": 2, "bee": 5})
    with pytest.raises(InputError, match="per_class is 3, and class 'ant' has 2 images: ask for at most that many"):
        open_images(tmp_path, per_class=3)
    assert open_images(tmp_path, per_class=2).n == 4
    with pytest.raises(InputError, match="per_class is at least 1; got 0"):
        open_images(tmp_path, per_class=0)


# ---- bad images


def huge_png() -> bytes:
    """The header of 169 megapixels, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no pixels") + chunk(b"IEND", b"")


def spoil(tmp_path: Path, per_class: int, bad: dict[str, bytes], count: int = 12) -> list[str]:
    """Two classes, of which some images hold other content; the order in which the images of cat are taken."""
    write_images(tmp_path, {"cat": count, "dog": count})
    order = run(open_images(tmp_path))[2][:count]
    assert order[:5] == CHOSEN[:5] or count != 12
    for path, content in bad.items():
        (tmp_path / path).write_bytes(content)
    return order


def test_bad_images_are_replaced_by_the_next_in_the_seeded_order_and_listed(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    order = spoil(tmp_path, 5, {})
    contents = (b"", b"a text file", whole.getvalue()[:900], huge_png())
    for path, content in zip((order[0], order[2], order[3], order[5]), contents, strict=True):
        (tmp_path / path).write_bytes(content)
    (tmp_path / order[4]).unlink()
    (tmp_path / order[4]).mkdir()
    source = open_images(tmp_path, per_class=5)
    _, labels, paths, thumbs, sizes = run(source)
    # Replacements come last; order[5] was to stand in for the first and is bad itself.
    assert paths == [order[1], *CHOSEN[5:], *order[6:10]]
    assert labels.tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert (len(thumbs), sizes) == (10, [4, 4, 2])
    assert (source.replaced, source.n) == (4, 10)
    reasons = {skipped.path: skipped.reason for skipped in source.skipped}
    assert list(reasons) == [order[i] for i in (0, 2, 3, 4, 5)]
    assert reasons[order[0]] == "the file is empty"
    assert reasons[order[2]].startswith("not an image")
    assert "truncated" in reasons[order[3]].lower()
    assert reasons[order[4]] == "a folder, not a file"
    assert reasons[order[5]].startswith("13000 x 13000 pixels, more than the 100,000,000")
    assert {skipped.class_name for skipped in source.skipped} == {"cat"}
    described = source.describe()
    assert described["delivered"] == {"cat": 5, "dog": 5}
    assert described["skipped_per_class"] == {"cat": 5, "dog": 0}
    assert described["skipped"][0] == {"path": order[0], "class": "cat", "reason": "the file is empty"}
    assert json.loads(json.dumps(described)) == described


def test_where_no_replacement_is_left_the_sizes_differ(tmp_path):
    order = spoil(tmp_path, 4, {}, count=4)
    (tmp_path / order[1]).write_bytes(b"")
    source = open_images(tmp_path)
    _, labels, paths, *_ = run(source)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert paths[:3] == [order[0], *order[2:]]
    assert source.describe()["delivered"] == {"cat": 3, "dog": 4}
    assert (source.replaced, len(source.skipped)) == (0, 1)
    run(source)  # and a second pass counts anew
    assert (source.replaced, len(source.skipped)) == (0, 1)


def test_max_pixels_is_an_option(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})  # of 120 pixels
    Image.new("RGB", (11, 11)).save(tmp_path / "a" / "00.png")
    source = open_images(tmp_path, max_pixels=120)
    assert len(run(source)[0]) == 3
    assert source.skipped == [Skipped("a/00.png", "a", "11 x 11 pixels, more than the 120 that max_pixels allows")]
    assert len(run(open_images(tmp_path, max_pixels=121))[0]) == 4


def test_a_bad_image_can_stop_the_run(tmp_path):
    order = spoil(tmp_path, 5, {})
    (tmp_path / order[11]).write_bytes(b"")  # not chosen: nobody looks
    source = open_images(tmp_path, per_class=5, on_bad_image="fail")
    assert len(run(source)[0]) == 10
    (tmp_path / order[1]).write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(InputError, match=rf"^image {order[1]} of class 'cat' is bad: the file is empty \(on_bad"):
            run(source, workers=workers)
    with pytest.raises(InputError, match="on_bad_image is skip or fail; got 'stop'"):
        open_images(tmp_path, on_bad_image="stop")


def test_a_whole_class_that_is_bad_stops_the_run(tmp_path):
    spoil(tmp_path, 2, {f"dog/{i:02}.png": b"" for i in range(4)}, count=4)
    source = open_images(tmp_path, per_class=2)
    with pytest.raises(
        InputError, match=r"^all 4 images of class 'dog' are bad; the last, dog/0\d\.png: the file is empt"
    ):
        run(source)


def test_bad_items_of_a_data_set(tmp_path):
    source = open_images(Pictures(bad=(3, 4)), per_class=5)  # without stored labels, they are found when it is read
    assert source.available == {"0": 6, "1": 6}
    assert len(run(source)[0]) == 10
    assert {skipped.path for skipped in source.skipped} <= {"3", "4"}

    class Unlabelled(Pictures):
        def __init__(self):
            super().__init__(bad=(3,))
            self.pairs, self.labels = self.labels, self.labels[:1]  # of another length, so not taken

        def __len__(self):
            return len(self.pairs)

        def __getitem__(self, index):
            if index in self.bad:
                raise OSError("disk")
            return Image.new("L", (5, 5), index), self.pairs[index]

    source = open_images(Unlabelled())
    assert source.available == {"0": 6, "1": 5}
    run(source)
    assert source.skipped == [Skipped("3", "", "OSError: disk")]
    with pytest.raises(InputError, match=r"item 3 of .*Unlabelled is bad: OSError: disk \(on_bad_image is fail\)"):
        open_images(Unlabelled(), on_bad_image="fail")


# ---- batches


def test_batches_depend_neither_on_workers_nor_on_their_size(tmp_path):
    order = spoil(tmp_path, 12, {}, count=24)
    for i in (0, 5, 6, 17):
        (tmp_path / order[i]).write_bytes(b"")

    def noisy(image):
        return transform(image) + torch.rand(3, 8, 8) + random.random()

    source = open_images(tmp_path, per_class=18)
    expected, found = None, []
    for batch_size, workers in ((7, 0), (7, 2), (1, 0), (32, 2), (100, None), (17, 0)):
        batches = list(source.batches(noisy, batch_size, workers))
        sizes = [len(batch) for batch in batches]
        assert sizes == [batch_size] * (36 // batch_size) + [36 % batch_size] * (36 % batch_size > 0)
        images = torch.cat([batch.images for batch in batches])
        expected = images if expected is None else expected
        assert torch.equal(images, expected)
        found.append(
            (
                [path for batch in batches for path in batch.paths],
                [thumb for batch in batches for thumb in batch.thumbs],
                np.concatenate([batch.labels for batch in batches]).tolist(),
                list(source.skipped),
                source.replaced,
            )
        )
    assert all(other == found[0] for other in found)
    assert found[0][4] == 4


def test_a_pass_can_be_left_early_and_begun_again(tmp_path):
    source = open_images(write_images(tmp_path, {"a": 20, "b": 20}))
    first = source.batches(transform, 3, 1)
    early = next(first)
    first.close()
    assert torch.equal(run(source, 3)[0][:3], early.images)


def test_a_part_of_a_batch(tmp_path):
    source = open_images(write_images(tmp_path, {"a": 3, "b": 3}))
    [batch] = source.batches(transform, 6)
    part = batch.part(2, 5)
    assert len(part) == 3
    assert part.images.data_ptr() == batch.images[2].data_ptr()
    assert (part.labels.tolist(), part.paths, part.thumbs) == ([0, 1, 1], batch.paths[2:5], batch.thumbs[2:5])


def test_arguments_of_a_pass(tmp_path):
    source = open_images(write_images(tmp_path, {"a": 2, "b": 2}))
    with pytest.raises(InputError, match="batch_size is at least 1 and workers at least 0; got 0 and None"):
        source.batches(transform, 0)
    with pytest.raises(InputError, match="got 4 and -1"):
        source.batches(transform, 4, -1)
    with pytest.raises(InputError, match="image files need a transform"):
        source.batches(None, 4)


def test_images_of_several_sizes_need_a_transform_that_resizes(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "01.png")

    def keep(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    source = open_images(tmp_path)
    for batch_size in (1, 4):  # in one chunk, and across chunks
        with pytest.raises(InputError, match=r"image b/0\d\.png: .*its shape is .*a transform that resizes is needed"):
            list(source.batches(keep, batch_size))


def test_workers_are_described(tmp_path):
    source = open_images(write_images(tmp_path, {"a": 2, "b": 2}))
    run(source, workers=1)
    assert source.describe()["workers"] == "1"
    list(source.batches(transform, 4))
    assert source.describe()["workers"] == "0"  # few images


# ---- fingerprint


def test_the_fingerprint_is_that_of_the_choice(tmp_path):
    write_images(tmp_path, {"cat": 12, "dog": 12})
    first = open_images(tmp_path, per_class=5).fingerprint()
    assert open_images(tmp_path, per_class=5).fingerprint() == first
    others = [
        open_images(tmp_path, per_class=4),
        open_images(tmp_path, per_class=5, seed=1),
        open_images(tmp_path, per_class=5, max_pixels=10),
        open_images(tmp_path, per_class=5, on_bad_image="fail"),
    ]
    write_images(tmp_path, {"eel": 12})
    others.append(open_images(tmp_path, per_class=5))
    assert len({first, *(other.fingerprint() for other in others)}) == 6
    assert open_images(tmp_path, per_class=5, classes=["cat", "dog"]).fingerprint() == first


def test_the_fingerprint_changes_when_a_chosen_file_does(tmp_path):
    write_images(tmp_path, {"cat": 12, "dog": 12})
    source = open_images(tmp_path, per_class=5)
    prints = [source.fingerprint()]
    chosen = tmp_path / CHOSEN[0]
    info = chosen.stat()
    content = chosen.read_bytes()
    chosen.write_bytes(content + b"\0")
    os.utime(chosen, ns=(info.st_atime_ns, info.st_mtime_ns))  # of another size
    prints.append(source.fingerprint())
    chosen.write_bytes(content)
    os.utime(chosen, ns=(info.st_atime_ns, info.st_mtime_ns + 1))  # of another time
    prints.append(source.fingerprint())
    chosen.unlink()
    prints.append(source.fingerprint())
    assert len(set(prints)) == 4
    chosen.write_bytes(content)
    os.utime(chosen, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert source.fingerprint() == prints[0]
    rest = sorted({str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} - set(CHOSEN))
    (tmp_path / rest[0]).write_bytes(b"")
    assert source.fingerprint() == prints[0]


def test_which_images_replace_bad_ones_has_a_hash_of_its_own(tmp_path):
    write_images(tmp_path, {"cat": 12, "dog": 12})
    source = open_images(tmp_path, per_class=5)

    def passed() -> tuple[str, str]:
        paths = [path for batch in source.batches(transform, 4, 0) for path in batch.paths]
        return source.describe()["replacements"], paths[-1]

    none, _ = passed()
    (tmp_path / CHOSEN[0]).write_bytes(b"")
    one, name = passed()
    again, _ = passed()
    info = (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    other, _ = passed()
    assert none != one == again != other


def test_the_fingerprint_of_a_data_set_sees_its_content():
    first = open_images(Pictures()).fingerprint()
    assert open_images(Pictures()).fingerprint() == first
    tensors = [TensorDataset(torch.full((4, 1, 2, 2), value), torch.tensor([0, 1] * 2)) for value in (0.0, 1.0)]
    random_crops = TensorDataset(torch.zeros(4, 1, 2, 2, dtype=torch.bfloat16), torch.tensor([0, 1] * 2))
    others = [Pictures(shade=1), Pictures(labels=(0, 1) * 7), Pictures(bad=(0, 1, 2, 3, 4)), *tensors, random_crops]
    assert len({first, *(open_images(other).fingerprint() for other in others)}) == 7


def test_the_fingerprint_of_random_items_is_stable():
    class Noisy(Pictures):
        def __getitem__(self, index):
            return torch.rand(1, 2, 2), self.labels[index]

    assert open_images(Noisy()).fingerprint() == open_images(Noisy()).fingerprint()
