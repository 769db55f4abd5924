"""How a network's inputs and activations lie in memory: its rounding depends on it, so it is the network's and the
device's own, and the rows of a layer hold their values in the order in which these come."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpuclust.arithmetic import full_precision, seeded
from gpuclust.capture.trace import eval_mode, first_tensor
from gpuclust.errors import is_out_of_memory

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
# Relative to the largest value: ways of rounding differ by less, and values in each other's place by more.
_CLOSE = 1e-2


def find_memory_format(module: nn.Module, example: Tensor) -> torch.memory_format:
    """The memory format of `module`'s inputs: channels last where that pays and the network computes the same in it.

    It pays on the CPU, where convolutions keep the format of their input and the library behind them computes in it:
    without it each of them reorders its input and output. On a GPU it has not been measured, and the format stays as it
    is. Where the activations are views that no other format has (``x.view(len(x), -1)``), torch raises, and the
    network's own format is kept.

    Parameters
    ----------
    module
        The network, on its device.
    example
        One image ``(1, c, h, w)`` as it takes it.
    """
    pays = example.device.type == "cpu" and any(isinstance(part, nn.Conv2d) for part in module.modules())
    if not pays or example.ndim != 4:
        return CONTIGUOUS
    with seeded(0):  # two, since some networks squeeze one
        images = torch.rand(2, *example.shape[1:], device=example.device).to(example.dtype)
    expected, found = (
        _output(module, torch.empty_like(images, memory_format=way).copy_(images))
        for way in (CONTIGUOUS, CHANNELS_LAST)
    )
    return CHANNELS_LAST if _same(expected, found) else CONTIGUOUS


def has_channels_last(activation: Tensor) -> bool:
    """Whether an activation ``(b, c, h, w)`` lies channels last and not, as one with c = 1, in both ways."""
    return (
        activation.ndim == 4
        and not activation.is_contiguous()
        and activation.is_contiguous(memory_format=torch.channels_last)
    )


def in_memory_order(activation: Tensor, channels_last: bool) -> Tensor:
    """A view whose order in C is the one in memory: ``(b, h, w, c)`` of an activation ``(b, c, h, w)``.

    It is so whatever the activation's own strides are, so that all rows of a layer have one order. To k-means every
    order is as good, and to bring channels to the front takes three times as long as to copy them as they lie.

    Parameters
    ----------
    activation
        Of a batch, or what a reduction left of it.
    channels_last
        Whether the activations of this layer lie so; see `gpuclust.capture.memory.Forward`.
    """
    return activation.permute(0, 2, 3, 1) if channels_last and activation.ndim == 4 else activation


def _output(module: nn.Module, images: Tensor) -> Tensor | None:
    """What a forward pass ends with; None where it raises."""
    try:
        with eval_mode(module), full_precision(images.device), seeded(0):
            return first_tensor(module(images))
    except Exception as error:  # where it raises in any format, whoever captures its layers says so
        if is_out_of_memory(error):
            raise
        return None


def _same(expected: Tensor | None, found: Tensor | None) -> bool:
    if expected is None or found is None or found.shape != expected.shape or not expected.is_floating_point():
        return False
    largest = expected.abs().nan_to_num(0.0, 0.0).max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=_CLOSE, atol=_CLOSE * largest, equal_nan=True)
