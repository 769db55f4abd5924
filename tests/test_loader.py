"""Reading in worker processes: the same chunks whatever the number of workers, faults with their cause."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import write_images
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as v1

from gpuclust.capture import loader
from gpuclust.capture.decode import BadImage
from gpuclust.capture.loader import (
    Chunks,
    DatasetReader,
    FileReader,
    cannot_be_sent,
    default_workers,
    key_hash,
    load_chunks,
)
from gpuclust.capture.transport import as_bytes
from gpuclust.errors import GpuclustError, InputError


class Grey:
    """A picture whose grey is its key; multiples of seven are bad."""

    def read(self, key: str) -> Image.Image:
        if int(key) % 7 == 0:
            raise BadImage(f"{key} is a multiple of seven")
        return Image.new("RGB", (4, 4), (int(key),) * 3)


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item, 0


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def noisy(image: Image.Image) -> torch.Tensor:
    return tensor(image) + torch.rand(3, 4, 4) + random.random() + float(np.random.rand())


def keys(count: int) -> list[str]:
    return [str(i) for i in range(1, count + 1)]


def collect(transform, size: int, workers: int, count: int = 40):
    loaded = list(load_chunks(Chunks(Grey(), transform, keys(count), size, seed=3), workers))
    images = torch.cat([chunk.images for chunk in loaded if chunk.good])
    return (
        images,
        [position for chunk in loaded for position in chunk.good],
        [thumb for chunk in loaded for thumb in chunk.thumbs],
        [bad for chunk in loaded for bad in chunk.bad],
    )


@pytest.mark.parametrize("transform", [tensor, noisy])
def test_the_result_depends_neither_on_workers_nor_on_chunks(transform):
    images, good, thumbs, bad = collect(transform, 16, 0)
    assert good == [i for i in range(40) if (i + 1) % 7]
    assert bad == [(i, f"{i + 1} is a multiple of seven") for i in range(40) if (i + 1) % 7 == 0]
    assert images.shape == (35, 3, 4, 4)
    assert images.dtype == torch.float32
    for size, workers in ((16, 2), (1, 0), (7, 1)):  # a chunk of one holds bad images alone, now and then
        other = collect(transform, size, workers)
        assert torch.equal(other[0], images)
        assert other[1:] == (good, thumbs, bad)


FLIP = v1.Compose([v1.Resize((4, 5)), v1.RandomHorizontalFlip(), v1.ToTensor()])
PLAIN = v1.Compose([v1.Resize((4, 5)), v1.ToTensor()])


def files(folder: Path, transform, decoder: str = "pillow", size: int = 7) -> Chunks:
    write_images(folder, {"cat": 12, "dog": 12})
    (folder / "dog" / "04.png").write_bytes(b"nothing")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    return Chunks(FileReader(folder, 10**6, decoder), transform, names, size, 0)


def test_threads_read_files_side_by_side_and_give_the_same(tmp_path, monkeypatch):
    chunks = files(tmp_path, as_bytes(PLAIN))
    alone = [chunks[index] for index in range(len(chunks))]
    decode, together = loader.decode_file, threading.Barrier(2, timeout=20)

    def met(*given):
        together.wait()
        return decode(*given)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)), raising=False)
    monkeypatch.setattr(loader, "decode_file", met)
    threaded = list(load_chunks(files(tmp_path, as_bytes(PLAIN), size=8), 0))
    assert threading.active_count() < 2 + len(threaded)  # they end with the pass
    assert torch.equal(torch.cat([a.images for a in threaded]), torch.cat([a.images for a in alone]))
    for name in ("good", "thumbs", "bad"):
        found, expected = ([*itertools.chain(*(getattr(a, name) for a in some))] for some in (threaded, alone))
        assert found == expected
    assert [position for a in threaded for position, _ in a.bad] == [16]


def test_only_what_can_be_read_by_threads_is(tmp_path):
    assert files(tmp_path, as_bytes(PLAIN)).for_threads()
    assert not files(tmp_path, as_bytes(FLIP)).for_threads()
    assert not files(tmp_path, PLAIN).for_threads()
    assert not files(tmp_path, as_bytes(PLAIN), "torchcodec").for_threads()
    assert not Chunks(Grey(), as_bytes(PLAIN), keys(9), 3, 0).for_threads()


def test_a_fault_in_a_thread_names_the_image(tmp_path, monkeypatch):
    chunks = files(tmp_path, as_bytes(PLAIN))

    def fail(path, *_):
        raise AttributeError(f"no {path.name}")

    monkeypatch.setattr(loader, "decode_file", fail)
    with pytest.raises(InputError, match=r"image cat/00.png: AttributeError: no 00.png"):
        list(load_chunks(chunks, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_random_numbers_are_untouched(workers):
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    def reset():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        reset()
        expected = draw()
        reset()
        collect(noisy, 16, workers)
        assert draw() == expected
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_transform_names_the_image_and_keeps_the_traceback(workers):
    def fail(image):
        if image.getpixel((0, 0))[0] == 5:
            raise ZeroDivisionError("five")
        return tensor(image)

    with pytest.raises(InputError, match=r"^image 5: ZeroDivisionError: five") as caught:
        list(load_chunks(Chunks(Grey(), fail, keys(9), 4, 0), workers))
    assert str(caught.value) == "image 5: ZeroDivisionError: five"
    assert "in fail" in caught.value.__notes__[0]


def test_what_is_no_network_input_is_refused():
    cases = (
        (lambda image: image, r"a tensor \(c, h, w\); got Image"),
        (lambda image: torch.zeros(4, 4), r"a tensor \(c, h, w\); got shape \(4, 4\)"),
        (None, "needs a transform"),
        (lambda image: torch.zeros(3, image.getpixel((0, 0))[0], 4), r"its shape is \(3, 2, 4\) .* have \(3, 1, 4\)"),
    )
    for transform, message in cases:
        with pytest.raises(InputError, match=message):
            list(load_chunks(Chunks(Grey(), transform, keys(4), 4, 0), 0))


def test_tensors_of_a_data_set_pass_and_bytes_are_scaled():
    items = Items(torch.full((1, 2, 2), 255, dtype=torch.uint8), torch.full((1, 2, 2), 0.25, dtype=torch.float64))
    [chunk] = load_chunks(Chunks(DatasetReader(items), None, ["0", "1"], 4, 0), 0)
    assert chunk.images.dtype == torch.float32
    assert chunk.images[:, 0, 0, 0].tolist() == [1.0, 0.25]
    assert all(thumb.startswith(b"\xff\xd8") for thumb in chunk.thumbs)


def test_pictures_of_a_data_set_are_made_rgb_and_failing_items_are_bad():
    holed = Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))
    items = Items(Image.new("L", (4, 4), 9), OSError("disk"), holed)
    [chunk] = load_chunks(Chunks(DatasetReader(items), tensor, ["0", "1", "2"], 4, 0), 0)
    assert chunk.images.shape == (1, 3, 4, 4)
    assert chunk.bad == [(1, "OSError: disk"), (2, "holds NaN or infinity")]
    with pytest.raises(InputError, match=r"image 0: TypeError: .*PIL image or a tensor"):
        list(load_chunks(Chunks(DatasetReader(Items("text")), tensor, ["0"], 4, 0), 0))


def test_files_are_read_relative_to_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4), (7, 7, 7)).save(tmp_path / "a" / "b.png")
    reader = FileReader(tmp_path, 16)
    assert reader.read("a/b.png").getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(BadImage, match="more than the 15"):
        FileReader(tmp_path, 15).read("a/b.png")


def test_a_worker_that_dies_is_an_error_with_advice():
    parent = os.getpid()

    def die(image):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(GpuclustError, match=r"a process that reads images died: .*--workers 0") as caught:
        list(load_chunks(Chunks(Grey(), die, keys(9), 4, 0), 1))
    assert not isinstance(caught.value, InputError)
    assert not multiprocessing.active_children()


def test_workers_are_gone_when_the_reader_stops_early():
    chunks = load_chunks(Chunks(Grey(), tensor, keys(64), 4, 0), 2)
    next(chunks)
    assert multiprocessing.active_children()
    chunks.close()
    assert not multiprocessing.active_children()


def test_default_workers(monkeypatch):
    assert default_workers(63) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert default_workers(64) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)), raising=False)
    assert default_workers(64) == loader.MAX_WORKERS


def test_what_cannot_be_sent_is_known_beforehand(monkeypatch):
    local = lambda image: image  # noqa: E731
    assert cannot_be_sent(Grey(), local) is None  # a forked worker has it
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    assert cannot_be_sent(Grey(), tensor) is None
    assert "pickle" in (cannot_be_sent(Grey(), local) or "")


def test_the_order_of_keys_is_that_of_a_known_hash():
    # The first bytes of `printf '0:cat/1.png' | sha256sum`.
    assert key_hash(0, "cat/1.png").hex()[:16] == "c54c2f9f7dd9bde5"
    assert key_hash(1, "cat/1.png") != key_hash(0, "cat/1.png")
    assert len(key_hash(0, "caf\udce9.png")) == 32  # a name that is not UTF-8


def test_memory_that_runs_out_is_no_images_fault():
    class Scarce(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
            return torch.zeros(3, 4, 4), 0

    for error, workers in ((RuntimeError, 0), (RuntimeError, 1)):
        with pytest.raises(error, match="allocate memory"):
            list(load_chunks(Chunks(DatasetReader(Scarce()), None, ["0", "1", "2"], 2, 0), workers))
