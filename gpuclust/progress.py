"""Progress: the bar that a person watches; silent where standard error is not a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import rich.progress
import torch
from rich.console import Console
from rich.table import Column
from rich.text import Text

from gpuclust.timeleft import TimeLeft

_REFRESH_S = 0.1
# A batch, or the numbers of its images: what has a length.
T = TypeVar("T", bound=Sized)


class Progress:
    """Where a run is: which pass over the images, which layer, images per second, time left, memory in use.

    The first line is the whole run, of which `begin` says what it will take; then come the images of the pass under
    way, the layers, and, where a fit reads its rows again and again, its passes over them.

    It draws when it is told something, not from a thread of its own, so that worker processes can be forked at any
    time.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._bar = rich.progress.Progress(
            _Title(),
            rich.progress.BarColumn(bar_width=12),
            *(column(table_column=Column(no_wrap=True)) for column in (_Count, _Speed, _Left)),
            console=Console(stderr=True),
            disable=not (wanted and sys.stderr.isatty()),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._lines: dict[str, rich.progress.TaskID] = {}
        self._left = TimeLeft()
        self._began = self._drawn = time.monotonic()
        self._resident = 0
        self._memory: Callable[[], str] = lambda: ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._left.end()
            if "layers" in self._lines:
                self._remove("rows")
                (task,) = (task for task in self._bar.tasks if task.id == self._lines["layers"])
                self._bar.update(task.id, description="layers", completed=task.total)
        self._draw(ended=kind is None)
        self._bar.stop()

    def begin(
        self, passes: Mapping[int, float], layers: Mapping[str, float], planned_bytes: int, device: torch.device
    ) -> None:
        """What is still to come, once it is planned; again whenever the plan changes.

        Parameters
        ----------
        passes : mapping of int to float
            Predicted seconds of each pass over the images, by the index that `images` will be told.
        layers : mapping of str to float
            Predicted seconds from where a layer's clustering begins to where the next begins, by the layer's name.
        planned_bytes : int
            The peak of the run's memory by the plan.
        device : torch.device
            Of which memory in use is read: what torch has allocated on a GPU; on a CPU (Linux) what the process has
            resident more than when this was first called.
        """
        self._left.plan(
            {
                **{("pass", index): seconds for index, seconds in passes.items()},
                **{("layer", name): seconds for name, seconds in layers.items()},
            }
        )
        if "run" not in self._lines:
            self._line("run", "the run", 1.0, count="", speed="")
            self._began, self._resident = time.monotonic(), _resident()
        self._memory = _memory(planned_bytes, device, self._resident)
        self._draw()

    def images(self, batches: Iterable[T], n: int, index: int = 0, count: int = 1) -> Generator[T, None, None]:
        """The batches of the pass of this index, of ``count`` over ``n`` images, counted."""
        title = "images" if count == 1 else f"images, pass {index + 1} of {count}"
        task = self._line("images", title, n, unit="images/s")
        self._left.start(("pass", index))
        done = 0
        for batch in batches:
            yield batch
            done += len(batch)
            self._bar.update(task, completed=done)
            self._left.advance(done / n)
            self._draw_now_and_then()
        self._bar.update(task, total=done)

    def layer(self, name: str, index: int, count: int) -> None:
        """The layer of this index, of ``count``, is being clustered."""
        self._remove("rows")
        self._left.start(("layer", name))
        if "layers" not in self._lines:
            self._line("layers", "", count)
        title = f"layer {index + 1} of {count}: {name}"
        self._bar.update(self._lines["layers"], description=title, completed=index)
        self._draw()

    def passes(self, n: int, layer: str | None = None) -> Callable[[int, int], None]:
        """What hears of each chunk of ``n`` rows that are read again and again: its first row, and how many it has.

        The rows of a ``layer`` are images, for which they are computed anew.
        """
        title, unit = ("over the rows", "rows/s") if layer is None else (f"for {layer}", "images/s")
        task = self._line("rows", f"a pass {title}", n, unit=unit)
        count = 0

        def tell(start: int, rows: int) -> None:
            nonlocal count
            if start == 0:
                count += 1
                self._bar.reset(task, description=f"pass {count} {title}")
            self._bar.update(task, completed=start + rows)
            self._draw_now_and_then()

        return tell

    def _line(self, name: str, title: str, total: float, **fields: Any) -> rich.progress.TaskID:
        """A new line, in place of one of that name."""
        if name in self._lines:
            self._bar.reset(self._lines[name], description=title, total=total, **fields)
        else:
            self._lines[name] = self._bar.add_task(title, total=total, **fields)
        return self._lines[name]

    def _remove(self, name: str) -> None:
        if name in self._lines:
            self._bar.remove_task(self._lines.pop(name))

    def _draw_now_and_then(self) -> None:
        if time.monotonic() > self._drawn + _REFRESH_S:
            self._draw()

    def _draw(self, ended: bool = False) -> None:
        if self._bar.disable:
            return
        if "run" in self._lines:
            left, elapsed = self._left.seconds(), time.monotonic() - self._began
            share = 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
            self._bar.update(
                self._lines["run"],
                completed=1.0 if ended else min(share, 0.999),
                count="" if ended else "-:--:-- left" if left is None else f"{timedelta(seconds=round(left))} left",
                speed=self._memory(),
            )
        self._bar.refresh()
        self._drawn = time.monotonic()


class _Title(rich.progress.ProgressColumn):
    """What gives way where the terminal is narrow."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Count(rich.progress.MofNCompleteColumn):
    def render(self, task: rich.progress.Task) -> Text:
        return Text(task.fields["count"]) if "count" in task.fields else super().render(task)


class _Speed(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields.get("unit")
        if not (speed and unit):
            return Text(task.fields.get("speed", ""))
        return Text(f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.1f} {unit}")


class _Left(rich.progress.TimeRemainingColumn):
    """Of a pass, by its speed; layers differ too much to say anything by theirs."""

    def render(self, task: rich.progress.Task) -> Text:
        return super().render(task) if task.fields.get("unit") else Text("")


def _memory(planned_bytes: int, device: torch.device, begun: int) -> Callable[[], str]:
    """What says how much memory is in use, on a CPU above ``begun``, and of how much that is planned."""
    if device.type == "cpu" and not begun:
        return lambda: ""
    size, unit = (1e9, "GB") if planned_bytes >= 1e9 else (1e6, "MB")

    def say() -> str:
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else max(0, _resident() - begun)
        return f"{used / size:.1f} of {planned_bytes / size:.1f} {unit}"

    return say


def _resident(statm: Path = Path("/proc/self/statm")) -> int:
    """Bytes of the process that are in memory; 0 where the system is not Linux."""
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
