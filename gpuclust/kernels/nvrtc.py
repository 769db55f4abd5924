"""CUDA C++ to machine code with NVRTC, on machines with a GPU and without: one way of compiling for tests and for use.

The cache's key covers the compiler, the flags, the architecture, the source and every file of its folder that it
includes. A file of the cache is written under another name and then renamed, so that it is whole or not there.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from gpuclust.config import environment
from gpuclust.errors import GpuclustError

# Float32 subnormals are kept (no -ftz), divisions and roots are exact: what a kernel computes is in its source.
FLAGS = ("--std=c++17", "--ptxas-options=-v", "--fmad=false")
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class CompileError(GpuclustError):
    """A kernel does not compile; the message holds the compiler's log."""


def compile(file: Path, arch: str, options: Sequence[str] = ()) -> Path:
    """The cubin of a source for an architecture, from the cache where it has one.

    Parameters
    ----------
    file : Path
        A ``.cu`` file; files that it includes are looked for in its folder.
    arch : str
        As ``sm_90a``.
    options : sequence of str
        Further options of NVRTC, as ``-DROW=float``.

    Raises
    ------
    CompileError
        With the compiler's log.
    """
    target = cache_folder() / f"{file.stem}-{arch}-{_key(file, arch, options)}.cubin"
    if not target.exists():
        cubin, _ = build(file, arch, options)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as unfinished:
            try:
                unfinished.write(cubin)
                unfinished.close()
                os.replace(unfinished.name, target)
            except BaseException:
                os.unlink(unfinished.name)
                raise
    return target


def build(file: Path, arch: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Compile without the cache: the cubin, and the compiler's log with what each kernel uses (registers, spills).

    Raises
    ------
    CompileError
        With the compiler's log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(file.read_text(encoding="utf-8"), str(file), [], [])
    try:
        flags = [f"--gpu-architecture={arch}", f"-I{file.parent}", *FLAGS, *options]
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            raise CompileError(
                f"{file.name} does not compile for {arch} ({error}); NVRTC {compiler()} says:\n"
                f"{nvrtc.getProgramLog(program)}"
            ) from error
        return _whole(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """The ELF file that NVRTC made: CuPy 14 takes its last byte away, as if it were the zero that ends a text."""
    first, size, count = struct.unpack_from("<Q", cubin, 32)[0], *struct.unpack_from("<HH", cubin, 54)
    missing = first + size * count - len(cubin)
    return cubin + b"\0" if missing == 1 else cubin


@cache
def compiler() -> str:
    """Version of NVRTC, as ``13.0``."""
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def cache_folder() -> Path:
    """Where compiled kernels are kept: GPUCLUST_CACHE, else a folder of the user's caches."""
    chosen = environment().cache
    if chosen is not None:
        return chosen
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuclust"


def sources(file: Path) -> list[Path]:
    """A source and all that it includes from its folder, directly or not, sorted."""
    found, waiting = set[Path](), [file]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            named = (one.parent / name.decode() for name in _INCLUDE.findall(one.read_bytes()))
            waiting += [path for path in named if path.is_file()]
    return sorted(found)


def _key(file: Path, arch: str, options: Sequence[str]) -> str:
    key = hashlib.sha256(repr((compiler(), arch, FLAGS, tuple(options))).encode())
    for path in sources(file):
        content = path.read_bytes()
        key.update(f"{path.name} {len(content)}\n".encode())
        key.update(content)
    return key.hexdigest()[:32]
