"""Kernels of kernels/cuda run by a processor: compiled with g++ against tests/on_host.hpp, thread for thread."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpuclust.kernels import cuda_folder

HERE = Path(__file__).parent


class HostLauncher:
    """In place of `gpuclust.kernels.launch.Launcher`: the same calls, for tensors in the host's memory.

    Parameters
    ----------
    shared_bytes : int
        Shared memory of a block.
    falling : bool
        Whether the threads run in falling order: what is right only in one order lacks a barrier.
    """

    processors = 2

    def __init__(self, shared_bytes: int = 163 << 10, falling: bool = False) -> None:
        self.shared_bytes, self.falling = shared_bytes, falling
        self.launched: list[str] = []

    def shared_memory_bytes(self, device: torch.device) -> int:
        return self.shared_bytes

    def blocks(self, device: torch.device) -> int:
        return 3

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
        assert shared_bytes <= self.shared_bytes
        assert all(argument.device.type == "cpu" for argument in arguments if isinstance(argument, torch.Tensor))
        self.launched.append(kernel)
        values: list[Any] = [
            ctypes.c_double(argument)
            if isinstance(argument, float)
            else ctypes.c_longlong(argument.data_ptr() if isinstance(argument, torch.Tensor) else argument or 0)
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch = getattr(library(file, options), f"launch_{kernel}")
        assert launch(*map(ctypes.c_uint, (*grid, threads, shared_bytes, self.falling)), pointers) == len(values)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def library(file: str, options: tuple[str, ...], extra: str = "") -> ctypes.CDLL:
    """A source of kernels/cuda, compiled with g++ for this process; ``extra`` is further C++ after it."""
    source = cuda_folder() / file
    kernels = re.findall(r'extern "C" __global__[^{]*?\b(\w+)\(\s*\n', source.read_text(encoding="utf-8"))
    code = ['#define ON_HOST', f'#include "{cuda_folder() / "device.cuh"}"']
    code += [f"#define {name} kernel_{name}" for name in kernels]  # select, for one, is a function of the C library
    code += [f'#include "{source}"'] + [f"#undef {name}" for name in kernels]
    code += [f"""
static void call_{name}(void** given) {{ on_host::launcher(kernel_{name}, given); }}
extern "C" int launch_{name}(unsigned x, unsigned y, unsigned threads, unsigned shared, unsigned falling, void** given) {{
  on_host::launch(call_{name}, x, y, threads, shared, falling, given);
  return on_host::argument_count(kernel_{name});
}}""" for name in kernels]
    stem = Path(_folder().name) / f"{source.stem}{abs(hash((file, options, extra)))}"
    stem.with_suffix(".cpp").write_text("\n".join([*code, extra]), encoding="utf-8")
    built = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", *options]
        + [f"-I{HERE}", f"-I{cuda_folder()}", str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(stem.with_suffix(".so")))
