"""Setup: everything that is settled before the first pass over the images."""

from __future__ import annotations

import difflib
import hashlib
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from gpuclust import __version__
from gpuclust.capture.images import ImageSource, open_images
from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.capture.memory import MemoryPlan, free_bytes, make_plan
from gpuclust.capture.models import Network
from gpuclust.capture.trace import unwrap
from gpuclust.cluster.inputs import find_device
from gpuclust.config import Options, environment
from gpuclust.errors import InputError, MemoryLimitError

# Images of one forward pass. A network's rounding depends on it, so it is part of the result, and memory never changes it.
BATCH_SIZE = {"cpu": 32, "cuda": 128}
# Options that say how a run goes about it, and nothing about what it finds.
_INDIFFERENT = ("workers", "memory_limit", "device")


@dataclass(frozen=True)
class Setup:
    """A network on its device, its layers chosen and the memory planned.

    Attributes
    ----------
    network : Network
    layers : list of Layer
        Those to capture, in forward order.
    device : torch.device
    dtype, input_dtype : torch.dtype
        Of the stored rows, and of what the network takes.
    clusters, batch_size : int
    plan : MemoryPlan
    settings : Options
        As they were asked for.
    """

    network: Network
    layers: list[Layer]
    device: torch.device
    dtype: torch.dtype
    input_dtype: torch.dtype
    clusters: int
    batch_size: int
    plan: MemoryPlan
    settings: Options

    def identity(self, images: ImageSource) -> dict[str, Any]:
        """All that a result depends on, for JSON: a run can be resumed only with the same."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _INDIFFERENT}
        return {
            "gpuclust": __version__,
            "torch": torch.__version__,
            **settings,
            "device": self.device.type,
            "clusters": self.clusters,
            "batch_size": self.batch_size,
            "network": self.network.name,
            "parameters": _hash_parameters(unwrap(self.network.module)),
            "layers": [layer.name for layer in self.layers],
            "images": images.fingerprint(),
        }


@contextmanager
def prepare(network: Network, images: ImageSource, settings: Options) -> Iterator[Setup]:
    """The `Setup` of a run; the network is on its device inside the block, and afterwards where it was before.

    Raises
    ------
    InputError
        For more clusters than images, unknown layers, a network on several devices.
    UnavailableError
        If the device is not there.
    """
    device = find_device(environment().device or "auto" if settings.device == "auto" else settings.device)
    clusters = settings.clusters or len(images.classes)
    if clusters > images.n:
        raise InputError(f"clusters is at most the number of images, {images.n}; got {clusters}")
    module = unwrap(network.module)
    home = _find_home(module)
    tensors = [*module.parameters(), *module.buffers()]
    input_dtype = next((value.dtype for value in tensors if value.is_floating_point()), torch.float32)
    module_bytes = sum(value.nbytes for value in tensors)
    try:
        module.to(device)
        example = next(iter(images.batches(network.transform, 1, 0))).images.to(device, input_dtype)
        found = find_layers(module, example)
        layers = choose_layers(found, settings.layers)
        batch_size = settings.batch_size or BATCH_SIZE[device.type]
        dtype = getattr(torch, settings.dtype)
        plan = make_plan(
            network.name,
            layers,
            images.n,
            dtype=dtype,
            device=device,
            clusters=clusters,
            n_init=settings.n_init,
            batch_size=batch_size,
            module_bytes=module_bytes,
            # The network is there already.
            free=free_bytes(device) + module_bytes,
            limit=settings.memory_limit,
            widest=max(layer.values for layer in found),
        )
        yield Setup(network, layers, device, dtype, input_dtype, clusters, batch_size, plan, settings)
    finally:
        if home is not None:
            module.to(home)


def read_options(options: dict[str, Any]) -> Options:
    """`Options` of keyword arguments, as people write them in Python.

    Raises
    ------
    InputError
        For an unknown name, with close ones, and for values out of range.
    """
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known) or known
            raise InputError(f"there is no option {name!r}; close: {', '.join(close)}")
    for name in ("layers", "classes"):
        value = options.get(name)
        if value is not None:
            options = {**options, name: (value,) if isinstance(value, str) else tuple(value)}
    settings = Options(**options)
    return settings if settings.memory_limit else replace(settings, memory_limit=environment().memory_limit)


def find_images(data: Any, settings: Options) -> ImageSource:
    """The images of a run; see `open_images`."""
    return open_images(
        data,
        classes=settings.classes,
        class_level=settings.class_level,
        per_class=settings.per_class,
        seed=settings.seed,
        on_bad_image=settings.on_bad_image,
        max_pixels=settings.max_pixels,
    )


@contextmanager
def in_memory() -> Iterator[None]:
    """Running out of memory inside the block, where the plan did not see it coming, in one clear line.

    Raises
    ------
    MemoryLimitError
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise MemoryLimitError(
            f"the memory ran out, though the plan said it would do (another process may have taken it): {_line(error)}; "
            "layers that are done are kept with --out; take fewer images, fewer layers or --dtype float16"
        ) from error


def start_peak(device: torch.device) -> None:
    """Begin to watch the device's peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The device's peak memory since `start_peak`; on a CPU the process's peak since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _find_home(module: nn.Module) -> torch.device | None:
    """The device of the parameters and buffers; None where there are none."""
    devices = {value.device for value in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise InputError(f"the network lies on several devices ({names}): put it on one with .to(device)")
    return next(iter(devices), None)


def _hash_parameters(module: nn.Module) -> str:
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
