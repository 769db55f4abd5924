"""Launching the kernels of kernels/cuda: CuPy loads what `nvrtc.compile` made; memory and stream are torch's."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch

from gpuclust.config import environment
from gpuclust.kernels import cuda_folder
from gpuclust.kernels.nvrtc import compile

# What a block may have of shared memory without asking for it.
_UNASKED_BYTES = 48 << 10


class Kernel:
    """A kernel on a device, and the dynamic shared memory that its blocks may have by now.

    Parameters
    ----------
    function : cupy.RawKernel
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        # Static and dynamic shared memory count together.
        self._allowed = _UNASKED_BYTES - int(function.shared_size_bytes)

    def __call__(self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: tuple[Any, ...]) -> None:
        if shared_bytes > self._allowed:
            self.function.max_dynamic_shared_size_bytes = shared_bytes
            self._allowed = shared_bytes
        self.function((*grid, 1), (threads, 1, 1), arguments, shared_mem=shared_bytes)


class Launcher:
    """Compiles a kernel for the device when it is first launched, and launches it on torch's current stream.

    What a launch needs of CuPy is kept: a pass has a dozen launches, and the host must be ahead of the device.
    """

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._streams: dict[tuple[int, int], Any] = {}

    def shared_memory_bytes(self, device: torch.device) -> int:
        """The most shared memory that a block can ask for."""
        return int(_properties(device).shared_memory_per_block_optin)

    def multiprocessors(self, device: torch.device) -> int:
        return int(_properties(device).multi_processor_count)

    def hopper(self, device: torch.device) -> bool:
        """Whether to take the products of warpgroups, which only compute capability 9.0 has: GPUCLUST_HOPPER asks."""
        return environment().hopper and torch.cuda.get_device_capability(device) == (9, 0)

    def blocks(self, device: torch.device) -> int:
        """Blocks of a grid that walks through a list whose length only the device knows: enough to fill it."""
        return 4 * self.multiprocessors(device)

    def __call__(
        self,
        device: torch.device,
        file: str,
        options: tuple[str, ...],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        *arguments: torch.Tensor | int | float | None,
    ) -> None:
        """Launch ``kernel`` of a file with a grid of blocks; nothing is waited for.

        Parameters
        ----------
        options : tuple of str
            For the compiler.
        arguments
            Tensors are passed as pointers to their first value, whatever their strides; None as a null pointer; int
            as 64 bits, float as a double.

        Raises
        ------
        CompileError
            When the kernel is first used.
        """
        stream = torch.cuda.current_stream(device)
        index = stream.device_index
        # CuPy and torch have one current device, that of the thread.
        with nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index), self._on(stream):
            self._kernel(index, file, options, kernel)(grid, threads, shared_bytes, tuple(map(_argument, arguments)))

    def _on(self, stream: torch.cuda.Stream) -> Any:
        """The stream as CuPy takes it; it owns nothing, so that another stream of the same address may have it, too."""
        key = stream.device_index, stream.cuda_stream
        if key not in self._streams:
            import cupy

            self._streams[key] = cupy.cuda.Stream.from_external(_Stream(stream))
        return self._streams[key]

    def _kernel(self, device_index: int, file: str, options: tuple[str, ...], name: str) -> Kernel:
        key = device_index, file, options, name
        if key not in self._kernels:
            import cupy

            cubin = compile(cuda_folder() / file, architecture(torch.cuda.get_device_capability(device_index)), options)
            self._kernels[key] = Kernel(cupy.RawModule(path=str(cubin)).get_function(name))
        return self._kernels[key]


@cache
def _properties(device: torch.device) -> Any:
    """Of a device with an index: they stay what they are."""
    return torch.cuda.get_device_properties(device)


class _Stream:
    """A stream of torch as CuPy takes it (CUDA's stream protocol), of versions of torch without that protocol, too."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


def architecture(capability: tuple[int, int]) -> str:
    """What kernels are compiled for: ``sm_80``; with the instructions of just that chip on Hopper, ``sm_90a``."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def _argument(value: torch.Tensor | int | float | None) -> Any:
    if type(value) is int:  # most are, and a launch has some twenty
        return np.int64(value)
    if isinstance(value, float):
        return np.float64(value)
    return np.int64(value.data_ptr() if isinstance(value, torch.Tensor) else value or 0)
