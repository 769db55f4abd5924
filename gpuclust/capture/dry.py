"""A dry batch: what a forward pass holds at its peak and how long it takes, measured before any image is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpuclust.arithmetic import seeded
from gpuclust.capture.layers import Layer
from gpuclust.capture.layout import CONTIGUOUS, has_channels_last
from gpuclust.capture.memory import Forward
from gpuclust.capture.pixels import staged_bytes
from gpuclust.capture.stream import ActivationStream
from gpuclust.errors import users_code
from gpuclust.free import give_back
from gpuclust.peak import PeakMemory

# Seconds for reading, decoding and resizing one picture of usual size in one process, and for reading a tensor.
_PICTURE_S, _TENSOR_S = 0.012, 0.0005
# Operations per second of convolutions in full float32, as one H100 does them.
FLOPS = 30e12
# Where it cannot be measured: a layer's input, its output and a convolution's own workspace.
_FORWARD_COPIES = 3


def dry_batch(
    module: nn.Module,
    layers: Sequence[Layer],
    example: Tensor,
    batch_size: int,
    *,
    name: str,
    widest: int,
    pixel_bytes: int,
    decode_s: float,
    memory_format: torch.memory_format = CONTIGUOUS,
) -> Forward:
    """Run the network on a batch of random numbers, twice: the second time is measured.

    Parameters
    ----------
    module, layers
        The network on its device, and what will be captured.
    example
        One image ``(1, c, h, w)`` as the network takes it, on the device.
    name
        The network's, for messages.
    widest
        Values per image of the network's widest activation.
    pixel_bytes
        Of one image between passes.
    decode_s
        Seconds for reading and decoding one image.
    memory_format
        Of the batch.
    """
    device, reach, peaks, last = example.device, dict[str, float](), dict[str, int](), set[str]()
    images = batch_size * example[0].numel() * example.element_size()
    staged = staged_bytes(batch_size, pixel_bytes, device.type)

    def run(watched: PeakMemory | None = None) -> float:
        started = time.perf_counter()

        def arrive(layer: Layer, activation: Tensor) -> None:
            _wait(device)
            reach[layer.name] = time.perf_counter() - started
            if watched and (held := watched.peak_bytes()):
                peaks[layer.name] = max(held, images) + staged
            if has_channels_last(activation):
                last.add(layer.name)

        with ActivationStream(module, layers) as stream, seeded(0):
            shape = (batch_size, *example.shape[1:])
            batch = torch.empty(shape, dtype=example.dtype, device=device, memory_format=memory_format).uniform_()
            with users_code(f"{name} on {batch_size} images raised"):
                stream.forward(batch, arrive)
        _wait(device)
        return time.perf_counter() - started

    run()  # compiles what is compiled at first use
    watched = PeakMemory(device, by_torch=True)
    seconds = run(watched)
    held = watched.peak_bytes() or _FORWARD_COPIES * batch_size * widest * 4 + images
    give_back(device)
    return Forward(
        batch_size,
        max(held, images) + staged,
        seconds,
        {layer: at / seconds for layer, at in reach.items()},
        pixel_bytes,
        decode_s,
        images + staged,
        peaks,
        frozenset(last),
    )


def decode_seconds(pictures: bool, workers: int) -> float:
    """What reading and decoding one image takes with so many processes at it (0: this one): a guess."""
    return (_PICTURE_S if pictures else _TENSOR_S) / max(1, workers)


def counted_batch(
    module: nn.Module,
    layers: Sequence[Layer],
    example: Tensor,
    batch_size: int,
    *,
    widest: int,
    pixel_bytes: int,
    decode_s: float,
) -> Forward:
    """What a batch would take on a GPU that is not there, from the operations of one image and its widest activation.

    The seconds are those of a datacenter GPU in full float32: `FLOPS`.
    """
    reach: dict[str, float] = {}
    with FlopCounterMode(display=False) as counter, ActivationStream(module, layers) as stream, seeded(0):
        stream.forward(example[:1], lambda layer, _: reach.__setitem__(layer.name, float(counter.get_total_flops())))
    flops = max(1.0, float(counter.get_total_flops()))
    images = batch_size * example[0].numel() * example.element_size() + staged_bytes(batch_size, pixel_bytes, "cuda")
    return Forward(
        batch_size,
        _FORWARD_COPIES * batch_size * widest * 4 + images,
        batch_size * flops / FLOPS,
        {layer: at / flops for layer, at in reach.items()},
        pixel_bytes,
        decode_s,
        images,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
