"""The command for a GPU machine, and the pictures: run here at small shapes, with parts that crash and hang."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import share_of

from gpuclust.bench.case import Case
from gpuclust.bench.rows import append, new_row, read

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def load(name):
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(script, *words, timeout_s=100):
    # Tests in this process may have asked for Triton's interpreter, which would take all the time that peers share.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def prove():
    return load("prove")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path):
    done = call("prove.py", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("prove.py: torch finds no CUDA device; --device cpu tries the command at small shapes\n")
    assert not (tmp_path / "out").exists()


def test_a_part_that_crashes_hangs_or_has_no_time_stops_no_other(prove, tmp_path, monkeypatch, capsys):
    code = {
        "good": "print('a result')",
        "crash": "import os; print('so far', flush=True); os.abort()",
        "hang": "print('so far', flush=True); import subprocess; subprocess.run(['sleep', '600'])",
        "empty": "raise SystemExit(5)",
        "late": "print('never')",
    }

    def parts(out, device):
        for name, text in code.items():
            yield prove.Part(name, ("-c", text), 1.5 if name == "hang" else 30.0)

    monkeypatch.setattr(prove, "parts", parts)
    monkeypatch.setattr(prove, "LEAST_S", 0.0)
    # Asked once at the start, and four times for each part, but three times for one that is stopped; then time is up.
    seconds = iter([0.0] * 16)
    monkeypatch.setattr(prove, "monotonic", lambda: next(seconds, 1000.0))
    assert prove.main([str(tmp_path / "out"), "--device", "cpu", "--seconds", "500"]) == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary == capsys.readouterr().out
    told = {line.split()[1].rstrip(":"): line for line in summary.splitlines()[3:-1]}
    assert told["good"].startswith("passed")
    assert told["good"].endswith("a result")
    assert told["crash"].startswith("FAILED   crash with exit code -6")
    assert told["hang"].startswith("stopped")
    assert told["hang"].endswith("so far")
    assert told["empty"].startswith("empty")
    assert told["late"].startswith("skipped")
    assert {file.stem for file in (tmp_path / "out").glob("*.log")} == set(code) - {"late"}


def test_shares_of_a_part_run_at_once_and_one_that_hangs_is_stopped_alone(prove, tmp_path, monkeypatch):
    text = """
import pathlib, sys, time
number = sys.argv[2].partition("/")[0]
pathlib.Path(number).touch()
while len(list(pathlib.Path().glob("[123]"))) < 3:
    time.sleep(0.01)
