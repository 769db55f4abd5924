"""Transforms as bytes and what they mean: the bits of the transform itself, or the transform as it is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification

from gpuclust.arithmetic import seeded
from gpuclust.capture import transport
from gpuclust.capture.decode import to_rgb
from gpuclust.capture.transport import LookUp, Normalized, as_bytes

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISE = v1.Normalize(MEAN, STD), v2.Normalize(MEAN, STD)

SPLIT = {
    "preset": ImageClassification(crop_size=224),
    "bicubic preset": ImageClassification(crop_size=48, resize_size=50, interpolation=InterpolationMode.BICUBIC),
    "preset without antialias": ImageClassification(crop_size=32, resize_size=40, antialias=False),
    "v1": v1.Compose([v1.Resize(40), v1.CenterCrop(32), v1.ToTensor(), NORMALISE[0]]),
    "v1 bytes": v1.Compose([v1.Resize((40, 24)), v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), NORMALISE[0]]),
    "v1 resized as a tensor": v1.Compose(
        [v1.PILToTensor(), v1.Resize((30, 20)), v1.ConvertImageDtype(torch.float32), NORMALISE[0]]
    ),
    "v1 alone": v1.Compose([v1.Resize((20, 20)), v1.ToTensor()]),
    "grey": v1.Compose([v1.Grayscale(), v1.Resize((28, 28)), v1.ToTensor(), v1.Normalize(0.1307, 0.3081)]),
    "one mean": v1.Compose([v1.Resize((28, 28)), v1.ToTensor(), v1.Normalize(0.5, 0.25)]),
    "in place": v1.Compose([v1.Resize((28, 28)), v1.ToTensor(), v1.Normalize(MEAN, STD, inplace=True)]),
    "random": v1.Compose([v1.RandomResizedCrop(20), v1.RandomHorizontalFlip(), v1.ToTensor(), NORMALISE[0]]),
    "v2": v2.Compose(
        [v2.ToImage(), v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True), NORMALISE[1]]
    ),
    "v2 of a picture": v2.Compose(
        [v2.Resize(40), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    ),
    "v2 twice": v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.uint8, scale=True),
            v2.Resize((24, 31), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            NORMALISE[1],
        ]
    ),
    "without scale": v2.Compose([v2.Resize((24, 31)), v2.ToImage(), v2.ToDtype(torch.float32), NORMALISE[1]]),
    "float16": v2.Compose([v2.Resize((24, 24)), v2.ToImage(), v2.ToDtype(torch.float16, scale=True), NORMALISE[1]]),
    "bigger than the picture": v1.Compose([v1.CenterCrop(500), v1.ToTensor(), NORMALISE[0]]),
}


class Own(v1.Normalize):
    """A subclass of one's own may do anything."""

    def forward(self, tensor):
        return super().forward(tensor).sort().values


WHOLE = {
    "nothing": None,
    "a function": lambda picture: torch.zeros(3, 4, 4),
    "its own step": v1.Compose([v1.Resize((20, 20)), v1.ToTensor(), Own(MEAN, STD)]),
    "lambda": v1.Compose([v1.Lambda(lambda picture: picture.resize((9, 9))), v1.ToTensor()]),
    "resized as floats": v1.Compose([v1.ToTensor(), v1.Resize((20, 20)), NORMALISE[0]]),
    "floats, then resized": v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Resize((9, 9)), v2.ToDtype(torch.float32)]
    ),
    "blurred": v1.Compose([v1.Resize((20, 20)), v1.ToTensor(), v1.GaussianBlur(3)]),
    "a mean per pixel": v1.Compose([v1.Resize((4, 4)), v1.ToTensor(), v1.Normalize(torch.rand(3, 4, 4), STD)]),
    "bytes": v1.Compose([v1.Resize((20, 20)), v1.PILToTensor()]),
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng([width, height])
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return to_rgb(noise if mode == "RGBA" else noise.convert("RGB").convert(mode))


@pytest.mark.filterwarnings("ignore:Anti-alias option")
@pytest.mark.parametrize("name", SPLIT)
def test_the_bits_are_those_of_the_transform_itself(name):
    transform = SPLIT[name]
    split = as_bytes(transform)
    assert split is not None
    assert split.values.shape[1] == 256
    for size in ((640, 427), (33, 500), (224, 224), (7, 9)):
        for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
            image = picture(*size, mode)
            with seeded(1):
                expected = transform(image).float()
            with seeded(1):
                sent = split(image)
            assert (sent.dtype, sent.is_contiguous(), type(sent)) == (torch.uint8, True, torch.Tensor)
            found = torch.full((1, *sent.shape), torch.nan)
            split.floats(CPU, found.dtype)(sent[None], found)
            assert torch.equal(found[0], expected), (size, mode)


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_is_not_known_stays_whole(name):
    assert as_bytes(WHOLE[name]) is None


