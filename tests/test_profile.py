"""Named ranges, and the trace that they bound."""

from __future__ import annotations

import gzip
import json
import os
import sys
import timeit
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
import torch

from gpuclust.cluster import KMeans
from gpuclust.errors import InputError
from gpuclust.profile import CALLS, FIRST, each, named, profiled

CPU = torch.device("cpu")


def counted(path: Path) -> Counter[str]:
    """How often each name is in a trace."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return Counter(event["name"] for event in json.loads(text)["traceEvents"] if event.get("ph") == "X")


def run(batches: int, layers: int = FIRST + 2) -> None:
    """Two passes of a made-up run: what is recorded of it is told by its operations."""
    x = torch.ones(8)
    for i in range(2):
        with named(f"pass {i}"):
            for _ in each("decode", range(batches)):
                with named("forward"):
                    x.sin()
                    for layer in range(layers):
                        with named(f"store {layer}"):
                            x.cos()
                x.tan()


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_has_the_first_batches_of_each_pass_with_all_they_hold(tmp_path: Path, name: str) -> None:
    with profiled(tmp_path / name, CPU):
        run(batches=20)
    found = counted(tmp_path / name)
    assert found["pass 0"] == found["pass 1"] == 1
    assert found["decode"] == found["forward"] == found["aten::sin"] == found["aten::tan"] == 2 * FIRST
    assert found["store 0"] == found[f"store {FIRST + 1}"] == 2 * FIRST
    assert found["aten::cos"] == 2 * FIRST * (FIRST + 2)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_trace_does_not_grow_with_the_images(tmp_path: Path) -> None:
    sizes = []
    for batches in (20, 400):
        with profiled(tmp_path / "trace.json", CPU):
            run(batches)
        sizes.append((tmp_path / "trace.json").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_a_trace_has_the_beginning_of_a_long_range_only(tmp_path: Path) -> None:
    x = torch.ones(8)
    with profiled(tmp_path / "trace.json", CPU):
        for _ in range(2):
            with named("moments"):
                for _ in range(20 * CALLS):
                    x.sin()
            x.cos()
    assert sys.getprofile() is None
    found = counted(tmp_path / "trace.json")
    assert 2 * CALLS * 0.4 < found["aten::sin"] < 2 * CALLS
    assert found["aten::cos"] == 0
    assert found["moments"] == 2


def test_another_profiler_of_python_goes_on(tmp_path: Path) -> None:
    told: list[str] = []

    def tell(frame: FrameType, event: str, arg: object) -> None:
        told.append(event)

    sys.setprofile(tell)
    try:
        with profiled(tmp_path / "trace.json", CPU):
            run(batches=20)
        assert sys.getprofile() is tell
    finally:
        sys.setprofile(None)
    assert counted(tmp_path / "trace.json")["forward"] == 2 * FIRST


def test_the_steps_of_a_fit_are_ranges(tmp_path: Path) -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    with profiled(tmp_path / "fit.json", CPU):
        KMeans(5, n_init=1, random_state=0, solver="primal").fit(x)
    found = counted(tmp_path / "fit.json")
    assert [found[name] for name in ("moments", "seed", "iterate", "select")] == [1, 1, 1, 1]
    assert found["iteration"] == FIRST


def test_torch_has_nothing_to_warn_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with profiled(tmp_path / "trace.json", CPU):
        run(batches=20)
    assert "Toggling" not in capfd.readouterr().err


def test_nothing_is_written_where_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("before")
    with pytest.raises(ZeroDivisionError), profiled(tmp_path / "trace.json", CPU), named("pass"):
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    assert (tmp_path / "trace.json").read_text() == "before"
    with profiled(tmp_path / "trace.json", CPU):  # and the next begins anew
        run(batches=1)
    assert counted(tmp_path / "trace.json")["forward"] == 2


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("trace.txt", r"written as \.json or \.json\.gz"),
        ("absent/trace.json", "is no folder"),
        ("folder.json", "is a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_before_the_run(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=says), profiled(tmp_path / path, CPU):
        pytest.fail("the run began")


def test_without_a_path_nothing_is_recorded() -> None:
    with profiled(None, CPU):
        assert not torch.autograd._profiler_enabled()


def test_a_forked_process_does_not_record(tmp_path: Path) -> None:
    with profiled(tmp_path / "trace.json", CPU), named("outer"):
        if (pid := os.fork()) == 0:
            before = torch.autograd.profiler.record_function.__enter__
            torch.autograd.profiler.record_function.__enter__ = lambda self: os._exit(1)  # type: ignore[method-assign]
            with named("inner"):
                torch.autograd.profiler.record_function.__enter__ = before  # type: ignore[method-assign]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_nsight_gets_ranges_that_nest_where_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("pop"))

    @named("seed")
    def seed(value: int) -> int:
        return value + 1

    with named("layer"):
        assert seed(1) == 2
        with pytest.raises(ZeroDivisionError), named("iterate"):
            raise ZeroDivisionError
    assert told == ["layer", "seed", "pop", "iterate", "pop", "pop"]


def test_each_hands_out_the_same_items_and_names_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("pop"))
    for item in each("decode", "ab"):
        told.append(item)
    assert told == ["decode", "pop", "a", "decode", "pop", "b", "decode", "pop"]


def test_a_range_that_nobody_sees_costs_next_to_nothing() -> None:
    def block() -> None:
        with named("range"):
            pass

    # Half a microsecond on a slow core; the bound is for a busy machine.
    assert min(timeit.repeat(block, number=2000, repeat=20)) / 2000 < 3e-6
