"""The bar: what a terminal shows, and silence everywhere else."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuclust.capture.batches import Batch
from gpuclust.free import give_back
from gpuclust.progress import Progress, _memory, _resident
from gpuclust.rows import cluster_file
from gpuclust.timeleft import TimeLeft


def batches(count: int, size: int = 4) -> list[Batch]:
    return [Batch(torch.zeros(size, 1, 1, 1), np.zeros(size, np.int64), ["x"] * size, [b""] * size)] * count


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Standard error is a terminal of 100 columns; afterwards the list holds what it showed."""
    ours, theirs = pty.openpty()
    shown: list[str] = []
    with monkeypatch.context() as patch, open(theirs, "w", buffering=1) as stream:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        yield shown
        stream.flush()
        os.set_blocking(ours, False)
        pieces = []
        with contextlib.suppress(BlockingIOError):  # once there is no more
            while True:
                pieces.append(os.read(ours, 1 << 16))
    os.close(ours)
    shown.append(b"".join(pieces).decode())


def words(shown: list[str]) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[0])


def go(wanted: bool = True, n: int = 12) -> None:
    with Progress(wanted) as bar:
        assert len(list(bar.images(batches(3), n))) == 3
        for i, name in enumerate(("conv1", "[red]fc2")):
            bar.layer(name, i, 2)


def test_a_terminal_shows_images_per_second_and_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        go()
    assert re.search(r"images .*12/12 +[\d,.]+ images/s", words(shown))
    assert "layer 2 of 2: [red]fc2" in words(shown)
    assert re.search(r"layers .*2/2", words(shown))


def test_a_terminal_shows_the_passes_over_the_rows_and_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuclust.progress._REFRESH_S", -1.0)
    with terminal(monkeypatch) as shown, Progress() as bar:
        tell = bar.passes(3000)
        for _ in range(3):
            for start in range(0, 3000, 1000):
                tell(start, 1000)
    assert re.search(r"pass 1 over the rows .*1000/3000 ", words(shown))
    assert re.search(r"pass 2 over the rows .*2000/3000 +[\d,]+ rows/s", words(shown))
    assert re.search(r"pass 3 over the rows .*3000/3000 +[\d,]+ rows/s", words(shown))


def test_clustering_a_file_shows_its_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.RandomState(0).randn(300, 4))
    with terminal(monkeypatch) as shown:
        cluster_file(tmp_path / "x.npy", tmp_path / "labels.npy", 3, random_state=0)
    assert re.search(r"pass \d+ over the rows .*300/300", words(shown))


def test_a_planned_run_shows_its_passes_layers_time_left_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("gpuclust.progress._REFRESH_S", -1.0)
    monkeypatch.setattr("gpuclust.progress._resident", lambda: 300_000_000 + int(now[0]) * 10_000_000)
    monkeypatch.setattr("gpuclust.progress.TimeLeft", lambda: TimeLeft(lambda: now[0]))
    with terminal(monkeypatch) as shown, Progress() as bar:
        bar.begin({0: 60.0, 1: 60.0}, {"conv1": 30.0, "fc2": 30.0}, 2_500_000_000, torch.device("cpu"))
        for i, name in enumerate(("conv1", "fc2")):
            if i:  # planned anew: memory counts from where it first did
                bar.begin({1: 60.0}, {"fc2": 30.0}, 2_500_000_000, torch.device("cpu"))
            for _ in bar.images(batches(3), 12, i, 2):
                now[0] += 20.0
            bar.layer(name, i, 2)
            tell = bar.passes(12, name)
            for start in (0, 4, 8, 0, 4, 8):
                tell(start, 4)
                now[0] += 5.0
    text = words(shown)
    assert re.search(r"the run +.* -:--:-- left +0\.0 of 2\.5 GB", text)  # nothing was measured yet
    assert re.search(r"images, pass 1 of 2 .* 4/12", text)
    assert re.search(r"the run +.* 0:02:40 left +0\.2 of 2\.5 GB", text)
    assert "layer 1 of 2: conv1" in text
    assert re.search(r"pass 2 for conv1 .* 12/12", text)
    assert re.search(r"images, pass 2 of 2 .* 12/12", text)
    assert re.search(r"the run +.* 0:00:30 left +1\.5 of 2\.5 GB", text)
    assert re.search(r"the run +.* 1\.8 of 2\.5 GB +\r?\n.*images, pass 2 of 2 .*\n.*layers .* 2/2", text)
    assert "pass 2 for" not in text[text.rindex("the run") :]


def test_a_gpus_memory_is_what_torch_has_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 750_000_000 * (device.index + 1))
    assert _memory(6_000_000_000, torch.device("cuda", 1), 0)() == "1.5 of 6.0 GB"


def test_a_cpus_memory_is_what_the_process_has_more_than_at_first() -> None:
    give_back(torch.device("cpu"))  # what other tests left behind could go in between
    say = _memory(500_000_000, torch.device("cpu"), _resident())
    held = np.ones(25_000_000)
    used, of, planned, unit = say().split()
    assert 190 < float(used) < 260
    assert (of, planned, unit) == ("of", "500.0", "MB")
    assert len(held)


def test_fewer_images_than_planned_end_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        go(n=20)
    assert "12/12" in words(shown)


def test_it_is_silent_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        go(wanted=False)
        print("end", file=sys.stderr)
    assert shown[0].strip() == "end"


def test_it_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    go()
    assert capfd.readouterr() == ("", "")


def test_an_error_passes_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with Progress() as bar:
            for _ in bar.images(batches(1), 4):
                raise ZeroDivisionError

    with terminal(monkeypatch) as shown, pytest.raises(ZeroDivisionError):
        fail()
    assert "\x1b[?25l" in shown[0]
    assert shown[0].rindex("\x1b[?25h") > shown[0].rindex("\x1b[?25l")
