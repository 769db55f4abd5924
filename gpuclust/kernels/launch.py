"""Launching the kernels of kernels/cuda: CuPy loads what `nvrtc.compile` made; memory and stream are torch's."""

from __future__ import annotations

from typing import Any

import torch

from gpuclust.kernels import cuda_folder
from gpuclust.kernels.nvrtc import compile

# What a block may have of shared memory without asking for it.
_UNASKED_BYTES = 48 << 10


class Launcher:
    """Compiles a kernel for the device when it is first launched, and launches it on torch's current stream."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Any] = {}

    def shared_memory_bytes(self, device: torch.device) -> int:
        """The most shared memory that a block can ask for."""
        properties: Any = torch.cuda.get_device_properties(device)
        return int(properties.shared_memory_per_block_optin)

    def multiprocessors(self, device: torch.device) -> int:
        return int(torch.cuda.get_device_properties(device).multi_processor_count)

    def hopper(self, device: torch.device) -> bool:
        """Whether it has the products of warpgroups, which only compute capability 9.0 has."""
        return torch.cuda.get_device_capability(device) == (9, 0)

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
        import cupy

        stream = torch.cuda.current_stream(device)
        index = stream.device_index
        with cupy.cuda.Device(index), cupy.cuda.Stream.from_external(_Stream(stream)):
            function = self._kernel(index, file, options, kernel)
            if shared_bytes > _UNASKED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            function((*grid, 1), (threads, 1, 1), tuple(map(_argument, arguments)), shared_mem=shared_bytes)

    def _kernel(self, device_index: int, file: str, options: tuple[str, ...], name: str) -> Any:
        key = device_index, file, options, name
        if key not in self._kernels:
            import cupy

            cubin = compile(cuda_folder() / file, architecture(torch.cuda.get_device_capability(device_index)), options)
            self._kernels[key] = cupy.RawModule(path=str(cubin)).get_function(name)
        return self._kernels[key]


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
    import numpy as np

    if isinstance(value, float):
        return np.float64(value)
    return np.int64(value.data_ptr() if isinstance(value, torch.Tensor) else value or 0)
