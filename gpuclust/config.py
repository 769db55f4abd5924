"""Every option in one place, and the only reader of the GPUCLUST_* environment variables."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

from gpuclust.errors import InputError

DEVICES = "auto, cpu, cuda or cuda:INDEX"
DTYPES = ("float32", "float16", "bfloat16")
INITS = ("k-means++", "k-means||", "random")
ALGORITHMS = ("lloyd", "elkan", "hartigan-wong")
METRICS = ("euclidean", "cosine")
BACKENDS = ("auto", "cupy", "triton", "cuml", "torch")
SOLVERS = ("auto", "primal", "dual")
PRECISIONS = ("exact", "fast")
DECODERS = ("pillow", "torchcodec")


@dataclass(frozen=True)
class Options:
    """The options of one run, as the command line and `analyze` take them; design of each in `gpuclust run --help`."""

    weights: str = "DEFAULT"
    layers: tuple[str, ...] = ("auto",)
    clusters: int | None = None
    classes: tuple[str, ...] | None = None
    class_level: int | None = None
    per_class: int | None = None
    device: str = "auto"
    backend: str = "auto"
    solver: str = "auto"
    precision: str = "exact"
    dtype: str = "float32"
    memory_limit: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    n_init: int = 10
    max_iter: int = 300
    seed: int = 0
    on_bad_image: str = "skip"
    max_pixels: int = 100_000_000
    spill: str | None = None
    reduce: tuple[str, ...] = ()
    decoder: str = "pillow"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backend", BACKENDS),
            ("solver", SOLVERS),
            ("precision", PRECISIONS),
            ("dtype", DTYPES),
            ("on_bad_image", ("skip", "fail")),
            ("decoder", DECODERS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device is {DEVICES}; got {self.device!r}")
        for name, least in (
            ("clusters", 1),
            ("class_level", 1),
            ("per_class", 1),
            ("memory_limit", 1),
            ("batch_size", 1),
            ("workers", 0),
            ("n_init", 1),
            ("max_iter", 1),
            ("seed", 0),
            ("max_pixels", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name} is a whole number of at least {least}; got {value!r}")


def read_options(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments, each as a person would write it.

    Names may be one text with commas, ``memory_limit`` a text as `parse_bytes` takes it, numbers of any integer type,
    ``device`` a torch.device, ``weights`` a path; None means the default.

    Raises
    ------
    InputError
        For an unknown option, with close names, and for a value that is not allowed.
    """
    known = [field.name for field in fields(Options)]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            from difflib import get_close_matches

            close = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"close: {', '.join(close)}" if close else f"there are {', '.join(known)}"
            raise InputError(f"there is no option {name!r}; {hint}")
        if value is None:
            continue
        if name in ("layers", "classes", "reduce"):
            value = tuple(split_names(value)) if isinstance(value, str) else tuple(map(str, value))
            if name in ("layers", "reduce"):  # each may be several patterns, as on the command line
                value = tuple(pattern for text in value for pattern in split_names(text))
        elif name == "memory_limit" and isinstance(value, str):
            value = parse_bytes(value)
        elif name in ("device", "weights", "spill"):
            value = str(value)
        elif hasattr(value, "__index__") and not isinstance(value, bool):
            value = index(value)
        values[name] = value
    return Options(**values)


def split_names(text: str) -> list[str]:
    """Names between commas; one that holds a comma stands in double quotes."""
    try:
        names = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise InputError(f"names stand in one line, with commas between them; got {text!r}") from error
    return [name.strip() for name in names if name.strip()]


def command_line(model: str, data: str, options: Options) -> str:
    """The command that asks for this run."""
    words = ["gpuclust", "run", data, "--model", model]
    for field in fields(Options):
        value = getattr(options, field.name)
        if value != field.default:
            if isinstance(value, tuple):
                value = ",".join(f'"{name}"' if "," in name else name for name in value)
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Environment:
    """What the GPUCLUST_* environment variables say."""

    device: str | None
    memory_limit: int | None
    chunk_bytes: int | None
    cache: Path | None
    hopper: bool


def environment() -> Environment:
    """Read GPUCLUST_DEVICE, _MEMORY_LIMIT, _CHUNK_BYTES, _CACHE and _HOPPER now."""
    limit, chunk = os.environ.get("GPUCLUST_MEMORY_LIMIT"), os.environ.get("GPUCLUST_CHUNK_BYTES")
    cache = os.environ.get("GPUCLUST_CACHE")
    return Environment(
        device=os.environ.get("GPUCLUST_DEVICE") or None,
        memory_limit=parse_bytes(limit) if limit else None,
        chunk_bytes=parse_bytes(chunk) if chunk else None,
        cache=Path(cache).expanduser() if cache else None,
        hopper=os.environ.get("GPUCLUST_HOPPER") == "1",
    )


_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(text: str | int) -> int:
    """A size as a person writes it (``8GiB``, ``500 MB``, ``1073741824``) in bytes.

    ``K``, ``M``, ``G`` and ``T`` alone are powers of 1024, as ``KiB`` is; ``KB`` is a power of 1000.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS:
        raise InputError(f"a size is a number with B, KiB, MiB, GiB, TiB (or KB, MB, GB, TB), as 8GiB; got {text!r}")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise InputError(f"a size is at least one byte; got {text!r}")
    return size


def show_bytes(size: float) -> str:
    """A number of bytes as a person reads it: ``27.1 GB`` (powers of 1000, as device makers count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
