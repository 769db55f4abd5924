"""Where the kernels are: their sources stand at the top of the checkout, in ``kernels/``, and inside this package in a
wheel. Whatever the installation, ``gpuclust.kernels.triton.assign`` is kernels/triton/assign.py."""

from __future__ import annotations

from pathlib import Path

_OWN = Path(__file__).resolve().parent
# A wheel has them beside this file; an editable installation and a bare checkout two folders up.
ROOT = _OWN if (_OWN / "cuda").is_dir() or (_OWN / "triton").is_dir() else _OWN.parents[1] / "kernels"
__path__.append(str(ROOT))


def cuda_folder() -> Path:
    """The folder of the CUDA C++ sources: a real path, for the compiler's -I."""
    return ROOT / "cuda"
