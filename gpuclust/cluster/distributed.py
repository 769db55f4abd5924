"""Several processes, one fit: each holds a contiguous block of the rows, and all end with the bits that one would find.

Nothing is distributed because a process group happens to exist: a fit is shared where its rows say so, with `shared`.
What travels is small and exact: sums without rounding (`gpuclust.cluster.sums`), largest values, whole numbers, the
rows that seeding chose and those that fill empty clusters. So no order in which processes add changes anything.

An error of one process is raised in all of them, by `in_all` where they read and check what they were given, and by
`heard` in the rest of a fit. A process that dies or is interrupted leaves the others waiting until the timeout of their
process group, unless somebody ends them, as torchrun does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gpuclust.errors import GpuclustError, InputError, UnavailableError, first_line


class Group(Protocol):
    """The processes that share a fit. All of them make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The sum, or with ``op`` "max" the elementwise largest, of all processes' ``tensor``, which is not written.

        Sums are exact, so the order in which processes add is no matter.
        """
        ...

    def gather(self, item: Any) -> list[Any]:
        """The small picklable thing that each process gives, in the order of the ranks."""
        ...


class OneProcess:
    """The group of a process that works alone."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """``tensor`` itself: there is nobody to add to."""
        return tensor

    def gather(self, item: Any) -> list[Any]:
        return [item]


class TorchGroup:
    """The processes of a process group of torch.distributed: gloo for rows on the CPU, nccl for rows on CUDA.

    Parameters
    ----------
    processes : torch.distributed.ProcessGroup or None
        The default group by default. It is neither made nor destroyed here.

    Raises
    ------
    UnavailableError
        Where there is none, or where this process does not belong to it.
    """

    def __init__(self, processes: Any = None) -> None:
        import torch.distributed as distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise UnavailableError(
                "rows can be shared only between processes that know each other: call "
                "torch.distributed.init_process_group first (torchrun starts the processes)"
            )
        self._distributed, self._processes = distributed, processes
        self.rank, self.size = distributed.get_rank(processes), distributed.get_world_size(processes)
        if self.rank < 0:
            raise UnavailableError("this process does not belong to the process group that it was given")

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        kind = {"sum": self._distributed.ReduceOp.SUM, "max": self._distributed.ReduceOp.MAX}[op]
        self._distributed.all_reduce(result, kind, self._processes)
        return result

    def gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.size
        self._distributed.all_gather_object(items, item, self._processes)
        return items


@dataclass(frozen=True)
class Block:
    """Which of the rows a process holds; the blocks of all processes, in the order of their ranks, are the rows.

    Attributes
    ----------
    group : Group
    first : int
        The number of this process's first row among the rows of all.
    here : int
        The number of this process's rows.
    n : int
        The number of rows of all.
    most : int
        The largest number of rows of a process.
    """

    group: Group
    first: int
    here: int
    n: int
    most: int

    @classmethod
    def of(cls, rows: int, group: Group) -> Block:
        """The block of a process that holds so many rows.

        Raises
        ------
        InputError
            In all processes, where one has no rows.
        """
        counts = group.gather(rows)
        if 0 in counts:
            raise InputError(
                f"process {counts.index(0)} of {group.size} holds no rows: each needs one at least; got {counts}"
            )
        return cls(group, sum(counts[: group.rank]), rows, sum(counts), max(counts))

    @classmethod
    def alone(cls, rows: int) -> Block:
        """The block of a process that holds all of so many rows."""
        return cls(OneProcess(), 0, rows, rows, rows)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(tensor)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(tensor, "max")

    def place(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows with these numbers among all are here, bool (m,), and the numbers that these have here."""
        local = index - self.first
        here = (local >= 0) & (local < self.here)
        return here, local[here]

    def find(self, heaps: torch.Tensor, targets: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The number, among all rows, of the row in whose share of the whole each target falls: int64 (r, t).

        Parameters
        ----------
        heaps : int64 (r, b)
            The rows' shares here, cumulated.
        targets : int64 (r, t)
            At least 0 and below the whole.
        before : int64 (r, 1)
            The shares of the processes before this one.
        """
        local = targets - before
        here = (local >= 0) & (local < heaps[:, -1:])
        found = torch.searchsorted(heaps, local, right=True) + self.first
        return self.sum(torch.where(here, found, 0))

    def before(self, amounts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the processes before this one have of each amount, and what all have: (r, 1) and (r,) of int64 (r,)."""
        if self.group.size == 1:
            return torch.zeros_like(amounts)[:, None], amounts
        table = amounts.new_zeros(self.group.size, len(amounts))
        table[self.group.rank] = amounts
        table = self.sum(table)
        return table[: self.group.rank].sum(0)[:, None], table.sum(0)


@contextmanager
def in_all(group: Group) -> Iterator[None]:
    """An error inside the block in one process becomes an error in all, that of the lowest rank.

    Nothing inside may wait for the other processes. Errors are told with the number of the process.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if group.size == 1:
            raise
        own = error
    if group.size == 1:
        return
    errors = [error for error in group.gather(None if own is None else _told(own, group)) if error is not None]
    if errors:
        raise errors[0] from own


@contextmanager
def heard(group: Group, device: torch.device) -> Iterator[Group]:
    """The group as whoever works inside the block is to use it: an error of one process there becomes one in all.

    Before processes wait for each other they ask who is there, with one number on ``device``. A process that fails
    answers last: the others hear of it where they would have waited for it. Where all fail, as by what all of them
    know, each raises its own.
    """
    if group.size == 1:
        yield group
        return
    asking = _Asking(group, device)
    try:
        yield asking
    except Exception as error:
        asking.ask(error)
        raise


class _Asking:
    """The group that `heard` gives."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._device = group, device
        # Whether the others, too, make the call next that this process makes next.
        self._together = True

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        with self._asked():
            return self._group.all_reduce(tensor, op)

    def gather(self, item: Any) -> list[Any]:
        with self._asked():
            return self._group.gather(item)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """A call that all make, where nobody has failed; one that fails itself leaves nobody to ask."""
        self.ask()
        self._together = False
        yield
        self._together = True

    def ask(self, own: Exception | None = None) -> None:
        """Raise the error of the lowest rank that has one, unless all have; ``own`` is that of this process."""
        if not self._together:
            return
        self._together = False
        failed = torch.tensor(own is not None, dtype=torch.int64, device=self._device)
        count = int(self._group.all_reduce(failed))
        if 0 < count < self.size:
            told = self._group.gather(None if own is None else _told(own, self))
            raise next(error for error in told if error is not None) from own
        self._together = count == 0


def _told(error: Exception, group: Group) -> Exception:
    """The error as it is sent to the others: of its kind where that is one that input is refused with."""
    place = f"process {group.rank} of {group.size}"
    if isinstance(error, (GpuclustError, TypeError)):
        return type(error)(f"{place}: {error}")
    return GpuclustError(f"{place}: {type(error).__name__}: {first_line(error)}")


def require_same(group: Group, **facts: Any) -> None:
    """Refuse, in all processes, what is not the same in all of them; a wait without end would follow.

    Raises
    ------
    InputError
        It names the first fact that differs, and each process's value.
    """
    if group.size == 1:
        return
    told = group.gather({name: _shown(value) for name, value in facts.items()})
    for name in facts:
        values = [each[name] for each in told]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} in process {rank}" for rank, value in enumerate(values))
            raise InputError(f"the processes of one fit need the same {name}; got {shown}")


