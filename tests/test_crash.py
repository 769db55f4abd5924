"""Runs that end in the middle, wherever and however, go on to the same bits; no file is half there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases_run as cases
import numpy as np
import pandas
import pytest
from crashes import Runs

from gpuclust.cli import run_command
from gpuclust.report import load_report

CODES = {"error": 1, "full": 1, "interrupt": 1, "exit": 3, "kill": -signal.SIGKILL}
SAID = {"error": "an injected fault", "full": "No space left on device", "interrupt": "KeyboardInterrupt"}
# The call of each stage that fails: in the second batch, or at the second layer.
STAGES = {"decode": 15, "forward": 7, "store": 3, "cluster": 2}
TWO = ["conv2", "fc3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def runs(data: Path) -> Iterator[Runs]:
    made = Runs(data)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert runs(out) == (0, "")
    return out


@pytest.fixture(scope="module")
def two(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two layers."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert runs(out, layers=TWO) == (0, "")
    return out


@pytest.fixture(scope="module")
def begun(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed while it clustered its third layer."""
    out = tmp_path_factory.mktemp("begun") / "run"
    assert runs(out, stage="cluster", call=3) == (-signal.SIGKILL, "")
    assert list(layers(out)) == ["002.npz", "003.npz"]  # the narrow layers come first
    return out


def layers(out: Path) -> dict[str, bytes]:
    """The results that a run has kept."""
    return {file.name: file.read_bytes() for file in sorted((out / ".state").glob("0*.npz"))}


def require_whole(out: Path) -> None:
    """Every file under its final name can be read to its end."""
    for file in out.rglob("*.npz"):
        with np.load(file, allow_pickle=False) as arrays:
            assert all(arrays[name] is not None for name in arrays.files)
    for file in out.rglob("*.json"):
        pandas.read_json(file, typ="series")
    if (out / "layers.csv").exists():
        pandas.read_csv(out / "layers.csv")
    if (out / "assignments.parquet").exists():
        pandas.read_parquet(out / "assignments.parquet")
    if (out / "report.html").exists():
        load_report(out)


def require_resumes(runs: Runs, out: Path, whole: Path, **options: Any) -> None:
    """The run goes on to what an uninterrupted one found, and leaves nothing but what that leaves."""
    assert runs(out, resume=True, **options) == (0, "")
    assert cases.results(out) == cases.results(whole)
    assert names(out) == names(whole)


def names(out: Path) -> set[Path]:
    return {file.relative_to(out) for file in out.rglob("*")}


# ---- faults at every stage


