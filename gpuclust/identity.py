"""What a result depends on besides options and images, as hashes and versions: how a run knows whether it is the same.

A driver's version is no part of it: kernels are compiled for the card by the libraries that are compared here, and not
by the driver. It is in run.json, for whoever doubts that.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gpuclust.doctor import versions
from gpuclust.kernels import ROOT

# Packages that decode and transform images, run the network, and compute clusters and scores.
_PACKAGES = ("gpuclust", "torch", "torchvision", "pillow", "numpy", "scipy", "scikit-learn")
# Parts of gpuclust that say nothing about results: a page can be written anew by another version of them.
_TELLING = ("__main__.py", "bench", "cli.py", "demo", "doctor.py", "progress.py", "report")
_COMPARED = ("torch", "torchvision")  # packages whose code is known by their version


def of_software(device: torch.device, decoder: str) -> dict[str, str]:
    """Versions, and a hash of gpuclust's own code, which may change in a checkout while its version does not."""
    found = versions()
    return {
        **{name: found[name] for name in (*_PACKAGES, decoder) if name in found},
        "torch": torch.__version__,  # says for which device it was built
        "code": code_hash(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **(
            {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
            if device.type == "cuda"
            else {"cpu": torch.backends.cpu.get_cpu_capability()}
        ),
    }


def of_network(module: nn.Module, transform: Any) -> dict[str, str]:
    """A network's structure and the code of its classes, its tensors' values, and the transform of its images."""
    structure = hashlib.sha256(_described(module).encode())
    for kind in sorted({type(part) for part in module.modules()}, key=_full_name):
        _hash_class(structure, kind)
    own = hashlib.sha256()
    if code := getattr(transform, "__code__", None):
        _hash_code(own, code)
    else:
        _hash_class(own, type(transform))
    return {
        "transform": f"{_described(transform)} with code {own.hexdigest()[:8]}",
        "network": structure.hexdigest(),
        "tensors": _hash_tensors(module),
    }


@cache
def code_hash() -> str:
    """A hash of the sources of gpuclust that bear on results."""
    digest = hashlib.sha256()
    for name, file in _sources():
        digest.update(f"{name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[tuple[str, Path]]:
    package = Path(__file__).parent
    for root in (package, *([] if ROOT.is_relative_to(package) else [ROOT])):
        for file in sorted(root.rglob("*")):
            name = file.relative_to(root)
            if file.suffix in (".py", ".cu", ".cuh") and not (root == package and name.parts[0] in _TELLING):
                yield name.as_posix(), file


def _hash_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if is_lazy(value):  # of a part that no image reaches
            digest.update(name.encode())
        elif isinstance(value, Tensor):
            value = value.detach().dequantize() if value.is_quantized else value.detach()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_class(digest: Any, kind: type) -> None:
    """The functions of a class: compiled, so that neither comments nor a missing source matter."""
    for base in kind.__mro__:
        if base is object or base.__module__.partition(".")[0] in _COMPARED:
            return
        for name, value in sorted(vars(base).items()):
            if code := getattr(getattr(value, "__func__", value), "__code__", None):
                digest.update(name.encode())
                _hash_code(digest, code)


def _hash_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for value in code.co_consts:
        if isinstance(value, CodeType):
            _hash_code(digest, value)
        elif isinstance(value, frozenset):  # in another order in each process
            digest.update(repr(sorted(map(repr, value))).encode())
        else:
            digest.update(repr(value).encode())


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _described(value: Any) -> str:
    """An object as it describes itself, in one line, but for where it is in memory."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(value)).split())