def _shown(value: Any) -> str:
    """A short text that is the same for the same value; of a tensor, for the same bits."""
    if isinstance(value, torch.Tensor):
        raw = value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} with SHA-256 {hashlib.sha256(raw).hexdigest()[:12]}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


@dataclass(frozen=True)
class SharedRows:
    """One process's block of rows that several processes share; see `shared`."""

    rows: Any
    group: Group


def shared(x: Any, group: Group | None = None) -> SharedRows:
    """The rows ``x`` of this process as its block of the rows of all processes: ``KMeans(100).fit(shared(x))``.

    Every process of the group calls the same method of an estimator with the same parameters. The rows of all are those
    of rank 0, then those of rank 1, and so on. ``cluster_centers_``, ``inertia_`` and ``score`` are of all rows, the
    same bits in every process and the bits that one process finds that holds all rows; ``labels_``, ``sample_weight``
    and what ``predict`` and ``transform`` return are of the rows of this process. Where restarts begin is drawn from
    the ``random_state`` of rank 0.

    Parameters
    ----------
    x : (n, d)
        Whatever `gpuclust.KMeans` takes; one row at least.
    group : Group, optional
        ``TorchGroup()`` by default: all processes of torch.distributed.

    Raises
    ------
    UnavailableError
        If torch.distributed has no process group.
    """
    return SharedRows(x, TorchGroup() if group is None else group)


def unshared(x: Any) -> tuple[Any, Group]:
    """The rows of this process, and who shares them: nobody, where they are not `shared`."""
    return (x.rows, x.group) if isinstance(x, SharedRows) else (x, OneProcess())
