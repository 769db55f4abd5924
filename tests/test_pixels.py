"""Pixels: the same input in every pass, kept or decoded again, in the same batches, as the transform would give it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import Pictures, write_images
from cases_images import transform as whole
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import transforms as v1
from torchvision.transforms._presets import ImageClassification

from gpuclust.capture import loader, pixels
from gpuclust.capture.images import open_images
from gpuclust.capture.layers import find_layers
from gpuclust.capture.models import Network
from gpuclust.capture.passes import Passes
from gpuclust.capture.pixels import Pixels, pixel_bytes
from gpuclust.capture.transport import ByteTransform
from gpuclust.errors import InputError

CPU = torch.device("cpu")
SPLIT = v1.Compose([v1.Resize((8, 9)), v1.ToTensor(), v1.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))])
TRANSFORMS = {"split": SPLIT, "whole": whole}


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 images, of which five are bad and four replaced."""
    write_images(tmp_path, {"cat": 20, "dog": 20})
    for path in ("cat/03.png", "cat/11.png", "dog/00.png", "dog/07.png", "dog/08.png"):
        (tmp_path / path).write_bytes(b"")
    return tmp_path


def images(folder):
    return open_images(folder, per_class=18)


def make(source, transform, batch_size=7, *, dtype=torch.float32, workers=0, keep=False, device=CPU):
    return Pixels(source, transform, batch_size, device=device, dtype=dtype, workers=workers, keep=keep)


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def all_of(first):
    starts, inputs, batches = zip(*((start, given.clone(), batch) for start, given, batch in first), strict=True)
    return list(starts), list(inputs), list(batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_inputs_have_the_memory_format_asked_for(folder, name, dtype):
    source, last = images(folder), torch.channels_last
    expected = list(source.batches(TRANSFORMS[name], 7, 0))
    for keep in (False, True):
        pixels = Pixels(source, TRANSFORMS[name], 7, device=CPU, dtype=dtype, workers=0, keep=keep, memory_format=last)
        passed = [(given.stride(), given.clone()) for _, given, _ in pixels.first()]
        passed += [(given.stride(), given.clone()) for *_, given in pixels.again()]
        for batch, (strides, given) in zip(2 * expected, passed, strict=True):
            assert torch.equal(given, batch.images.to(dtype))
            assert strides == torch.empty(given.shape, memory_format=last).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 20, 64])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_pass_gives_what_the_transform_gives(folder, name, batch_size, dtype):
    expected = list(images(folder).batches(TRANSFORMS[name], batch_size, 0))
    for keep in (False, True):
        given = make(images(folder), TRANSFORMS[name], batch_size, keep=keep, dtype=dtype)
        assert given.n == 0
        starts, inputs, batches = all_of(given.first())
        assert given.n == 35
        assert starts == list(range(0, 35, batch_size))
        assert all(torch.equal(a, b.images.to(dtype)) for a, b in zip(inputs, expected, strict=True))
        assert all((a.paths, a.thumbs) == (b.paths, b.thumbs) for a, b in zip(batches, expected, strict=True))
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(batches, expected, strict=True))
        for _ in range(2):
            again = [(number, start, given.clone()) for number, start, given in given.again()]
            assert [(number, start) for number, start, _ in again] == list(enumerate(starts))
            assert all(torch.equal(a, b) for (*_, a), b in zip(again, inputs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_some_batches_alone(folder, keep, workers, monkeypatch):
    monkeypatch.setattr("gpuclust.capture.images.FEW_IMAGES", 8)
    given = make(images(folder), SPLIT, 4, keep=keep, workers=workers)
    _, inputs, _ = all_of(given.first())
    for wanted in ([8], [0], [5, 1], [3, 3, 2], [], [8, 0, 4]):
        found = [(number, start, some.clone()) for number, start, some in given.again(wanted)]
        assert [(number, start) for number, start, _ in found] == [(i, 4 * i) for i in sorted(set(wanted))]
        assert all(torch.equal(some, inputs[number]) for number, _, some in found)


def test_only_the_wanted_images_are_decoded_and_no_small_pictures_made(folder, monkeypatch):
    read = []
    decode = loader.decode_file
    monkeypatch.setattr(loader, "decode_file", lambda path, *given: (read.append(path), decode(path, *given))[1])
    given = make(images(folder), SPLIT, 4)
    paths = [path for *_, batch in given.first() for path in batch.paths]
    read.clear()
    monkeypatch.setattr(loader, "encode_thumbnail", None)
    list(given.again([1, 8]))
    assert [str(path.relative_to(folder)) for path in read] == paths[4:8] + paths[32:]


def test_each_input_is_memory_of_its_own(folder):
    """A network that works in place changes nothing that comes later."""
    given = make(images(folder), whole, 16, keep=True)
    inputs = []
    for _, some, _ in given.first():
        inputs.append(some.clone())
        some.fill_(torch.nan)
    held = [some for *_, some in given.again()]
    assert len({some.data_ptr() for some in held}) == len(held)
    for some, expected in zip(held, inputs, strict=True):
        assert some.is_contiguous()
        assert torch.equal(some, expected)
        some.fill_(torch.nan)
    assert all(torch.equal(some, expected) for (*_, some), expected in zip(given.again(), inputs, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_an_input_lies_where_the_one_before_lay_unless_something_refers_to_that(folder, keep):
    given = make(images(folder), SPLIT, 4, keep=keep)
    list(given.first())
    expected = [some.clone() for *_, some in given.again()]
    places, held = [], []
    passing = given.again()
    for number in range(9):
        some = next(passing)[2]
        places.append(some.data_ptr())
        if number == 3:
            held.append(some[1, 2, 3:])
        del some
    assert len(set(places)) == 2
    assert places[3] != places[4] == places[8]
    assert torch.equal(held[0], expected[3][1, 2, 3:])


def test_where_the_network_is_on_a_cpu_known_transforms_of_files_need_no_processes(folder):
    assert make(images(folder), SPLIT, workers=None).workers == 0
    assert make(images(folder), SPLIT, workers=3).workers == 3
    assert make(images(folder), whole, workers=None).workers is None
    assert make(images(folder), SPLIT, workers=None, device=torch.device("meta")).workers is None
    assert make(open_images(Pictures([0, 1] * 40)), SPLIT, workers=None).workers is None


@pytest.mark.parametrize(("name", "size"), [("split", 3 * 8 * 9), ("whole", 3 * 8 * 8 * 4)])
def test_what_is_kept_has_the_size_foretold_and_is_given_back(folder, name, size, monkeypatch):
    source = images(folder)
    example = next(source.batches(TRANSFORMS[name], 1, 0)).images
    assert pixel_bytes(source, TRANSFORMS[name], example) == size
    given = make(source, TRANSFORMS[name], keep=True)
    _, inputs, _ = all_of(given.first())
    assert given.kept_bytes == source.n * size
    monkeypatch.setattr(loader, "decode_file", None)
    assert len(list(given.again())) == len(inputs)
    monkeypatch.undo()
    given.drop()
    assert (given.keep, given.kept_bytes) == (False, 0)
    assert all(torch.equal(some, expected) for (*_, some), expected in zip(given.again(), inputs, strict=True))


def test_pictures_travel_as_bytes_and_nothing_else_does(folder):
    def sent(data, transform):
        return {part.images.dtype for parts in make(data, transform)._groups() for part in parts}

    tensors = TensorDataset(torch.rand(8, 3, 8, 9), torch.tensor([0, 1] * 4))
    assert sent(images(folder), SPLIT) == {torch.uint8}
    assert sent(open_images(Pictures()), v1.Compose([v1.Lambda(lambda image: image), *SPLIT.transforms])) == {
        torch.float32
    }
    assert sent(open_images(Pictures()), SPLIT) == {torch.uint8}
    assert sent(images(folder), whole) == {torch.float32}
    assert sent(open_images(tensors), SPLIT) == {torch.float32}
    assert pixel_bytes(open_images(tensors), SPLIT, torch.rand(1, 3, 8, 9)) == 3 * 8 * 9 * 4


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_tensors_of_a_data_set(keep, integers):
    values = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    items = values if integers else values.double() / 3
    given = make(open_images(TensorDataset(items, torch.tensor([0, 1] * 4))), None, 3, keep=keep)
    _, inputs, batches = all_of(given.first())
    order = [int(path) for batch in batches for path in batch.paths]
    expected = items[order].float() / (255 if integers else 1)
    assert torch.equal(torch.cat(inputs), expected)
    assert torch.equal(torch.cat([some for *_, some in given.again()]), expected)


def test_a_data_set_that_draws_random_numbers_gives_the_same_again():
    class Noisy(Pictures):
        def __getitem__(self, index):
            return torch.rand(1, 5, 5), self.labels[index]

    given = make(open_images(Noisy()), None, 5)
    _, inputs, _ = all_of(given.first())
    assert torch.equal(torch.cat(inputs), torch.cat([some for *_, some in given.again()]))


def test_an_image_that_changed_stops_a_later_pass(folder):
    given = make(images(folder), whole, 4, workers=0)
    changed = all_of(given.first())[2][2].paths[2]
    (folder / changed).write_bytes(b"no image")
    list(given.again([0, 1, 3]))  # nobody looks
    with pytest.raises(InputError, match=rf"^image {changed} changed since the first pass: not an image"):
        list(given.again())
    with pytest.raises(InputError, match=rf"^image {changed} changed since the first pass: not an image"):
        list(given.again([2]))
    (folder / changed).unlink()
    with pytest.raises(InputError, match=rf"^image {changed} changed since the first pass: No such file"):
        list(given.again())


def test_an_image_of_another_shape_stops_a_later_pass(folder):
    crop = v1.Compose([v1.ToTensor()])
    for transform in (crop, lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1)):
        given = make(images(folder), transform, 4)
        changed = all_of(given.first())[2][2].paths[2]
        content = (folder / changed).read_bytes()
        Image.new("RGB", (12, 10)).save(folder / changed)
        with pytest.raises(InputError, match=rf"^image {changed} changed since the first pass: its shape is \(3, 10"):
            list(given.again([2]))
        (folder / changed).write_bytes(content)


def test_a_name_that_is_shown_escaped_is_found_again(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "00.png").rename(tmp_path / "a" / "caf\udce9.png")
    given = make(open_images(tmp_path), SPLIT)
    _, [expected], [batch] = all_of(given.first())
    assert batch.paths[0] == "a/caf\\xe9.png"
    [(_, _, some)] = given.again()
    assert torch.equal(some, expected)


def test_pictures_and_tensors_in_one_data_set_are_refused():
    class Both(Pictures):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image if index < 10 else torch.zeros(3, 8, 9)), label

    source = open_images(Both())
    source._pictures = True
    with pytest.raises(InputError, match="picture, and this one a tensor"):
        list(make(source, SPLIT).first())


@pytest.mark.parametrize("keep", [False, True])
def test_a_pass_that_is_given_up_leaves_nothing_and_can_be_begun_again(folder, keep):
    given = make(images(folder), SPLIT, 4, workers=2, keep=True)
    first = given.first()
    next(first)
    first.close()
    assert given.n == 0
    given.keep = keep
    _, inputs, _ = all_of(given.first())
    assert (given.kept_bytes > 0) == keep
    assert torch.equal(torch.cat(inputs), torch.cat([some for *_, some in given.again()]))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_through_staging_as_on_a_gpu(folder, name, keep, monkeypatch):
    """The way of a GPU, but for its copies: the next batch is on its way while this one is worked on."""
    expected = list(images(folder).batches(TRANSFORMS[name], 4, 0))
    given = make(images(folder), TRANSFORMS[name], 4, keep=keep)
    monkeypatch.setattr(given, "_staged", True)
    starts, inputs, batches = all_of(given.first())
    assert starts == list(range(0, 35, 4))
    assert all(torch.equal(a, b.images) for a, b in zip(inputs, expected, strict=True))
    assert [batch.paths for batch in batches] == [batch.paths for batch in expected]
    assert all(torch.equal(a, b) for (*_, a), b in zip(given.again(), inputs, strict=True))
    assert all(torch.equal(a, inputs[i]) for i, _, a in given.again([8, 2]))
    assert list(given.again([])) == []


def test_a_split_is_what_workers_get(folder):
    given = make(images(folder), SPLIT)
    assert isinstance(given._transform, ByteTransform)
    assert pixels.pixel_bytes(images(folder), SPLIT, torch.empty(1, 3, 8, 9)) == 216


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read where Linux tells it")
@pytest.mark.parametrize("split", [True, False])
def test_host_memory_stays_flat(tmp_path, split):
    """The process of a run holds two batches, however many there are."""
    write_images(tmp_path, {"cat": 64, "dog": 64})
    preset = ImageClassification(crop_size=224)
    given = make(open_images(tmp_path), preset if split else lambda picture: preset(picture), 16, workers=2)
    batch_bytes = 16 * 3 * 224 * 224 * 4
    for item in given.first():
        del item
    held = resident_bytes()
    for _ in range(5):
        peak = 0
        for item in given.again():
            peak = max(peak, resident_bytes())
            del item
    assert 0.9 * batch_bytes < peak - held < 2.2 * batch_bytes


def test_the_first_pass_writes_each_input_over_the_one_before(folder):
    network = torch.nn.Conv2d(3, 2, 3)
    pixels = make(images(folder), TRANSFORMS["split"], 7)
    layers = find_layers(network, torch.zeros(1, *next(pixels.first())[1].shape[1:]))
    places = []
    network.register_forward_pre_hook(lambda _, inputs: places.append(inputs[0].data_ptr()))
    passes = Passes(Network("conv", network, None, None, {}), pixels, 0)
    for _ in passes.first(layers, lambda *_: None):
        pass
    assert len(places) == 5
    assert len(set(places)) == 1
