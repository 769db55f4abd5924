"""What a result depends on besides options and images, as hashes and versions: how a run knows whether it is the same.

Code is compared as such. What it does with values (numbers that a transform closes over, attributes of a module, a
hook) is seen in what becomes of the first image, which may differ by what rounds in another way, and no more.

A driver's version is no part of it: kernels are compiled for the card by libraries that are compared here (torch's,
NVRTC, Triton), and not by the driver. It is in run.json, for whoever doubts that.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpuclust.config import environment
from gpuclust.doctor import versions
from gpuclust.fingerprint import Fingerprint, described, tensor_hash
from gpuclust.kernels import ROOT, nvrtc

# Packages that decode and transform images, run the network, and compute clusters and scores.
_PACKAGES = ("gpuclust", "torch", "torchvision", "pillow", "numpy", "scipy", "scikit-learn")
# What activations may differ by, as a share of their norm, where sums are in another order: at least.
_ROUNDING = 1e-5
# Parts of gpuclust that say nothing about results: a page can be written anew by another version of them.
_TELLING = ("__main__.py", "bench", "cli.py", "demo", "doctor.py", "progress.py", "report")


def of_software(device: torch.device, decoder: str, backends: Sequence[str]) -> dict[str, str]:
    """Versions, and a hash of gpuclust's own code, which may change in a checkout while its version does not.

    Parameters
    ----------
    device : torch.device
    decoder : str
    backends : sequence of str
        Names of those that cluster the layers.
    """
    found = versions()
    kernels = {"nvrtc": nvrtc.compiler(), "GPUCLUST_HOPPER": str(environment().hopper)} if "cupy" in backends else {}
    return {
        **{name: found[name] for name in (*_PACKAGES, decoder, *backends) if name in found},
        **kernels,
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
    """A network's structure and code, its tensors' values, and the transform of its images, as `Fingerprint` sees them.

    And the versions of the packages that they are from, by name.
    """
    tensors = dict(module.named_buffers(remove_duplicate=False)) | module.state_dict()
    seen = Fingerprint()
    network = hashlib.sha256(described(module).encode() + seen.of(module)).hexdigest()
    own = seen.of(transform).hex()
    return {
        "transform": f"{described(transform)} with code {own[:8]}",
        "network": network,
        "tensors": _hash_tensors(tensors),
        **{name: version for name, version in sorted(seen.packages.items()) if name not in _PACKAGES},
    }


def summary(values: Tensor) -> list[float]:
    """What `alike` compares of activations: norm, a sum that tells where they stand, and what rounding may do."""
    norm2, weighted, start = 0.0, 0.0, 0
    values = values.dequantize() if values.is_quantized else values
    for part in values.flatten().split(1 << 16):
        part = part.to("cpu", torch.float64)
        norm2 += float(part @ part)
        weighted += float(part @ torch.arange(start, start + len(part), dtype=torch.float64).cos_())
        start += len(part)
    eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    return [math.sqrt(norm2), weighted, math.sqrt(norm2) * max(_ROUNDING, 16 * eps)]


def alike(before: dict[str, list[float]] | None, now: dict[str, list[float]] | None) -> bool:
    """Whether summaries by the names of layers are of the same activations, but for rounding."""
    if not before or not now or before.keys() != now.keys():
        return before == now
    pairs = [(*pair, now[name][2]) for name in now for pair in zip(before[name], now[name], strict=True)]
    return all(repr(one) == repr(other) or abs(one - other) <= bound for one, other, bound in pairs)


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


def _hash_tensors(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {type(value).__name__} ".encode())
        if isinstance(value, Tensor):  # and no state of another kind, which a part may have
            digest.update(tensor_hash(value))
    return digest.hexdigest()
