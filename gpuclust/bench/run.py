"""One case, measured: the gate first, then every operation by everybody in turn, and a row for each.

The gate is the first call of each: its labels are compared with float64 distances, and a wrong one of gpuclust's is a
failure that is reported and not timed. That call also compiles what must be compiled; its time stands apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch

from gpuclust.bench.case import DATA, Case, make_rows
from gpuclust.bench.ceilings import Ceilings, limit_s
from gpuclust.bench.peers import Found, Peer, Stored, Work
from gpuclust.bench.quality import Quality, examine, inertia, nearest_labels
from gpuclust.bench.rows import new_row
from gpuclust.bench.timing import Clock, Guarded, Kept, in_turn, rounds_for, spread
from gpuclust.errors import first_line, is_out_of_memory
from gpuclust.peak import PeakMemory

# Seconds for the rounds of one operation of one case.
BUDGET_S = 10.0
# A call that took longer is not repeated.
LONG_S = 60.0
# Share of an operation's time that is kept for its rounds, when first calls take long.
_FOR_ROUNDS = 0.4

Tell = Callable[[dict[str, Any]], None]


@dataclass
class Bench:
    """Measures cases on one device.

    Attributes
    ----------
    device : torch.device
    peers : sequence of Peer
        gpuclust's adapters among them; the first that can run is the one that others are compared with.
    ceilings : Ceilings
        Of the same run.
    tell : Callable
        Takes each row when it is complete.
    budget_s, deadline_s : float
        Seconds for the rounds of an operation; what `monotonic` must not pass. The operations share what is left until
        then, and who does not fit an operation's share is a row that says so.
    failures : list of str
        Wrong labels and errors of gpuclust's, filled by `run`.
    least_rounds : int
        Of an operation, whatever the budget; 1 where they do not fit the deadline.
    """

    device: torch.device
    peers: Sequence[Peer]
    ceilings: Ceilings
    tell: Tell
    budget_s: float = BUDGET_S
    deadline_s: float = float("inf")
    failures: list[str] = field(default_factory=list)
    least_rounds: int = 3

    def run(self, case: Case, ops: Sequence[str], title: str | None = None) -> None:
        """Measure ``ops`` of one case; see `gpuclust.bench.peers.OPS`."""
        self._case, self._title = case, title or str(case)
        self._clock = Clock(self.device)
        self._nearest: torch.Tensor | None = None
        self._rows = make_rows(case, self.device)
        self._stored = [Stored(x) for x in self._rows.x]
        able: list[Peer] = []
        for peer in self.peers:
            reason = peer.unavailable(self.device) or peer.refuses(case, self.device)
            if reason:
                self._missing(peer, "", reason)
            else:
                able.append(peer)
        for number, op in enumerate(ops):
            left_s = self.deadline_s - monotonic()
            self._measure(op, able, monotonic() + left_s / (len(ops) - number))

    # ---- inside

    def _measure(self, op: str, peers: Sequence[Peer], until_s: float) -> None:
        """The rows of one operation, of as many peers as fit the time, in their order."""
        entries = []
        first_until_s = monotonic() + (1 - _FOR_ROUNDS) * (until_s - monotonic())
        for peer in (peer for peer in peers if op in peer.ops):
            if monotonic() > first_until_s:
                self._missing(peer, op, "no time was left")
                continue
            entry = self._first(op, peer, first_until_s)
            if entry:
                entries.append(entry)
        left_s = until_s - monotonic()
        repeated, once_s = list[_Entry](), 0.0
        for entry in entries:
            if entry.first_s <= LONG_S and once_s + entry.again_s <= left_s:
                repeated.append(entry)
                once_s += entry.again_s
        calls = [call for entry in repeated for call in entry.calls]
        safe = [Guarded(call, not entry.peer.torch_memory) for entry in repeated for call in entry.calls]
        times: dict[int, list[float]] = {id(call): [] for call in calls}
        if calls:
            least = self.least_rounds if self.least_rounds * once_s < left_s else 1
            rounds = rounds_for(once_s, min(self.budget_s, left_s), least)
            measured = in_turn(self._clock, safe, rounds)
            times = {id(call): seconds for call, seconds in zip(calls, measured, strict=True)}
            for entry in repeated:
                entry.error = next((one.error for one in safe if one.call in entry.calls and one.error), None)
        base: tuple[str, list[float]] | None = None
        for entry in entries:
            base = self._row(op, entry, [times.get(id(call), []) for call in entry.calls], base)

    def _first(self, op: str, peer: Peer, until_s: float) -> _Entry | None:
        """The first call of an operation: what it finds, how good that is, how long it takes, what memory."""
        entry = _Entry(peer, [])
        try:
            works = self._works(op, peer)
            if works is None:
                self._missing(peer, op, f"it has no call for {op} alone")
                return None
            held = PeakMemory(self.device, peer.torch_memory)
            entry.calls = [work.call for work in works]
            found = []
            for work in works:
                kept = Kept(work.call, not peer.torch_memory)
                entry.first_s += self._clock.time(kept)
                entry.peak_bytes = held.peak_bytes()
                found.append(work.read(kept.result))
                del kept
            self._judge(op, entry, found)
            del found
            if peer.exact and entry.quality and entry.quality.wrong:
                wrong, checked = entry.quality.wrong, entry.quality.checked
                raise WrongLabels(f"{wrong} of {checked} labels are not the nearest centroid's")
            entry.again_s = entry.first_s
            compiled = self.device.type == "cuda" or entry.first_s < 1
            if compiled and entry.first_s <= LONG_S and monotonic() < until_s:
                entry.again_s = sum(self._clock.time(Kept(work.call, not peer.torch_memory)) for work in works)
            return entry
        except Exception as error:
            # Whatever a library raises: the others are still measured, and the row says what happened.
            if is_out_of_memory(error) and self.device.type == "cuda":
                torch.cuda.empty_cache()
            reason = str(error) if isinstance(error, WrongLabels) else f"{type(error).__name__}: {first_line(error)}"
            self._missing(peer, op, reason, entry.quality)
            if peer.exact:
                self.failures.append(f"{peer.name}, {op} of {self._title}: {reason}")
            return None

    def _works(self, op: str, peer: Peer) -> list[Work] | None:
        case, rows, first = self._case, self._rows, self._stored[0]
        if op == "assign":
            return _known(peer.assign(first, rows.starts[0, 0]))
        if op == "update":
            return _known(peer.update(first, self._labels(), rows.starts[0, 0]))
        if op == "seed":
            return _known(peer.seed(first, case.k, case.seed))
        if op == "iteration":
            # What one iteration more costs: a fit of one, and a fit of several.
            return _known(*(peer.fit(first, rows.starts[0, :1], count) for count in (1, max(2, case.iterations))))
        if case.batch > 1 and case.n_init == 1:
            together = peer.fit_batch(rows.x, rows.starts[:, 0], case.iterations)
            if together:
                return [together]
        fits = [peer.fit(one, starts, case.iterations) for one, starts in zip(self._stored, rows.starts, strict=True)]
        known = _known(*fits)
        return None if known is None else [_one_after_another(known)]

    def _labels(self) -> torch.Tensor:
        if self._nearest is None:
            self._nearest = nearest_labels(self._rows.x[0], self._rows.starts[0, 0])
        return self._nearest

    def _judge(self, op: str, entry: _Entry, found: list[list[Found]]) -> None:
        x, start, seed = self._rows.x, self._rows.starts[0, 0], self._case.seed
        last = found[-1]
        if op == "assign":
            entry.quality = examine(x[0], start, _given(last[0].labels), seed)
            entry.recheck_share = last[0].recheck_share
        elif op == "update":
            entry.inertia = inertia(x[0], _given(last[0].centroids), self._labels())
        elif op == "seed":
            centroids = _given(last[0].centroids)
            entry.inertia = inertia(x[0], centroids, nearest_labels(x[0], centroids))
        else:
            problems = x[:1] if op == "iteration" else x
            each = len(last) // len(problems)
            chosen = []
            for index, problem in enumerate(problems):
                restarts = last[index * each : (index + 1) * each]
                qualities = [examine(problem, _given(one.centroids), _given(one.labels), seed) for one in restarts]
                best = min(range(each), key=lambda restart: qualities[restart].inertia)
                chosen.append(restarts[best])
                entry.quality = qualities[best] if entry.quality is None else entry.quality + qualities[best]
            entry.n_iter = max((one.n_iter for one in chosen if one.n_iter is not None), default=None)
            shares = [one.recheck_share for one in chosen if one.recheck_share is not None]
            entry.recheck_share = float(np.mean(shares)) if shares else None
            if op == "iteration":
                short, long = found[0][0].n_iter, last[0].n_iter
                entry.step = (long or self._case.iterations) - (short or 1)
                entry.n_iter = entry.step
        if entry.quality:
            entry.inertia = entry.quality.inertia

    def _row(
        self, op: str, entry: _Entry, times: list[list[float]], base: tuple[str, list[float]] | None
    ) -> tuple[str, list[float]] | None:
        """Tell the row of one peer; the name and times that the others' ratios are to."""
        peer, case = entry.peer, self._case
        if entry.error:
            self._missing(peer, op, entry.error)
            if peer.exact:
                self.failures.append(f"{peer.name}, {op} of {self._title}: {entry.error}")
            return base
        note, seconds = peer.note, times[0]
        if not seconds:
            seconds, note = [entry.first_s], f"{note}; the first call, which was not repeated".lstrip("; ")
        if op == "iteration":
            if entry.step < 1 or not all(times):
                self._missing(peer, op, "the labels repeat after one iteration" if entry.step < 1 else "not repeated")
                return base
            seconds = [(long - short) / entry.step for short, long in zip(*times, strict=True)]
            if np.percentile(seconds, 20) <= 0:
                self._missing(peer, op, "an iteration takes less than fits of the same length differ by")
                return base
        repeats = 1
        if op == "fit":
            repeats = (entry.n_iter or case.iterations) * case.n_init * case.batch
        limits = limit_s(self.ceilings, op, case.n, case.d, case.k, case.torch_dtype, repeats)
        values: dict[str, Any] = {
            **spread("time{}_s", seconds),
            "rounds": len(seconds),
            "first_s": entry.first_s,
            "inertia": entry.inertia,
            "n_iter": entry.n_iter,
            "recheck_share": entry.recheck_share,
            "peak_bytes": entry.peak_bytes,
            "note": note or None,
        }
        if limits:
            share = limits[0] / values["time_s"]
            values |= {"limit_s": limits[0], "serial_limit_s": limits[1], "limit_share": share}
        if base is None and peer.name.startswith("gpuclust"):
            base = peer.name, seconds
        elif base is not None:
            name, beside = base
            both = min(len(beside), len(seconds))
            values |= spread("ratio{}", np.divide(seconds[:both], beside[:both]))
            values |= {"beside": name, "ratio_of_medians": float(np.median(seconds) / np.median(beside))}
        self._tell(peer, op, entry.quality, values)
        return base

    def _missing(self, peer: Peer, op: str, reason: str, quality: Quality | None = None) -> None:
        self._tell(peer, op, quality, {"missing": reason, "note": peer.note or None})

    def _tell(self, peer: Peer, op: str, quality: Quality | None, values: dict[str, Any]) -> None:
        case = self._case
        if quality:
            values |= {
                "wrong_labels": quality.wrong,
                "checked_rows": quality.checked,
                "mislabel_rate": quality.mislabel_rate,
            }
        self.tell(
            new_row(
                self._title,
                peer.name,
                self.device,
                op=op or None,
                n=case.n,
                d=case.d,
                k=case.k,
                batch=case.batch if op in ("fit", "") else 1,
                dtype=case.dtype,
                data=DATA,
                x_at=peer.x_at if self.device.type == "cuda" else "host",
                iterations=case.iterations if op == "fit" else None,
                n_init=case.n_init if op == "fit" else None,
                version=peer.version(),
                **values,
            )
        )


class WrongLabels(Exception):
    """The gate: labels of gpuclust's that are not the nearest centroid's."""


@dataclass
class _Entry:
    peer: Peer
    calls: list[Callable[[], Any]]
    first_s: float = 0.0
    again_s: float = 0.0
    peak_bytes: int | None = None
    quality: Quality | None = None
    inertia: float | None = None
    n_iter: int | None = None
    recheck_share: float | None = None
    step: int = 0
    error: str | None = None


def _known(*works: Work | None) -> list[Work] | None:
    known = [work for work in works if work is not None]
    return known if len(known) == len(works) else None


def _one_after_another(works: list[Work]) -> Work:
    return Work(
        lambda: [work.call() for work in works],
        lambda results: [one for work, result in zip(works, results, strict=True) for one in work.read(result)],
    )


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("the call returned no labels, or no centroids")
    return value
