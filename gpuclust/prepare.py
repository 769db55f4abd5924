"""Setup, made by `prepare`: everything that is settled before the first pass over the images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gpuclust.arithmetic import seeded
from gpuclust.capture.dry import counted_batch, decode_seconds, dry_batch
from gpuclust.capture.images import ImageSource, open_images
from gpuclust.capture.layers import Layer, choose_layers, find_layers
from gpuclust.capture.layout import CONTIGUOUS, find_memory_format
from gpuclust.capture.loader import MAX_WORKERS, default_workers
from gpuclust.capture.memory import Forward, MemoryPlan, Room
from gpuclust.capture.models import Network, load_network, with_usual_transform
from gpuclust.capture.passes import Passes
from gpuclust.capture.pixels import Pixels, pixel_bytes
from gpuclust.capture.planner import make_plan
from gpuclust.capture.reduce import Reduction, parse_reductions
from gpuclust.capture.steps import Capture
from gpuclust.capture.stream import ActivationStream
from gpuclust.capture.trace import unwrap
from gpuclust.cluster import KMeans
from gpuclust.cluster.backends import choose
from gpuclust.cluster.backends.base import Problem
from gpuclust.cluster.sources.inputs import find_device
from gpuclust.config import Options, command_line, environment
from gpuclust.doctor import hardware, versions
from gpuclust.errors import InputError, MemoryLimitError, first_line, is_out_of_memory, users_code
from gpuclust.free import free_bytes, give_back_at_once
from gpuclust.identity import of_network, of_software, summary

# Images of one forward pass, halved until the network's widest activation takes no more than so many bytes. A network's
# rounding depends on it, so it is part of the result: memory never changes it.
BATCH_SIZE, _BATCH_BYTES = {"cpu": 32, "cuda": 128}, {"cpu": 16 << 20, "cuda": 512 << 20}
# What the process takes beside tensors once it runs: stacks of threads, code, what is left of pieces given back.
_RESERVE_BYTES = {"cpu": 24 << 20}
# Of a GPU's memory, what is free once a process with torch is there.
_CARD_SHARE = 0.95
# Options that say how a run goes about it, and nothing about what it finds.
_INDIFFERENT = ("workers", "memory_limit", "device", "spill")


@dataclass(frozen=True)
class Imagined:
    """So many images of so many classes, of the network's own size: enough to plan with."""

    n: int
    classes: tuple[str, ...]

    @property
    def per_class(self) -> int:
        """Images of each class."""
        return self.n // len(self.classes)

    def describe(self) -> dict[str, Any]:
        """What `ImageSource.describe` says of the kind of images."""
        return {"kind": "imagined"}

    def holds_pictures(self) -> bool:
        """They are to be files."""
        return True