def test_a_step_that_does_not_do_what_its_name_says_leaves_the_transform_whole(monkeypatch):
    transform = ImageClassification(crop_size=32)
    assert as_bytes(transform) is not None
    forward = ImageClassification.forward
    monkeypatch.setattr(ImageClassification, "forward", lambda self, picture: forward(self, picture).flip(2))
    assert as_bytes(transform) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_input_are_rounded_from_float32(dtype):
    split = as_bytes(SPLIT["v1"])
    sent = torch.stack([split(picture(60 + i, 50)) for i in range(5)])
    exact, found = torch.empty(sent.shape), torch.empty(sent.shape, dtype=dtype)
    split.floats(CPU, exact.dtype)(sent, exact)
    split.floats(CPU, found.dtype)(sent, found)
    assert torch.equal(found, exact.to(dtype))


def test_many_values_are_looked_up_group_by_group(monkeypatch):
    split = as_bytes(SPLIT["v1"])
    sent = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    found = []
    for most in (1, 3 * 3 * 32 * 32, 1 << 30):
        monkeypatch.setattr(transport, "_LOOK_UP", {"cpu": most})
        out = torch.empty(sent.shape)
        LookUp(split.values)(sent, out)
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], split.values[torch.arange(3).view(3, 1, 1), sent.long()])


@pytest.mark.parametrize("name", ["preset", "v1", "grey", "one mean", "in place"])
def test_arithmetic_in_place_of_a_look_up_where_it_has_the_same_bits(name, monkeypatch):
    split = as_bytes(SPLIT[name])
    assert isinstance(split.floats(CPU, torch.float32), Normalized)
    assert isinstance(split.floats(CPU, torch.bfloat16), LookUp)
    sent = torch.randint(0, 256, (3, len(split.values), 20, 30), dtype=torch.uint8)
    found, expected = torch.empty(2, *sent.shape)
    split.floats(CPU, torch.float32)(sent, found)
    LookUp(split.values)(sent, expected)
    assert torch.equal(found, expected)
    normalized = split.floats(CPU, torch.float32)
    for some in (sent, sent[:, :, :7], sent):
        last = torch.empty(some.shape, memory_format=torch.channels_last)
        normalized(some, last)
        assert torch.equal(last, expected[:, :, : some.shape[2]])
    # One last bit of one byte is enough to look up instead.
    assert transport._normalize([NORMALISE[0]], as_bytes(SPLIT["v1"]).values) is not None
    values = as_bytes(SPLIT["v1"]).values.clone()
    values[-1, 200] = values[-1, 200].nextafter(torch.tensor(9.0))
    assert transport._normalize([NORMALISE[0]], values) is None


def test_it_is_known_what_draws_and_what_works_on_pictures():
    flip = v1.Compose([v1.Resize((20, 20)), v1.RandomHorizontalFlip(), v1.ToTensor()])
    assert as_bytes(flip).draws()
    assert as_bytes(flip).on_pictures()
    assert not as_bytes(SPLIT["preset"]).draws()
    assert as_bytes(SPLIT["preset"]).on_pictures()
    assert not as_bytes(SPLIT["v1 resized as a tensor"]).on_pictures()


def test_it_can_be_sent_to_another_process():
    split = pickle.loads(pickle.dumps(as_bytes(SPLIT["preset"])))
    image = picture(300, 300)
    assert torch.equal(split(image), as_bytes(SPLIT["preset"])(image))


@pytest.mark.parametrize("name", ["alexnet", "vit_h_14", "efficientnet_v2_s", "swin_v2_t"])
def test_the_transforms_of_torchvisions_networks_are_known(name):
    for weights in torchvision.models.get_model_weights(name):
        assert as_bytes(weights.transforms()) is not None


def test_timms_usual_transform_is_known():
    data = pytest.importorskip("timm.data")
    transform = data.create_transform((3, 64, 64), is_training=False)
    split = as_bytes(transform)
    assert split is not None
    image = picture(90, 120)
    found = torch.empty(1, 3, 64, 64)
    split.floats(CPU, found.dtype)(split(image)[None], found)
    assert torch.equal(found[0], transform(image))


@pytest.mark.parametrize(
    "option", [{"random_scale_prob": 0.05}, {"random_aspect_prob": 1.0}, {"interpolation": "random"}]
)
def test_a_step_that_draws_from_other_generators_leaves_the_transform_whole(option):
    data = pytest.importorskip("timm.data.transforms")
    from torchvision.transforms import CenterCrop, Compose, Normalize, ToTensor

    def made(**options):
        steps = [data.ResizeKeepRatio(64, **options), CenterCrop(48), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]
        return as_bytes(Compose(steps))

    assert made() is not None
    assert {made(**option) for _ in range(12)} == {None}
