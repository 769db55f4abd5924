"""Thumbnails in a file: read as they were written, gone with the process, and not in memory."""

from __future__ import annotations

import copy
import errno
import gc
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpuclust.errors import GpuclustError
from gpuclust.report import Samples
from gpuclust.report.thumbs import Thumbs

PICTURES = [b"one", b"", b"\0three" * 5000, b"4"]


def test_pictures_are_read_as_they_were_added(tmp_path):
    thumbs = Thumbs(tmp_path)
    assert not thumbs
    thumbs.extend(PICTURES[:2])
    assert list(thumbs) == PICTURES[:2]
    thumbs.extend(PICTURES[2:])  # after it was read in the middle
    assert thumbs[1] == b""
    thumbs.extend([b"five"])
    assert list(thumbs) == [*PICTURES, b"five"]
    assert (thumbs[-1], thumbs[1:4]) == (b"five", tuple(PICTURES[1:4]))
    assert thumbs == (*PICTURES, b"five")
    assert (*PICTURES, b"five") == thumbs  # also where the tuple is asked first
    assert thumbs != (*PICTURES, b"six")
    assert thumbs != tuple(PICTURES)
    with pytest.raises(IndexError):
        thumbs[5]
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert pickle.loads(pickle.dumps(thumbs)) == copy.deepcopy(thumbs) == tuple(thumbs)


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    thumbs = Thumbs(tmp_path)

    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, picture: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(thumbs, "_file", Full())
    with pytest.raises(GpuclustError, match=r"^cannot write into '.*': No space left on device \(thumbnails\)$"):
        thumbs.extend(PICTURES)


def samples(thumbs) -> Samples:
    return Samples(tuple(f"a/ü{i}.png" for i in range(len(thumbs))), np.arange(len(thumbs)), ("a",), thumbs)


def test_samples_in_a_file_are_those_that_were_saved(tmp_path):
    thumbs = Thumbs()
    thumbs.extend(PICTURES)
    for kept in (thumbs, tuple(PICTURES)):
        samples(kept).save(tmp_path / "samples.npz")
        loaded = Samples.load(tmp_path / "samples.npz")
        assert loaded.thumbs == PICTURES
        assert (loaded.paths, loaded.classes) == (samples(kept).paths, ("a",))
        assert loaded.labels.tolist() == [0, 1, 2, 3]
    loaded.save(tmp_path / "samples.npz")  # onto the file that its thumbnails are in
    assert loaded.thumbs == Samples.load(tmp_path / "samples.npz").thumbs == PICTURES
    with np.load(tmp_path / "samples.npz") as file:  # as NumPy itself would have written it
        assert file["pixels"].tobytes() == b"".join(PICTURES)
    samples(()).save(tmp_path / "none.npz")
    assert len(Samples.load(tmp_path / "none.npz").thumbs) == 0


def test_samples_with_their_text_as_wide_characters_can_be_read(tmp_path):
    text = json.dumps({"paths": ["a/1", "a/2"], "classes": ["a"]})
    pixels = np.frombuffer(b"onefour", np.uint8)
    np.savez(tmp_path / "x.npz", text=np.array(text), labels=np.zeros(2, int), sizes=np.array([3, 4]), pixels=pixels)
    loaded = Samples.load(tmp_path / "x.npz")
    assert (loaded.paths, loaded.thumbs) == (("a/1", "a/2"), (b"one", b"four"))


def test_damaged_pixels_are_found_when_the_samples_are_loaded(tmp_path):
    samples(PICTURES).save(tmp_path / "samples.npz")
    content = (tmp_path / "samples.npz").read_bytes()
    place = content.index(PICTURES[2]) + 20
    (tmp_path / "samples.npz").write_bytes(content[:place] + b"?" + content[place + 1 :])
    with pytest.raises(zipfile.BadZipFile):
        Samples.load(tmp_path / "samples.npz")


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        thumbs = Thumbs(tmp_path)
        for _ in range(count // 64):
            thumbs.extend(b"x" * 1500 for _ in range(64))
        samples(thumbs).save(tmp_path / f"{count}.npz")
        loaded = Samples.load(tmp_path / f"{count}.npz")
        assert loaded.thumbs[count - 64] == b"x" * 1500
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(640)  # whatever is imported at first
    assert peak(12_800) - peak(6_400) < 6_400 * 500  # paths, labels and ends; the pictures would be 1500 each


def test_a_run_leaves_no_file_of_its_thumbnails(tmp_path: Path):
    import cases_run as cases

    import gpuclust

    data = cases.write_folder(tmp_path / "pictures")
    report = gpuclust.analyze((cases.small_net(), cases.to_tensor), data, out=tmp_path / "run")
    assert all(report.samples.thumbs)
    kept = {file.name for file in (tmp_path / "run" / ".state").iterdir()}
    assert kept - {"lock"} == {
        "samples.npz",
        "images.json",
        "run.json",
        *(f"{i:03}.npz" for i in range(len(cases.LAYERS))),
    }
