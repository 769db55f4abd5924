"""What a result depends on besides options and images, as hashes and versions: how a run knows whether it is the same.

A driver's version is no part of it: kernels are compiled for the card by libraries that are compared here (torch's,
NVRTC, Triton), and not by the driver. It is in run.json, for whoever doubts that.
"""

from __future__ import annotations

import hashlib
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
    tensors = dict(module.named_buffers(remove_duplicate=False)) | module.state_dict(keep_vars=True)
    seen = Fingerprint(value for value in (*tensors.values(), *module.parameters()) if isinstance(value, Tensor))
    network = hashlib.sha256(described(module).encode() + seen.of(module)).hexdigest()
    own = seen.of(transform).hex()
    return {
        "transform": f"{described(transform)} with code {own[:8]}",
        "network": network,
        "tensors": _hash_tensors(tensors),
        **{name: version for name, version in sorted(seen.packages.items()) if name not in _PACKAGES},
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


def _hash_tensors(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {type(value).__name__} ".encode())
        if isinstance(value, Tensor):  # and no state of another kind, which a part may have
            digest.update(tensor_hash(value))
    return digest.hexdigest()
