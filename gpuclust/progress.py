"""Progress: the bar that a person watches; silent where standard error is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import rich.progress
from rich.console import Console
from rich.text import Text

from gpuclust.capture.images import Batch

Some = TypeVar("Some", bound=Batch)


class Progress:
    """Images per second and time left while the images pass, then which layer is being clustered."""

    def __init__(self, wanted: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            _Speed(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not (wanted and console.is_terminal),
            transient=True,
        )
        self._layers: rich.progress.TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def images(self, batches: Iterable[Some], n: int) -> Iterator[Some]:
        """The batches, counted."""
        task = self._bar.add_task("images", total=n, unit="images/s")
        for batch in batches:
            yield batch
            self._bar.advance(task, len(batch))

    def layer(self, name: str, index: int, count: int) -> None:
        """The layer of this index, of ``count``, is being clustered."""
        if self._layers is None:
            self._layers = self._bar.add_task("", total=count, unit="")
        self._bar.update(self._layers, description=f"clustering {name}", completed=index)


class _Speed(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields.get("unit")
        return Text(f"{speed:.1f} {unit}" if speed and unit else "")