@dataclass(frozen=True)
class Setup:
    """A network on its device, its layers chosen and everything that is "auto" decided.

    Attributes
    ----------
    settings : Options
        As they were asked for.
    images : ImageSource
        Or `Imagined`, for a plan.
    network : Network
    layers : list of Layer
        Those to capture, in forward order.
    reductions : dict of str to Reduction
        What is kept of the activations of each, by its name.
    device : torch.device
    dtype, input_dtype : torch.dtype
        Of the stored rows, and of what the network takes.
    clusters, batch_size : int
    memory_format : torch.memory_format
        Of the network's inputs.
    room : Room
        The memory there was before the network came to the device.
    module_bytes : int
        What the network took there.
    forward : Forward
        What a dry batch told.
    example : Tensor
        One image ``(1, c, h, w)`` as the network takes it, on the device.
    widest : int
        Values per image of the network's widest activation.
    """

    settings: Options
    images: Any
    network: Network
    layers: list[Layer]
    reductions: dict[str, Reduction]
    device: torch.device
    dtype: torch.dtype
    input_dtype: torch.dtype
    clusters: int
    batch_size: int
    memory_format: torch.memory_format
    room: Room
    module_bytes: int
    forward: Forward
    example: Tensor
    widest: int

    def plan(self, layers: Sequence[Layer], room: Room | None = None, **changes: Any) -> MemoryPlan:
        """How a run captures and clusters ``layers``; ``changes`` are other arguments of `make_plan`."""
        given: dict[str, Any] = {
            "dtype": self.dtype,
            "device": self.device,
            "clusters": self.clusters,
            "n_init": self.settings.n_init,
            "solver": self.settings.solver,
            "forward": self.forward,
            "module_bytes": self.module_bytes,
            "room": room or self.room,
            "widths": {layer.name: self.reductions[layer.name].values(layer.shape) for layer in layers},
            "reduce_bytes": {layer.name: self._reduce_bytes(layer) for layer in layers},
        }
        return make_plan(self.network.name, layers, self.images.n, **{**given, **changes})

    def _reduce_bytes(self, layer: Layer) -> int:
        itemsize, batch = self.input_dtype.itemsize, min(self.batch_size, self.images.n)
        return self.reductions[layer.name].work_bytes(layer.shape, batch, itemsize, self.device.type)

    def alternatives(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan, with what it would be for half the bytes per value, and for pooled feature maps."""
        others = []
        if self.dtype == torch.float32:
            others.append(("--dtype float16", self.plan(self.layers, dtype=torch.float16)))
        pool = Reduction("avgpool")
        if any(pool.changes(layer.shape) for layer in self.layers) and not self.settings.reduce:
            pooled = {layer.name: pool.values(layer.shape) for layer in self.layers}
            others.append(("--reduce avgpool", self.plan(self.layers, widths=pooled)))
        return replace(plan, others=tuple(others))

    def on_card(self, size: int) -> Setup:
        """The same on a GPU with so many bytes, which need not be there: what a plan needs to know of it."""
        device = torch.device("cuda", 0)
        module, example = unwrap(self.network.module), self.example
        batch_size = self.settings.batch_size or usual_batch(device, self.widest)
        forward = counted_batch(
            module,
            self.layers,
            example,
            min(batch_size, self.images.n),
            widest=self.widest,
            pixel_bytes=self.forward.pixel_bytes,
            decode_s=decode_seconds(self.images.holds_pictures(), MAX_WORKERS),
        )
        values = (*module.parameters(), *module.buffers())
        room = replace(
            self.room, free_bytes=int(size * _CARD_SHARE), host_bytes=free_bytes(torch.device("cpu")), reserve_bytes=0
        )
        return replace(
            self,
            device=device,
            batch_size=batch_size,
            memory_format=CONTIGUOUS,
            room=room,
            forward=forward,
            module_bytes=sum(value.nbytes for value in values),
        )

    def capture(self, thumbs: Callable[[], Any]) -> Capture:
        """What carries out a plan; ``thumbs()`` is a new sequence that can be extended, for the images' thumbnails."""
        pixels = Pixels(
            self.images,
            self.network.transform,
            self.batch_size,
            device=self.device,
            dtype=self.input_dtype,
            workers=self.settings.workers,
            keep=False,
            memory_format=self.memory_format,
        )
        passes = Passes(self.network, pixels, self.settings.seed)
        return Capture(passes, self.dtype, self.reductions, thumbs, self.settings.spill)

    def kmeans(self, clusters: int, memory_limit: int | None = None) -> KMeans:
        """The estimator of every layer."""
        return KMeans(
            clusters,
            n_init=self.settings.n_init,
            max_iter=self.settings.max_iter,
            random_state=self.settings.seed,
            precision=self.settings.precision,
            solver=self.settings.solver,
            backend=self.settings.backend,
            memory_limit=memory_limit,
        )

    def require_kmeans(self) -> None:
        """Nothing if the backend and solver asked for can run; else an error now, and not after the pass.

        Raises
        ------
        UnavailableError
        """
        self.kmeans(1).fit(torch.zeros(1, 1, dtype=self.dtype, device=self.device))
        self.backends()

    def backends(self) -> list[str]:
        """Names of those that cluster the layers.

        Raises
        ------
        UnavailableError
            If the one asked for cannot.
        """
        found = set()
        for layer in self.layers:
            sizes = self.images.n, self.reductions[layer.name].values(layer.shape), self.clusters
            problem = Problem(*sizes, self.dtype, self.device, False, self.settings.n_init)
            found.add(choose(self.settings.backend, problem)[0].name)
        return sorted(found)

    def describe(self, model: Any, data: Any) -> dict[str, Any]:
        """What a report says of the circumstances, for JSON; ``model`` and ``data`` as they were given."""
        command = isinstance(model, str) and isinstance(data, (str, os.PathLike))
        return {
            **({"command": command_line(model, os.fspath(data), self.settings)} if command else {}),
            "options": self.options(),
            "network": {
                "name": self.network.name,
                "weights": self.network.weights,
                "memory_format": _name(self.memory_format),
                "notes": self.network.notes,
            },
            "plan": self.plan(self.layers).describe(),
            "hardware": hardware(str(self.device)),
            "versions": versions(),
            "seeds": dict.fromkeys(("images", "k-means", "chance levels", "silhouette sample"), self.settings.seed),
        }

    def options(self) -> dict[str, Any]:
        """The options as asked for, with what "auto" and the defaults came to."""
        return {
            "model": self.network.name,
            "data": self.images.describe()["data"],
            **asdict(self.settings),
            "clusters": self.clusters,
            "per_class": self.images.per_class,
            "device": str(self.device),
            "memory_limit": self.settings.memory_limit or environment().memory_limit,
            "batch_size": self.batch_size,
        }

    def identity(self) -> dict[str, Any]:
        """All that a result depends on, for JSON: a run can be resumed only with the same."""
        settings = {name: value for name, value in self.options().items() if name not in _INDIFFERENT}
        cuda, backends = self.device.type == "cuda", self.backends()
        return {
            **of_software(self.device, self.settings.decoder, backends),
            **settings,
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "layers": [layer.name for layer in self.layers],
            "backends": backends,
            "memory_format": _name(self.memory_format),
            **of_network(unwrap(self.network.module), self.network.transform),
            "images": self.images.fingerprint(),
            **self._first_image(),
        }

    def _first_image(self) -> dict[str, Any]:
        """What becomes of it: summaries of the network's input and of each layer's activation."""
        found: dict[str, list[float]] = {}
        image = self.example if _shape_is_unknown(self.network, self.images) else _first(self.network, self.images)
        image = image.to(self.device, self.input_dtype).contiguous(memory_format=self.memory_format)
        with (
            ActivationStream(self.network.module, self.layers) as stream,
            users_code(f"{self.network.name} on the first image raised"),
            seeded(self.settings.seed),
        ):
            stream.forward(image, lambda layer, activation: found.update({layer.name: summary(activation)}))
        return {"input": {"image": summary(image)}, "activations": found}


def find_network(model: Any, images: ImageSource | Imagined, settings: Options, *, download: bool = True) -> Network:
    """The network of a run, with a transform if the images need one; see `load_network`."""
    network = load_network(model, settings.weights, seed=settings.seed, download=download)
    return with_usual_transform(network) if network.transform is None and images.holds_pictures() else network


@contextmanager
def prepare(network: Network, images: ImageSource | Imagined, settings: Options) -> Iterator[Setup]:
    """The `Setup` of a run; the network is on its device inside the block, and afterwards as it was before.

    Raises
    ------
    InputError
        For more clusters than images, unknown layers, a network that does not take the images, a ``spill`` that is no
        folder.
    UnavailableError
        If the device is not there.
    """
    if settings.spill and not os.path.isdir(settings.spill):
        raise InputError(f"{settings.spill!r} is no folder: make it, or give another --spill")
    device = find_device(environment().device or "auto" if settings.device == "auto" else settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    limit = settings.memory_limit or environment().memory_limit
    if limit and device.type == "cpu":
        give_back_at_once()
    clusters = settings.clusters or len(images.classes)
    if clusters > images.n:
        raise InputError(
            f"{clusters} clusters were asked for, and there are {images.n} images ({len(images.classes)} classes x "
            f"{images.per_class}): ask for at most that many, or take more images"
        )
    module, example = unwrap(network.module), _example(network, images)
    if any(map(is_lazy, module.parameters())):
        find_in(network, example, settings.seed)  # what gives them their shapes and values
    tensors = [value for value in (*module.parameters(), *module.buffers()) if not is_lazy(value)]
    input_dtype = next((value.dtype for value in tensors if value.is_floating_point()), torch.float32)
    free = free_bytes(device)
    # On a CPU the network is in memory already, and `free` is without it.
    module_bytes = sum(value.nbytes for value in tensors if value.device != device)
    with placed(module, device):
        example = example.to(device, input_dtype)
        found = find_in(network, example, settings.seed)
        layers = choose_layers(found, settings.layers)
        widest = max(layer.values for layer in found)
        batch_size = settings.batch_size or usual_batch(device, widest)
        memory_format = find_memory_format(module, example)
        forward = dry_batch(
            module,
            layers,
            example,
            min(batch_size, images.n),
            name=network.name,
            widest=widest,
            pixel_bytes=pixel_bytes(images, network.transform, example),
            decode_s=decode_seconds(
                images.holds_pictures(), default_workers(images.n) if settings.workers is None else settings.workers
            ),
            memory_format=memory_format,
        )
        room = Room(
            free,
            limit,
            free_bytes(torch.device("cpu")) if device.type == "cuda" else 0,
            shutil.disk_usage(settings.spill).free if settings.spill else 0,
            _RESERVE_BYTES.get(device.type, 0),
        )
        yield Setup(
            settings,
            images,
            network,
            layers,
            parse_reductions(settings.reduce, settings.seed).choose(found),
            device,
            getattr(torch, settings.dtype),
            input_dtype,
            clusters,
            batch_size,
            memory_format,
            room,
            module_bytes,
            forward,
            example,
            widest,
        )


def usual_batch(device: torch.device, widest: int) -> int:
    """Images of a forward pass where nothing else is said, by the values per image of the widest activation."""
    kind = device.type if device.type in BATCH_SIZE else "cuda"
    fitting = max(1, _BATCH_BYTES[kind] // (4 * widest))
    return min(BATCH_SIZE[kind], 1 << (fitting.bit_length() - 1))


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on ``device``; afterwards each parameter, gradient and buffer is the very one that it was.

    Raises
    ------
    InputError
        If it cannot be moved.
    """
    parameters = [
        (part, name, value, value.data, value.grad)
        for part in module.modules()
        for name, value in part._parameters.items()
        if value is not None
    ]
    buffers = [(part, name, value) for part in module.modules() for name, value in part._buffers.items()]
    if all(value.device == device for value in (*module.parameters(), *module.buffers())):
        yield
        return
    try:
        for _, _, value, _, _ in parameters:
            value.grad = None  # stays where it is
        try:
            module.to(device)
        except NotImplementedError as error:  # parameters without values, on the device meta
            raise InputError(f"{type(module).__name__} cannot be moved to {device}: {first_line(error)}") from error
        yield
    finally:
        for part, name, parameter, data, gradient in parameters:
            parameter.data, parameter.grad = data, gradient
            if part._parameters[name] is not parameter:  # a move between unlike devices makes new ones
                setattr(part, name, parameter)  # and not by the dict: recurrent layers keep a list of their own
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


def find_in(network: Network, example: Tensor, seed: int = 0) -> list[Layer]:
    """`find_layers`, a network that does not take the example being an error of one line.

    Random numbers that the network draws (lazy parameters do when they are first used) are from ``seed``.

    Raises
    ------
    InputError
    """
    size, dtype = "x".join(map(str, example.shape[1:])), str(example.dtype).removeprefix("torch.")
    says = f"{network.name} does not take an image of {size} ({dtype}, on {example.device}):"
    with users_code(says), seeded(seed):
        return find_layers(network.module, example)


def _example(network: Network, images: ImageSource | Imagined) -> Tensor:
    """One image ``(1, c, h, w)`` as the network will see it; a data set may hold tensors of any shape."""
    if isinstance(images, Imagined) or not _shape_is_unknown(network, images):
        return torch.zeros(1, *(network.input_shape or (3, 224, 224)))
    return _first(network, images)


def _shape_is_unknown(network: Network, images: ImageSource) -> bool:
    return not network.input_shape or images.describe()["kind"] == "dataset"


def _first(network: Network, images: ImageSource) -> Tensor:
    """The first image of a run ``(1, c, h, w)``."""
    with closing(images.batches(network.transform, 1, 0)) as batches:
        return next(batches).images


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
        decoder=settings.decoder,
    )


def _name(memory_format: torch.memory_format) -> str:
    return str(memory_format).removeprefix("torch.")


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
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            "memory ran out where the plan said that it would do (another process may have taken it): "
            f"{first_line(error)}; take fewer images (--per-class), fewer layers (--layers) or --dtype float16"
        ) from error
