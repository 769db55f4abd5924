"""Who is measured: what every adapter has, and the list of them. The adapters are in `ours`, `peers_cpu`, `peers_gpu`.

An adapter runs k-means as its own documentation advises, from given centroids and for a given number of iterations, so
that all do the same work. What a user does once, such as moving rows to where the library takes them, is done before
the time begins; labels and centroids as a user gets them are inside it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import torch

from gpuclust.bench.case import Case
from gpuclust.errors import InputError, first_line

OPS = ("assign", "update", "iteration", "fit", "seed")


@dataclass(frozen=True)
class Found:
    """What a call found: centroids (k, d), labels (n,), iterations made, share of re-checked labels."""

    centroids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    n_iter: int | None = None
    recheck_share: float | None = None


@dataclass(frozen=True)
class Work:
    """A call that is timed, and how to read what it returned, which is not: one `Found` for each restart."""

    call: Callable[[], Any]
    read: Callable[[Any], list[Found]]


class Stored:
    """The rows (n, d) of one problem, as stored on the device; on the host they are made when first wanted."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @cached_property
    def host(self) -> torch.Tensor:
        return self.x.cpu()

    @cached_property
    def array(self) -> np.ndarray:
        """float32 (NumPy has no bfloat16, and libraries that take arrays take no float16)."""
        return self.host.float().numpy()


class Peer:
    """One implementation of k-means.

    Attributes
    ----------
    name : str
    distributions : tuple of str
        Names of the package that is installed; empty for what always is.
    module : str
        What is imported.
    x_at : {"device", "host"}
        Where the rows are that it is given.
    note : str
        What a reader of its rows must know.
    exact : bool
        Whether a wrong label is a fault.
    ops : tuple of str
        What it takes part in.
    torch_memory : bool
        Whether it uses a GPU through torch: torch's allocator and torch's current stream.
    """

    name = ""
    distributions: tuple[str, ...] = ()
    module = ""
    x_at = "device"
    note = ""
    exact = False
    ops: tuple[str, ...] = OPS
    torch_memory = True

    def unavailable(self, device: torch.device) -> str | None:
        """None if it can run on this machine, else the reason why not."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.name} is not installed"
        if self.module:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # whatever a library does when it is imported, others are still measured
                return f"{self.module} does not import: {type(error).__name__}: {first_line(error)}"
        return None

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """None if it can solve the case, else the reason why not."""
        return None

    def version(self) -> str | None:
        """The version of its package."""
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work | None:
        """Whole fits from ``starts`` (r, k, d), of so many iterations each; None: it has no such call."""
        return None

    def fit_batch(self, x: torch.Tensor, starts: torch.Tensor, iterations: int) -> Work | None:
        """Problems ``x`` (b, n, d) in one call, from ``starts`` (b, k, d), one `Found` each; None: one by one."""
        return None

    def assign(self, rows: Stored, start: torch.Tensor) -> Work | None:
        """The nearest of the centroids ``start`` (k, d) for each row."""
        return None

    def update(self, rows: Stored, labels: torch.Tensor, start: torch.Tensor) -> Work | None:
        """Centroids (k, d) that are the means of the rows with each of the labels (n,); ``start`` where none has it."""
        return None

    def seed(self, rows: Stored, k: int, seed: int) -> Work | None:
        """Centroids (k, d) to start from, by k-means++ or what comes closest."""
        return None


def each(one: Callable[[torch.Tensor], Any], starts: torch.Tensor, read: Callable[[Any], Found]) -> Work:
    """A fit of one restart, once for each of ``starts``: for a library that takes one array of centroids."""
    return Work(lambda: [one(start) for start in starts], lambda results: [read(result) for result in results])


def all_peers() -> list[Peer]:
    """Every peer, installed or not."""
    from gpuclust.bench.peers_cpu import FaissCpu, FastKMeans, PlainTorch, ScikitLearn
    from gpuclust.bench.peers_gpu import CuML, FaissGpu, FlashKMeans, FlashLib

    return [PlainTorch(), ScikitLearn(), FaissCpu(), FastKMeans(), FaissGpu(), FlashKMeans(), FlashLib(), CuML()]


def choose_peers(names: str) -> list[Peer]:
    """Peers by name: "all", "none", or names with commas between them.

    Raises
    ------
    InputError
        For a name that no peer has.
    """
    peers = all_peers()
    if names in ("all", "none"):
        return peers if names == "all" else []
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [peer.name for peer in peers]
    for name in wanted:
        if name not in known:
            raise InputError(f"--peers is all, none, or some of {', '.join(known)}; got {name!r}")
    return [peer for peer in peers if peer.name in wanted]


def choose_ops(names: str | Sequence[str]) -> list[str]:
    """Operations by name, in the order in which they are measured.

    Raises
    ------
    InputError
        For none, or a name that no operation has.
    """
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    wanted = [name for name in wanted if name]
    for name in wanted:
        if name not in OPS:
            raise InputError(f"--ops is some of {', '.join(OPS)}; got {name!r}")
    if not wanted:
        raise InputError(f"--ops is some of {', '.join(OPS)}; got none")
    return [op for op in OPS if op in wanted]
