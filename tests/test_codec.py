"""torchcodec in Pillow's place: the same pictures but for rounding, the same images chosen, wherever it decodes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases_images import Pictures, write_images
from PIL import ExifTags, Image
from torchvision.transforms import CenterCrop, Compose, Normalize, PILToTensor, Resize, ToTensor

from gpuclust import analyze
from gpuclust.capture.codec import Encoded, require_torchcodec
from gpuclust.capture.images import open_images
from gpuclust.capture.loader import FileReader
from gpuclust.capture.pixels import Pixels
from gpuclust.capture.transport import as_bytes
from gpuclust.config import DECODERS
from gpuclust.demo import demo_network
from gpuclust.errors import InputError, UnavailableError

CPU = torch.device("cpu")


def usable() -> str:
    try:
        require_torchcodec()
    except UnavailableError as error:
        return str(error)
    return ""


needs_torchcodec = pytest.mark.skipif(bool(usable()), reason=usable())


def smooth(i: int, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> Image.Image:
    """A picture that no decoder has much to round in, unlike any other and in no way symmetrical."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    colours = [x * (2 + i) % 200, y * 3 % 220, (x + y + 40 * i) % 240]
    return Image.fromarray(np.stack(colours, 2).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of seven images: JPEG files of several sizes, modes and orientations, a PNG file, and broken ones."""
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(7):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = i + 2
            data = jpeg(smooth(i, (90 + i, 70), "L" if i == 3 else "RGB"), exif=exif, progressive=i == 2)
            (root / name / f"{i}.jpg").write_bytes(data)
    smooth(1).save(root / "dog" / "1.jpg", "PNG")
    (root / "dog" / "2.jpg").write_bytes(jpeg(smooth(2).convert("CMYK")))
    (root / "cat" / "4.jpg").write_bytes(jpeg(smooth(4))[:-500])
    (root / "cat" / "5.jpg").write_bytes(jpeg(smooth(5))[:200] + b"\xff\xda\xff\xd9")
    return root


def near(found: torch.Tensor, expected: torch.Tensor, most: float = 2.0) -> bool:
    """Whether pictures, in 0 to 255, differ by less than that in the mean."""
    return found.shape == expected.shape and float((found.float() - expected.float()).abs().mean()) < most


@needs_torchcodec
def test_pictures_are_pillows_but_for_rounding(folder: Path) -> None:
    for path in sorted(folder.glob("dog/*")):
        found, expected = (FileReader(folder, 10**6, decoder).read(f"dog/{path.name}") for decoder in DECODERS)
        assert isinstance(found, Image.Image)
        assert near(*(torch.from_numpy(np.asarray(image).copy()) for image in (found, expected)), 1.0), path.name


BYTES = as_bytes(Compose([Resize(40), CenterCrop(32), ToTensor(), Normalize([0.5] * 3, [0.25] * 3)]))


def batches(folder: Path, decoder: str, device: torch.device | None = None, workers: int = 0):
    source = open_images(folder, per_class=4, decoder=decoder)
    parts = [part for group in source.groups(BYTES, 3, workers, device) for part in group]
    return source, parts, torch.cat([part.images for part in parts])


@needs_torchcodec
@pytest.mark.parametrize("device", [None, CPU], ids=["in the workers", "where the network is"])
def test_the_same_images_are_chosen_and_the_same_are_bad(folder: Path, device: torch.device | None) -> None:
    expected, others, theirs = batches(folder, "pillow")
    source, parts, images = batches(folder, "torchcodec", device)
    assert source.replaced == expected.replaced > 0
    assert {bad.path for bad in source.skipped} == {bad.path for bad in expected.skipped} == {"cat/4.jpg", "cat/5.jpg"}
    assert [path for part in parts for path in part.paths] == [path for part in others for path in part.paths]
    assert images.dtype == torch.uint8
    assert near(images, theirs)
    for thumb, other in zip(
        (thumb for part in parts for thumb in part.thumbs),
        (thumb for part in others for thumb in part.thumbs),
        strict=True,
    ):
        small, expects = (Image.open(io.BytesIO(data)) for data in (thumb, other))
        assert small.size == expects.size
        assert near(*(torch.from_numpy(np.asarray(image).copy()) for image in (small, expects)), 4.0)


@needs_torchcodec
def test_a_file_that_only_the_decoder_finds_broken_is_a_bad_image(folder: Path, monkeypatch) -> None:
    """nvJPEG takes no batch of which one file is broken: each is tried alone."""
    import torchcodec.decoders

    decode = torchcodec.decoders.decode_jpeg

    def stricter(files, **options):
        if any(b"a broken scan" in file for file in files):
            raise RuntimeError("nvjpeg says no")
        return decode(files, **options)

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", stricter)
    file = folder / "dog" / "0.jpg"
    file.write_bytes(file.read_bytes() + b"a broken scan")
    source = open_images(folder, per_class=4, decoder="torchcodec")
    paths = [path for group in source.groups(BYTES, 6, 0, CPU) for part in group for path in part.paths]
    assert len(paths) == 8
    assert "dog/0.jpg" not in paths
    assert {bad.path: bad.reason for bad in source.skipped}["dog/0.jpg"] == "nvjpeg says no"


def test_thumbnails_do_not_know_pillows_own_limit_of_pixels(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert Encoded(jpeg(smooth(0, (90, 70))), 6).small().size == (70, 90)


@needs_torchcodec
def test_every_pass_gives_the_same_bits_and_workers_change_nothing(folder: Path) -> None:
    _, parts, images = batches(folder, "torchcodec", CPU)
    assert torch.equal(batches(folder, "torchcodec", CPU, workers=2)[2], images)
    source = open_images(folder, per_class=4, decoder="torchcodec")
    keys = [key for part in parts for key in part.keys]
    again = [part for group in source.again(keys, images.shape[1:], BYTES, 3, 0, CPU) for part in group]
    assert torch.equal(torch.cat(again), images)
    (folder / keys[1]).write_bytes(jpeg(smooth(1, (300, 50))))  # its crop has the same shape: not noticed here
    list(source.again(keys, images.shape[1:], BYTES, 3, 0, CPU))
    (folder / keys[1]).write_bytes(b"no image")
    with pytest.raises(InputError, match="changed since the first pass: not an image"):
        list(source.again(keys, images.shape[1:], BYTES, 3, 0, CPU))


@needs_torchcodec
def test_on_a_gpu_files_are_decoded_where_the_transforms_steps_take_tensors(folder: Path) -> None:
    source, plain = open_images(folder, decoder="torchcodec"), open_images(folder)
    gpu = torch.device("cuda", 0)
    assert source.decodes_on(gpu, BYTES)
    assert not source.decodes_on(CPU, BYTES)
    assert not plain.decodes_on(gpu, BYTES)
    assert not source.decodes_on(gpu, lambda picture: PILToTensor()(picture).float())


@needs_torchcodec
@pytest.mark.gpu
def test_a_gpus_pictures_are_pillows_but_for_rounding(folder: Path) -> None:
    gpu = torch.device("cuda", 0)
    _, _, images = batches(folder, "torchcodec", gpu)
    assert images.device == gpu
    assert near(images.cpu(), batches(folder, "pillow")[2], 3.0)
    transform = Compose([Resize(40), CenterCrop(32), ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])
    source = open_images(folder, per_class=4, decoder="torchcodec")
    given = Pixels(source, transform, 3, device=gpu, dtype=torch.float32, workers=0, keep=False)
    first = [inputs.clone() for _, inputs, _ in given.first()]
    assert all(torch.equal(a, b) for (*_, a), b in zip(given.again(), first, strict=True))


@needs_torchcodec
def test_a_run_names_its_decoder_and_another_does_not_go_on_with_it(folder: Path, tmp_path: Path) -> None:
    network, out = demo_network(), tmp_path / "out"
    with pytest.raises(InputError, match="decoder"):
        analyze(network, folder, decoder="nvjpeg")
    analyze(network, folder, decoder="torchcodec", per_class=4, n_init=2, out=out)
    run = json.loads((out / "run.json").read_text())
    assert run["images"]["decoder"] == run["options"]["decoder"] == "torchcodec"
    with pytest.raises(InputError, match="decoder"):
        analyze(network, folder, per_class=4, n_init=2, out=out, resume=True)


def test_without_the_library_it_says_so_and_what_brings_it(tmp_path: Path, monkeypatch) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.delitem(sys.modules, "torchcodec.decoders", raising=False)
    with pytest.raises(UnavailableError, match=r"decoder torchcodec is not installed; pip install 'gpuclust\[torchc"):
        open_images(tmp_path, decoder="torchcodec")


@needs_torchcodec
def test_a_data_set_that_decodes_its_images_has_no_use_for_it() -> None:
    with pytest.raises(InputError, match="decoder torchcodec is for image files"):
        open_images(Pictures(), decoder="torchcodec")


@needs_torchcodec
def test_a_gpus_memory_that_runs_out_is_no_images_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(BYTES), "on_tensor", full)
    with pytest.raises(torch.OutOfMemoryError):
        batches(folder, "torchcodec", CPU)
