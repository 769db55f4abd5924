"""Pictures as bytes: a transform that ends elementwise, split into what makes bytes and what the bytes mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpuclust.arithmetic import seeded

Transform = Callable[[Image.Image], Tensor]
# Writes the values of images ``(b, c, h, w)`` uint8 into floats of that shape.
Floats = Callable[[Tensor, Tensor], None]

# Steps of `Compose` by the names of their classes, in torchvision (v1 and v2) and timm. A step of any other kind, or a
# subclass of one's own, leaves the transform whole.
_LIBRARIES = ("torchvision.transforms", "timm.data.transforms")
_GEOMETRY = {
    *("Resize", "CenterCrop", "Pad", "Grayscale", "ResizeKeepRatio", "CenterCropOrPad"),
    *("RandomCrop", "RandomResizedCrop", "RandomHorizontalFlip", "RandomVerticalFlip"),
}
_BYTES = {"PILToTensor", "ToImage"}
_CONVERSIONS = {"ConvertImageDtype", "ToDtype"}
# Widths and heights of the pictures that a split is tried on.
_TRIALS = ((300, 260), (97, 411), (24, 24))
# Values that are looked up at a time: what their places take stays in a core's cache.
_LOOK_UP = {"cpu": 1 << 17, "cuda": 1 << 21}


@dataclass(frozen=True)
class ByteTransform:
    """The part of a transform that runs where pictures are decoded: picture -> uint8 tensor ``(c, h, w)``.

    Attributes
    ----------
    steps : sequence of callables
        One after the other, the last of which gives a picture or a uint8 tensor.
    values : Tensor (c, 256) float32
        What the rest of the transform makes of each byte of each channel, by its own arithmetic on the CPU. So a
        device only looks up, and gives the same bits as the transform, whatever its own division rounds to.
    normalize : (Tensor, Tensor), optional
        Mean and deviation (c, 1, 1) float32 of the rest, where ``(byte / 255 - mean) / deviation`` has those bits on
        the CPU, which is faster there.
    """

    steps: Sequence[Callable[[Any], Any]]
    values: Tensor
    normalize: tuple[Tensor, Tensor] | None = None

    def __call__(self, picture: Image.Image) -> Tensor:
        return _bytes(self.steps, picture)

    def on_tensor(self, picture: Tensor) -> Tensor:
        """The same of a picture as a uint8 tensor ``(3, h, w)``, on its device."""
        return _bytes([step for step in self.steps if _name(step) not in _BYTES], picture)

    def takes_tensors(self) -> bool:
        """Whether `on_tensor` gives what the steps give of a picture, up to how scaling rounds."""
        noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        try:
            with seeded(0):
                expected = self(Image.fromarray(noise))
            with seeded(0):
                found = self.on_tensor(torch.from_numpy(noise).permute(2, 0, 1).contiguous())
        except Exception:  # steps for pictures alone
            return False
        return found.shape == expected.shape and float((found.int() - expected.int()).abs().float().mean()) < 2

    def draws(self) -> bool:
        """Whether a step draws random numbers."""
        return any("Random" in _name(step) for step in self.steps)

    def on_pictures(self) -> bool:
        """Whether all steps are those of pictures, but for the last, which may make a tensor of one."""
        return not any(_name(step) in _BYTES for step in self.steps[:-1])

    def floats(self, device: torch.device, dtype: torch.dtype) -> Floats:
        """What gives the bits of the whole transform on a device, rounded to `dtype`."""
        if self.normalize and device.type == "cpu" and dtype == torch.float32:
            return Normalized(*self.normalize)
        return LookUp(self.values.to(device, dtype))


class Normalized:
    """``(byte / 255 - mean) / deviation`` in float32 on the CPU; both are ``(c, 1, 1)``."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean, self.deviation = mean, deviation
        self._image = torch.empty(0)

    def __call__(self, images: Tensor, out: Tensor) -> None:
        """Write the values of `images` ``(b, c, h, w)`` uint8 into `out`."""
        for image, into in zip(images, out, strict=True):  # one at a time stays in a core's cache
            # Where channels are last, each step but the copy would take three times as long.
            made = into if into.is_contiguous() else self._contiguous(into.shape)
            made.copy_(image).div_(255).sub_(self.mean).div_(self.deviation)
            if made is not into:
                into.copy_(made)

    def _contiguous(self, shape: torch.Size) -> Tensor:
        if self._image.shape != shape:
            self._image = torch.empty(shape)
        return self._image


