"""Progress: the bar that a person watches; silent where standard error is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Self, TypeVar

import rich.progress
from rich.console import Console
from rich.text import Text

_REFRESH_S = 0.1
T = TypeVar("T")


class Progress:
    """Images per second and time left while the images pass, then which layer is being clustered; or k-means' passes.

    It draws when it is told something, not from a thread of its own, so that worker processes can be forked at any
    time.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            _Speed(),
            rich.progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (wanted and sys.stderr.isatty()),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._layers: rich.progress.TaskID | None = None
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._layers is not None:
            (task,) = (task for task in self._bar.tasks if task.id == self._layers)
            self._bar.update(self._layers, description="layers", completed=task.total)
        self._bar.refresh()
        self._bar.stop()

    def images(self, batches: Iterable[T], n: int) -> Generator[T, None, None]:
        """The batches, counted: whatever has the length of a batch, or tells it as the last of a pair."""
        task = self._bar.add_task("images", total=n, unit="images/s")
        count = 0
        for batch in batches:
            yield batch
            count += batch[-1] if isinstance(batch, tuple) else len(batch)  # type: ignore[arg-type]
            self._bar.update(task, completed=count)
            self._draw()
        self._bar.update(task, total=count)

    def passes(self, n: int) -> Callable[[int, int], None]:
        """What hears of each chunk of ``n`` rows that are read again and again: its first row, and how many it has."""
        task = self._bar.add_task("reading rows", total=n, unit="rows/s")
        count = 0

        def tell(start: int, rows: int) -> None:
            nonlocal count
            if start == 0:
                count += 1
                self._bar.reset(task, description=f"pass {count} over the rows")
            self._bar.update(task, completed=start + rows)
            self._draw()

        return tell

    def layer(self, name: str, index: int, count: int) -> None:
        """The layer of this index, of ``count``, is being clustered."""
        if self._layers is None:
            self._layers = self._bar.add_task("", total=count, unit="")
        self._bar.update(self._layers, description=f"layer {index + 1} of {count}: {name}", completed=index)
        self._bar.refresh()

    def _draw(self) -> None:
        if time.monotonic() > self._drawn + _REFRESH_S:
            self._bar.refresh()
            self._drawn = time.monotonic()


class _Speed(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields.get("unit")
        if not (speed and unit):
            return Text("")
        return Text(f"{speed:,.0f} {unit}" if unit == "rows/s" else f"{speed:.1f} {unit}")