print("met", *sys.argv[1:], flush=True)
time.sleep(600 if number == "2" else 0)
sys.exit(number == "3")
"""
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    told = dict(enumerate(prove.run(prove.Part("many", ("-c", text), 9.0, shares=3), tmp_path, 6.0), 1))
    assert [passed for _, passed in told.values()] == [True, False, False]
    assert told[1][0].startswith("passed   many-1: ")
    assert told[1][0].endswith("; met --share 1/3")
    assert told[2][0] == "stopped  many-2: its limit of 6 s was over; met --share 2/3"
    assert told[3][0].startswith("FAILED   many-3 with exit code 1: ")


def test_shares_are_all_tests_and_each_once():
    for count in (1, 3, 10):
        shares = [share_of(list(range(500)), f"{number + 1}/{count}") for number in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(500))
        assert max(map(len, shares)) - min(map(len, shares)) <= 12


def test_limits_leave_every_part_its_time(prove, tmp_path):
    parts = list(prove.parts(tmp_path, "cuda"))
    assert [part.name for part in parts] == ["gpu-tests", "kernels", "rows", "hopper", "demo", "benchmarks"]
    assert sum(part.limit_s for part in parts) <= 520
    (rows,) = (part for part in parts if part.name == "rows")
    after = parts[parts.index(rows) + 1 :]
    assert rows.keep_s >= sum(part.limit_s for part in after)


def test_the_tests_of_a_gpu_are_all_chosen_once(prove, tmp_path):
    alone, together, *_ = prove.parts(tmp_path, "cuda")
    files = [word for word in together.words if word.startswith("tests/")]
    assert [word for word in alone.words if word.startswith("tests/")] == files
    assert all((ROOT / file).is_file() for file in files)
    assert alone.words[-1] == "tests"
    assert alone.environment["GPUCLUST_REQUIRE_GPU"] == together.environment["GPUCLUST_REQUIRE_GPU"] == "1"


@pytest.mark.slow
def test_the_whole_command_at_small_shapes(tmp_path):
    out = tmp_path / "out"
    done = call("prove.py", out, "--device", "cpu", "--parts", "kernels,rows,demo", "--seconds", 280, timeout_s=290)
    logs = "".join(file.read_text() for file in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert "all parts passed" in (out / "summary.txt").read_text()
    rows = read(out / "rows.csv")
    measured = [row for row in rows if row["time_s"]]
    assert {row["op"] for row in measured} >= {"assign", "update", "fit", "seed"}
    # Of shapes so small, fits of different lengths may take the same time on a busy machine.
    noise = "an iteration takes less than fits of the same length differ by"
    assert any(row["op"] == "iteration" and (row["time_s"] or row["missing"] == noise) for row in rows)
    # Every shape is measured in one process, and once.
    fits = [(row["case"], row["what"]) for row in rows if row["op"] == "fit"]
    assert len(fits) == len(set(fits))
    assert {row["what"] for row in measured} >= {"gpuclust torch", "torch", "scikit-learn"}
    assert {row["dtype"] for row in measured} == {"float32", "float16"}
    assert all(row["mislabel_rate"] in ("", "0.0") for row in measured if row["what"].startswith("gpuclust"))
    assert (out / "demo" / "report.html").stat().st_size > 100_000
    picture = tmp_path / "fit.png"
    drawn = call("plot.py", out / "rows.csv", "--out", picture, "--dirty")
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_latest_row_is_drawn_and_changed_checkouts_only_if_asked(tmp_path, capsys):
    plot = load("plot")
    file, picture = tmp_path / "rows.csv", tmp_path / "fit.png"

    def row(what, seconds, date, dirty="no", **others):
        made = new_row("a case", what, torch.device("cpu"), op="fit", dtype="float32", x_at="host", **others)
        if seconds:
            made |= {"time_s": seconds, "time_p20_s": seconds * 0.9, "time_p80_s": seconds * 1.2}
        return {**made, "date": date, "dirty": dirty}

    append(file, [row("gpuclust torch", 2.0, "2026-02-01", limit_s=0.5, mislabel_rate=0.0)])
    append(file, [row("gpuclust torch", 9.0, "2026-01-01"), row("peer", 3.0, "2026-01-01")])
    append(file, [row("other", 1.0, "2026-01-01", dirty="yes"), row("absent", None, "2026-01-01", missing="no")])
    ((_, chosen),) = plot.choose(read(file), "fit", "float32", False).items()
    assert [(one["what"], one["time_s"]) for one in chosen] == [("gpuclust torch", "2.0"), ("peer", "3.0")]
    ((_, chosen),) = plot.choose(read(file), "fit", "float32", True).items()
    assert len(chosen) == 3
    assert plot.main([str(file), "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert plot.main([str(file), "--out", str(picture), "--op", "seed"]) == 2
    assert plot.main([str(tmp_path / "nothing.csv"), "--out", str(picture)]) == 2
    assert "no measured row of seed" in capsys.readouterr().err


def test_the_readmes_predictions_are_those_of_the_function(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    predict = load("predict")
    told = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    lines = list(predict.table())
    assert len(lines) == 2 + 2 * 10
    assert "\n" + "\n".join(lines) + "\n\n" in told


def test_a_prediction_counts_what_is_read_and_multiplied(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    predict = load("predict")
    # Streamed rows: 45 % to 20 % of 989 TFLOP/s, after 4 bytes read and 2 written of each value at 3 TB/s.
    wide = predict.predict(Case(65_536, 4096, 4096))
    assert wide.first_look == pytest.approx((5.474e-3, 11.65e-3), rel=2e-3)
    # Wide rows and few centroids: read once, and 9 slices' products of 4 bytes written and read in the cache.
    few = predict.predict(Case(50_000, 9216, 100)).first_look
    assert few == pytest.approx([50_000 * (9216 * 4 / (0.9 * 3.35e12) + 9 * 100 * 8 / 6.65e12)] * 2)
    # Few clusters: the rows bound it.
    assert predict.predict(Case(1_000_000, 128, 32)).first_look == pytest.approx([512e6 / (0.9 * 3.35e12)] * 2)
    one, many = predict.predict(Case(5000, 64, 10)), predict.predict(Case(5000, 64, 10, batch=3))
    assert one.iteration == (one.host, one.host)  # small: what the host issues takes longer
    assert many.iteration == pytest.approx([3 * one.host] * 2)
    assert many.update == pytest.approx(3 * one.update)


def test_shapes_are_cases_and_one_that_does_not_fit_has_fewer_rows():
    shapes = load("shapes")
    named = [shape.name for shape in shapes.GPU]
    assert len(named) == len(set(named)) == 10
    largest = max(shapes.GPU, key=lambda shape: shape.case.x_bytes)
    assert shapes.fitting(largest, 80 << 30) == largest
    fewer = shapes.fitting(largest, 4 << 30)
    assert fewer.case.x_bytes <= 0.45 * (4 << 30)
    assert f"n reduced to {fewer.case.n:,}" in fewer.title()
    assert shapes.with_dtype(largest, "float16").case.x_bytes == largest.case.x_bytes // 2
