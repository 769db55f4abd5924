"""Kernels of kernels/cuda run by a processor: compiled with g++ against tests/on_host.hpp, thread for thread."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpuclust.kernels import cuda_folder

HERE = Path(__file__).parent
# Every device from compute capability 8.0 on gives a block that much, whatever less a test says.
LEAST_SHARED_BYTES = 99 << 10
_FLAGS = [
    "-std=c++17",
    "-DON_HOST",
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-w",
]
_LAUNCH = """
#ifndef ON_HOST_HOPPER
#define ON_HOST_HOPPER false
#endif
static void call_KERNEL(void** given) { on_host::launcher(kernel_KERNEL, given); }
extern "C" int launch_KERNEL(unsigned x, unsigned y, unsigned threads, unsigned bytes, unsigned falling, void** given) {
  on_host::launch(call_KERNEL, x, y, threads, bytes, falling, ON_HOST_HOPPER, given);
  return on_host::argument_count(kernel_KERNEL);
}
"""


class HostLauncher:
    """In place of `gpuclust.kernels.launch.Launcher`: the same calls, for tensors in the host's memory.

    Parameters
    ----------
    shared_bytes : int
        Shared memory of a block.
    falling : bool
        Whether the threads run in falling order: what is right only in one order lacks a barrier.
    hopper : bool
        Whether the machine of tests/on_host_hopper.hpp, too, is there.
    """

    def __init__(self, shared_bytes: int = 163 << 10, falling: bool = False, hopper: bool = False) -> None:
        self.shared_bytes, self.falling, self.is_hopper = shared_bytes, falling, hopper
        self.launched: list[str] = []

    def shared_memory_bytes(self, device: torch.device) -> int:
        return self.shared_bytes

    def multiprocessors(self, device: torch.device) -> int:
        return 3

    def hopper(self, device: torch.device) -> bool:
        return self.is_hopper

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
        assert shared_bytes <= max(self.shared_bytes, LEAST_SHARED_BYTES)
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
def _folder() -> Path:
    """Where what is compiled is kept: of all processes of a run of the tests (conftest.py), or of this one."""
    if given := os.environ.get("ON_HOST_BUILT"):
        return Path(given)
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made)
    return Path(made)


def _built(stem: str, arguments: list[str], code: str = "") -> Path:
    """A shared library by g++, compiled once; ``code`` is read where the arguments name ``-``."""
    key = hashlib.sha256(repr((arguments, code)).encode()).hexdigest()[:16]
    made = _folder() / f"{stem}-{key}.so"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}")
        command = ["g++", *_FLAGS, f"-I{HERE}", f"-I{cuda_folder()}", *arguments, "-o", str(unfinished)]
        built = subprocess.run(command, input=code, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        unfinished.replace(made)  # whole or not there, whoever else compiles it
    return made


@cache
def library(file: str, options: tuple[str, ...], extra: str = "") -> ctypes.CDLL:
    """A source of kernels/cuda, compiled with g++; ``extra`` is further C++ after it."""
    source = cuda_folder() / file
    kernels = re.findall(r'extern "C" __global__[^{]*?\b(\w+)\(\s*\n', source.read_text(encoding="utf-8"))
    # Renamed: `select`, for one, is a function of the C library.
    names = [f"#define {name} kernel_{name}" for name in kernels]
    back = [f"#undef {name}" for name in kernels]
    code = ['#include "device.cuh"', *names, f'#include "{file}"', *back]
    code += [_LAUNCH.replace("KERNEL", name) for name in kernels]
    machine = _built("machine", ["-O2", *(str(HERE / part) for part in ("on_host.cpp", "on_host_hopper.cpp"))])
    arguments = ["-O1", *options, "-x", "c++", "-", "-x", "none", str(machine)]
    return ctypes.CDLL(str(_built(source.stem, arguments, "\n".join([*code, extra]))))