class LookUp:
    """The values of bytes, on the device and of the type of `values` ``(c, 256)``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._offsets = 256 * torch.arange(len(values), device=values.device).view(-1, 1, 1)
        self._places = torch.empty(0, dtype=torch.int64, device=values.device)

    def __call__(self, images: Tensor, out: Tensor) -> None:
        """Write the values of `images` ``(b, c, h, w)`` uint8 into `out`."""
        # No step makes a tensor of its own: their holes in memory would add up over the batches of a pass.
        group = max(1, _LOOK_UP.get(out.device.type, 1 << 21) // images[0].numel())
        if self._places.shape[1:] != images.shape[1:] or len(self._places) < min(group, len(images)):
            self._places = self._places.new_empty(min(group, len(images)), *images.shape[1:])
        for some, into in zip(images.split(group), out.split(group), strict=True):
            places = self._places[: len(some)].copy_(some).add_(self._offsets)
            torch.take(self.values, places, out=into)


def look_up_bytes(kind: str) -> int:
    """What a `LookUp` holds on a device of this kind for the places of values, at most."""
    return 8 * _LOOK_UP.get(kind, 1 << 21)


def as_bytes(transform: Transform | None) -> ByteTransform | None:
    """The transform split where bytes become floats, if it is known to be elementwise from there on; else None.

    Known are torchvision's presets for classification and `Compose` of torchvision's or timm's usual steps. Whatever
    they are made of, a split counts only if it gives the bits of the transform itself for pictures of noise.
    """
    split = _preset(transform) or _composed(transform)
    if transform is None or split is None:
        return None
    steps, rest = split
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say is said when the user's pictures come
            values = _values(steps, rest)
            found = ByteTransform(steps, values, _normalize(rest, values))
            return found if all(_same(transform, found, size) for size in _TRIALS) else None
    except Exception:  # a transform that raises here is left to say so on a picture of the user's
        return None


def _preset(transform: Any) -> tuple[list[Any], list[Any]] | None:
    kind = type(transform)
    if (kind.__module__, kind.__name__) != ("torchvision.transforms._presets", "ImageClassification"):
        return None
    from torchvision.transforms import CenterCrop, Compose, ConvertImageDtype, Normalize, PILToTensor, Resize

    resize = Resize(transform.resize_size, transform.interpolation, antialias=transform.antialias)
    rest = [ConvertImageDtype(torch.float32), Normalize(transform.mean, transform.std)]
    return _composed(Compose([resize, CenterCrop(transform.crop_size), PILToTensor(), *rest]))


def _composed(transform: Any) -> tuple[list[Any], list[Any]] | None:
    """The steps up to bytes and those from bytes on."""
    if _name(transform) != "Compose":
        return None
    steps = list(transform.transforms)
    names = [_name(step) for step in steps]
    floats = [_makes_floats(step) for step in steps]
    if True not in floats:
        return None
    at = floats.index(True)
    either = _CONVERSIONS | {"ToPureTensor"}
    known = set(names[:at]) <= _GEOMETRY | _BYTES | either and set(names[at + 1 :]) <= {"Normalize"} | either
    return (steps[:at], steps[at:]) if known and not any(map(_draws_elsewhere, steps)) else None


def _draws_elsewhere(step: Any) -> bool:
    """Whether a step of timm's draws from Python's generator, which its options may have it do under any name."""
    chances = any(getattr(step, f"random_{what}_prob", 0) for what in ("scale", "aspect"))
    return chances or isinstance(getattr(step, "interpolation", None), tuple | list)


def _makes_floats(step: Any) -> bool:
    conversion = _name(step) in _CONVERSIONS and step.dtype != torch.uint8
    return conversion or _name(step) in ("ToTensor", "MaybeToTensor")


def _name(step: Any) -> str:
    """The name of a step's class where it is one of the libraries' own."""
    kind = type(step)
    return kind.__name__ if kind.__module__.startswith(_LIBRARIES) else ""


def _bytes(steps: Sequence[Callable[[Any], Any]], picture: Image.Image | Tensor) -> Tensor:
    image: Any = picture
    for step in steps:
        if isinstance(image, Image.Image) and _name(step) in _BYTES and step is steps[-1]:
            break  # what follows does the same
        image = step(image)
    if isinstance(image, Tensor):
        image = image.as_subclass(Tensor)
    else:
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # NumPy's copy takes a third of torch's time
    if image.dtype != torch.uint8:
        raise TypeError(f"bytes were expected of the transform before it makes floats; got {image.dtype}")
    return image.contiguous()


def _values(steps: Sequence[Any], rest: Sequence[Any]) -> Tensor:
    """What the rest of a transform makes of each byte, one picture of 256 pixels being all bytes."""
    image: Any = Image.new("RGB", (8, 8))
    for step in steps:
        image = step(image)
    if isinstance(image, Tensor):
        image = torch.arange(256, dtype=torch.uint8).expand(len(image), 1, 256).contiguous()
    else:
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        image = Image.merge(image.mode, [ramp] * len(image.getbands()))
    for step in rest:
        image = step(image)
    values: Tensor = image.as_subclass(Tensor).float()
    return values.reshape(len(values), 256).contiguous()


def _normalize(rest: Sequence[Any], values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of the rest of a transform, if arithmetic with them gives its values to the bit."""
    steps = [step for step in rest if _name(step) == "Normalize"]
    if len(steps) != 1:
        return None
    mean, deviation = (
        torch.as_tensor(given, dtype=torch.float32).reshape(-1, 1, 1) for given in (steps[0].mean, steps[0].std)
    )
    found = torch.empty(1, len(values), 1, 256)
    Normalized(mean, deviation)(torch.arange(256, dtype=torch.uint8).expand(found.shape), found)
    return (mean, deviation) if torch.equal(found.view_as(values), values) else None


def _same(transform: Transform, split: ByteTransform, size: tuple[int, int]) -> bool:
    """Whether a split gives the bits of the transform for a picture of noise, random steps drawing the same."""
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    with seeded(0):
        expected = transform(picture).as_subclass(Tensor).float()
    with seeded(0):
        images = split(picture)[None]
    found = torch.empty(images.shape)
    split.floats(found.device, found.dtype)(images, found)
    return torch.equal(found[0], expected)