@pytest.mark.parametrize("end", CODES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_costs_the_layer_in_flight_and_no_more(
    runs: Runs, begun: Path, whole: Path, tmp_path: Path, stage: str, end: str
) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    code, said = runs(out, resume=True, stage=stage, call=STAGES[stage], end=end)
    assert code == CODES[end]
    assert SAID.get(end, "") in said
    assert "\n" not in said
    kept = layers(out)
    assert len(kept) == (3 if stage == "cluster" else 2)
    assert layers(begun).items() <= kept.items()
    require_whole(out)
    require_resumes(runs, out, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_force_starts_over_after_a_fault(runs: Runs, two: Path, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "run"
    runs(out, stage=stage, call=STAGES[stage], seed=1, layers=["conv1", "conv2", "fc3"])
    assert runs(out, force=True, layers=TWO) == (0, "")
    assert cases.results(out) == cases.results(two)
    assert names(out) == names(two)


def test_a_worker_that_dies(runs: Runs, begun: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    code, said = runs(out, resume=True, workers=2, stage="decode", call=6, end="kill")
    assert code == 1
    assert "a process that reads images died" in said
    require_resumes(runs, out, whole, workers=2)


# ---- faults in writing


def test_killed_at_each_change_of_its_folder(runs: Runs, two: Path, tmp_path: Path) -> None:
    kept = []
    for call in range(1, 100):
        out = tmp_path / str(call)
        code, _ = runs(out, layers=TWO, stage="write", call=call, end="half")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kept.append(len(layers(out)))
        require_whole(out)
        require_resumes(runs, out, two, layers=TWO)
    assert len(kept) > 25
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2}


@pytest.mark.parametrize("end", ["full", "interrupt"])
def test_a_change_of_the_folder_that_fails(runs: Runs, two: Path, tmp_path: Path, end: str) -> None:
    failed = 0
    for call in range(1 + (end == "full"), 60, 4):
        out = tmp_path / str(call)
        code, said = runs(out, layers=TWO, stage="write", call=call, end=end)
        if code:
            failed += 1
            assert said.startswith("KeyboardInterrupt" if end == "interrupt" else "GpuclustError: cannot write into")
            assert "\n" not in said
            assert not list(out.rglob("*.tmp"))
        require_whole(out)
        require_resumes(runs, out, two, layers=TWO)
    assert failed > 6


def test_killed_while_it_removes_the_run_before(runs: Runs, two: Path, tmp_path: Path) -> None:
    for call in range(3, 20, 4):
        out = Path(shutil.copytree(two, tmp_path / str(call)))
        assert runs(out, force=True, layers=TWO, stage="write", call=call) == (-signal.SIGKILL, "")
        require_whole(out)
        require_resumes(runs, out, two, layers=TWO)


@pytest.mark.parametrize("size", [300, 3000, 8000])
def test_the_system_ends_a_write_in_the_middle(runs: Runs, whole: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    code, said = runs(out, file_bytes=size)
    assert code == 1
    assert "GpuclustError: cannot write into" in said
    assert "File too large" in said
    assert not list(out.rglob("*.tmp"))
    require_whole(out)
    require_resumes(runs, out, whole)


# ---- kill -9 at random moments


@pytest.mark.parametrize("seed", [0])
def test_killed_six_times_in_a_row(runs: Runs, whole: Path, tmp_path: Path, seed: int) -> None:
    out, draw, killed = tmp_path / "run", random.Random(seed), 0
    for _ in range(6):
        code, said = runs(out, resume=True, kill_after_s=draw.uniform(0.02, 0.4), drawn=True)
        assert code in (0, -signal.SIGKILL), said
        killed += code < 0
        require_whole(out)
    assert killed >= 3
    require_resumes(runs, out, whole)


# ---- two runs, one folder


def test_a_second_run_is_refused_until_the_first_is_gone(
    runs: Runs, data: Path, begun: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    _, first = runs(out, resume=True, stage="cluster", call=1, end="wait", wait=False)
    await_file(tmp_path / "run.wait")
    before = layers(out), names(out)
    for word in ("--resume", "--force", "--resume"):
        words = ["run", str(data), "--model", "cases_run:build", "--out", str(out), "--batch-size", "10", word]
        assert run_command(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"gpuclust: a run is going on in {str(out)!r} (process {first} on ")
        assert said.count("\n") == 1
    assert (layers(out), names(out)) == before
    os.kill(int(first), signal.SIGKILL)
    await_end(int(first))
    require_resumes(runs, out, whole)


def test_a_process_left_behind_by_a_killed_run_keeps_nobody_out(
    runs: Runs, begun: Path, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    code, _ = runs(out, resume=True, stage="cluster", call=1, end="orphan")
    assert code == -signal.SIGKILL
    orphan = int((tmp_path / "run.orphan").read_text())
    try:
        require_resumes(runs, out, whole)
        os.kill(orphan, 0)  # it is still there
    finally:
        os.kill(orphan, signal.SIGKILL)


# ---- a folder that is gone, or cannot be written into


@pytest.mark.parametrize("end", ["removed", "replaced"])
def test_a_folder_that_goes_meanwhile(runs: Runs, whole: Path, tmp_path: Path, end: str) -> None:
    out = tmp_path / "run"
    code, said = runs(out, stage="cluster", call=2, end=end)
    assert code == 1
    assert "was removed or replaced while the run went on" in said
    assert "\n" not in said
    assert not layers(out)
    require_resumes(runs, out, whole)


def test_a_folder_that_cannot_be_written_into(runs: Runs) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        for out in (folder, folder / "run"):
            code, said = runs(out, user=None if os.getuid() else 65534)  # root may do anything
            assert code == 1
            assert said == (
                f"GpuclustError: cannot write into {str(out)!r}: Permission denied; --out takes another folder"
            )
        assert not list(folder.iterdir())


def await_file(path: Path) -> None:
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)


def await_end(process: int) -> None:
    """Until a process is over; its parent has not looked yet, so it may be left as a zombie."""
    while Path(f"/proc/{process}").exists() and Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
