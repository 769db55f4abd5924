"""The command line: what it prints where, its exit codes, and a run that is killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import cases_run as cases
import numpy as np
import pandas
import pytest
import torch
from cases_rows import tight

import gpuclust
from gpuclust.cli import run_command
from gpuclust.compare.result import COLUMNS

TESTS = Path(__file__).parent
HEAD = ["layer", "d", "accuracy", "purity", "ari", "ami", "nmi", "silhouette", "error"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(
    *words: object, code: str = "from gpuclust.cli import main; main()", output: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """The command in a process of its own, ``code`` run in place of the console script."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- the end


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["run"], 2)])
def test_what_is_to_be_done_at_the_end_is_done(words: list[str], code: int) -> None:
    script = "import atexit; atexit.register(print, 'the end'); from gpuclust.cli import main; main()"
    with shell(*words, code=script) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.splitlines()[-1] == "the end"


# ---- help


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        out, err = shell("--help").communicate(timeout=60)
        times.append(time.perf_counter() - started)
        assert err == ""
        assert "Usage: gpuclust" in out
    assert min(times) < 0.5
    code = (
        "import sys; from gpuclust.cli import run_command; assert run_command(['--help']) == 0; "
        "assert not {'torch', 'numpy', 'sklearn', 'pandas'} & set(sys.modules)"
    )
    with shell(code=code) as process:
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["run", "demo", "layers", "plan", "cluster", "bench", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: gpuclust {command}" in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"gpuclust {gpuclust.__version__}\n"
    assert run_command([]) == 0
    shown = capsys.readouterr().out
    assert "Commands:" in shown
    assert "..." not in shown.partition("Commands:")[2]  # each command's line is whole


# ---- run


def test_run_prints_the_table_and_writes_the_files(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(data), "--model", "cases_run:build"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == HEAD
    assert [line.split()[0] for line in lines[1:5]] == cases.LAYERS
    assert lines[5].split()[0] == "chance"
    assert lines[-1] == "page: gpuclust-cases_run-build/report.html"
    folder = here / "gpuclust-cases_run-build"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if ".state" not in file.parts}
    figures = {f"figures/{name}.png" for name in ("trend", "heatmaps", "projections", "figure2")}
    assert names == {"report.html", "layers.csv", "assignments.parquet", "run.json", "figures"} | figures
    table = pandas.read_csv(folder / "layers.csv")
    assert list(table.columns) == COLUMNS
    assert float(lines[1].split()[2]) == pytest.approx(table["accuracy"][0], abs=5e-4)
    assignments = pandas.read_parquet(folder / "assignments.parquet")
    assert list(assignments.columns) == ["path", "label", *cases.LAYERS]
    assert (assignments["label"] == assignments["path"].str.partition("/")[0]).all()
    run = json.loads((folder / "run.json").read_text())
    assert run["command"] == f"gpuclust run {data} --model cases_run:build"
    assert {"options", "network", "images", "plan", "hardware", "versions", "seeds", "times"} <= set(run)


def test_options_reach_the_run(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(
        "--layers conv1,pool --layers fc* --clusters 2 --classes cat,owl --per-class 5 --out there --device cpu "
        "--backend torch --solver primal --precision fast --dtype bfloat16 --memory-limit 2GiB --batch-size 4 "
        "--workers 0 --n-init 2 --max-iter 7 --seed 3 --on-bad-image fail --max-pixels 9999"
    )
    assert run_command(["run", str(data), "--model", "cases_run:build", *words]) == 0
    report = gpuclust.load_report(here / "there")
    options = report.run["options"]
    assert [result.layer for result in report.results] == ["conv1", "pool", "fc3"]
    assert options["classes"] == ["cat", "owl"]
    assert (len(report.samples.paths), report.results[0].k, report.results[0].precision) == (10, 2, "fast")
    assert (options["dtype"], options["memory_limit"], options["batch_size"]) == ("bfloat16", 2 << 30, 4)
    assert (options["n_init"], options["max_iter"], options["seed"]) == (2, 7, 3)
    assert (options["on_bad_image"], options["max_pixels"], options["workers"]) == ("fail", 9999, 0)
    # The command that run.json gives does the same again.
    assert run_command([*shlex.split(report.run["command"])[1:], "--out", "again"]) == 0
    assert cases.results(here / "again") == cases.results(here / "there")


def test_the_same_command_twice_gives_the_same_bits(data: Path, here: Path) -> None:
    for out, workers in (("one", 0), ("two", 2)):
        words = ["run", str(data), "--model", "cases_run:build", "--out", out, "--workers", str(workers)]
        assert run_command(words) == 0
    assert cases.results(here / "one") == cases.results(here / "two")


def test_bad_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = cases.write_folder(tmp_path / "pictures", per_class=4)
    (data / "dog/00.png").write_bytes(b"")
    assert run_command(["run", str(data), "--model", "cases_run:build", "--layers", "pool"]) == 0
    assert "1 bad images were left out, 0 of them replaced; the first: dog/00.png: " in capsys.readouterr().out
    words = ["run", str(data), "--model", "cases_run:build", "--layers", "pool", "--on-bad-image", "fail", "--force"]
    assert run_command(words) == 2
    assert "image dog/00.png of class 'dog' is bad" in capsys.readouterr().err


KILLED = """
import os, signal
from gpuclust.cli import main
from gpuclust.report.folder import RunFolder
keep = RunFolder.keep_result
def keep_and_die(self, index, result):
    keep(self, index, result)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.keep_result = keep_and_die
main()
"""


def test_a_run_that_is_killed_between_layers_resumes_to_the_same_results(data: Path, here: Path) -> None:
    words = ["run", str(data), "--model", "cases_run:build"]
    assert run_command([*words, "--out", "whole"]) == 0
    with shell(*words, "--out", "killed", code=KILLED) as killed:
        killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (here / "killed/layers.csv").exists()
    assert sorted(file.name for file in (here / "killed/.state").glob("0*")) == ["001.npz", "002.npz", "003.npz"]
    assert run_command([*words, "--out", "killed"]) == 2
    assert run_command([*words, "--out", "killed", "--resume"]) == 0
    assert cases.results(here / "killed") == cases.results(here / "whole")


def test_ctrl_c_says_what_is_kept(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpuclust.report.folder import RunFolder

    keep = RunFolder.keep_result

    def keep_and_stop(self: RunFolder, index: int, result: object) -> None:
        keep(self, index, result)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep_result", keep_and_stop)
    assert run_command(["run", str(data), "--model", "cases_run:build"]) == 130
    assert capsys.readouterr().err == "gpuclust: interrupted; 1 layers are done, and --resume goes on from there\n"


def test_ctrl_c_does_not_count_the_layers_of_a_run_that_was_to_be_replaced(
    data: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(data), "--model", "cases_run:build", "--layers", "pool"]
    assert run_command(words) == 0
    capsys.readouterr()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpuclust.report.folder.RunFolder.begin", stop)
    assert run_command([*words, "--force"]) == 130
    assert capsys.readouterr().err == "gpuclust: interrupted; no layer was done yet\n"
    assert (here / "gpuclust-cases_run-build/report.html").is_file()


def test_ctrl_c_gives_no_advice_that_a_command_does_not_take(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("2 layers are done")
        raise error

    monkeypatch.setattr("gpuclust.analysis.analyze", stop)
    for words, advice in ((["demo"], ""), (["run", "x", "--model", "y"], ", and --resume goes on from there")):
        assert run_command(words) == 130
        assert capsys.readouterr().err == f"gpuclust: interrupted; 2 layers are done{advice}\n"


# ---- what cannot be

MODEL = ["--model", "cases_run:build"]
REFUSED = [
    (["run", "DATA"], "Missing option '--model'"),
    (["run", "DATA", *MODEL, "--seed", "x"], "--seed"),
    (["run", "DATA", *MODEL, "--colour", "3"], "--colour"),
    (["jump"], "jump"),
    (["run", "nowhere", *MODEL], "'nowhere' is not there: data is a folder"),
    (["run", "DATA", "--model", "alexnett"], "unknown model 'alexnett'; close: alexnet"),
    (["run", "DATA", "--model", "cases_run:nothing"], "cases_run has no 'nothing'"),
    (["run", "DATA", "--model", "alexnet", "--weights", "gone.pth"], "no checkpoint at gone.pth"),
    (["run", "DATA", *MODEL, "--layers", "conv9"], "no layer is called 'conv9'; close: conv"),
    (["run", "DATA", *MODEL, "--classes", "cat,dgo"], "no class 'dgo'"),
    (["run", "DATA", *MODEL, "--per-class", "9"], "per_class is 9, and class 'cat' has 8 images"),
    (["run", "DATA", *MODEL, "--clusters", "25"], "25 clusters were asked for, and there are 24 images"),
    (["run", "DATA", *MODEL, "--memory-limit", "lots"], "a size is a number with B, KiB"),
    (["run", "DATA", *MODEL, "--memory-limit", "1MiB"], "the memory limit is"),
    (["run", "DATA", *MODEL, "--batch-size", "0"], "--batch-size is auto or a whole number of at least 1; got '0'"),
    (["run", "DATA", *MODEL, "--dtype", "int8"], "dtype is one of float32, float16, bfloat16; got 'int8'"),
    (["run", "DATA", *MODEL, "--device", "tpu"], "device is auto, cpu, cuda or cuda:INDEX; got 'tpu'"),
    (["run", "DATA", *MODEL, "--device", "cuda:99"], "cuda:99"),
    (["run", "DATA", *MODEL, "--backend", "cupy"], "backend 'cupy' cannot run here"),
    (["run", "DATA", *MODEL, "--n-init", "0"], "n_init is a whole number of at least 1; got 0"),
    (["run", "DATA", *MODEL, "--resume", "--force"], "give one of the two"),
    (["plan", "nowhere", *MODEL], "'nowhere' is not there"),
    (["layers", *MODEL, "--input", "16"], "--input is CxHxW"),
    (["layers", *MODEL, "--input", "7x16x16"], "does not take an image of 7x16x16"),
    (["cluster", "gone.npy", "--clusters", "2"], "there is no file 'gone.npy'"),
    (["cluster", ".", "--clusters", "2"], "'.' is not a .npy file of numbers"),
    (["cluster", "X.npy", "--clusters", "2", "--tol", "small"], "--tol"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_are_one_line_and_exit_code_2(
    words: list[str], message: str, data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([str(data) if word == "DATA" else word for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("gpuclust: ")
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_fault_is_exit_code_1_and_one_line(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("")
    assert run_command(["run", str(data), *MODEL, "--out", "file/run", "--layers", "pool"]) == 1
    err = capsys.readouterr().err
    assert "cannot write into 'file/run': Not a directory" in err
    assert err.count("\n") == 1


def test_whoever_reads_may_stop_reading() -> None:
    with shell("layers", "--model", "alexnet", "--weights", "none") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full, shell("--version", output=full) as process:
        assert process.stderr is not None
        assert process.stderr.read() == "gpuclust: cannot write: No space left on device\n"
    assert process.returncode == 1


def test_names_that_the_terminal_lacks_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cases.write_folder(tmp_path / "pictures", ("猫", "hund"), per_class=3)
    (data / "猫/00.png").write_bytes(b"")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    process = shell("run", data, *MODEL, "--layers", "pool", "--workers", "0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\\u732b/00.png" in out


# ---- the other commands


def test_layers_lists_names_modules_shapes_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["layers", *MODEL, "--input", "3x16x16", "--layers", "auto"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["layer", "module", "shape", "values/image"]
    assert lines[1:] == [
        ["conv1", "features.1", "8x16x16", "2,048", "auto"],
        ["conv2", "features.4", "6x8x8", "384", "auto"],
        ["pool", "pool", "6x1x1", "6", "auto"],
        ["fc3", "classifier", "3", "3", "auto"],
    ]


def test_plan_prints_the_bytes_and_reads_no_more(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", str(data), *MODEL, "--memory-limit", "1MiB"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\nit does not fit: [\d,]+ bytes too little", shown)
    assert "memory limit" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == cases.LAYERS
    assert list(here.iterdir()) == []


def test_cluster_writes_the_labels_of_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).numpy()
    np.save("X.npy", x)
    assert run_command(["cluster", "X.npy", "--clusters", "4", "--n-init", "3", "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    expected = gpuclust.KMeans(4, n_init=3, random_state=7).fit(x)
    labels = np.load("X.labels.npy")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected.labels_)
    assert f"inertia {expected.inertia_:.10g}" in shown
    told = r"  solver primal\nplan: primal: .*; no dual: .*\nrows: in a mapped file\nlabels: X.labels.npy\n$"
    assert re.search(told, shown)
    assert run_command(["cluster", "X.npy", "--clusters", "4"]) == 2
    assert "is there already: --force overwrites it" in capsys.readouterr().err
    capsys.readouterr()
    assert run_command(["cluster", "X.npy", "--clusters", "4", "--force", "--memory-limit", "1MB"]) == 2
    assert "memory_limit leaves 1 MB beside X, and this fit takes at least" in capsys.readouterr().err
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "700")
    limit = str(tight(x, 4))
    assert run_command(["cluster", "X.npy", "--clusters", "4", "--force", "--memory-limit", limit]) == 0
    assert "rows: streamed from a mapped file: 6 kB, and there is room for 1.4 kB\n" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["meta", "ipu", "tpu", "cuda:99"])
def test_cluster_and_bench_refuse_a_device_in_one_line(
    device: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("X.npy", np.eye(3))
    for words in (["cluster", "X.npy", "--clusters", "2"], ["bench", "-n", "30", "-d", "3", "-k", "2"]):
        assert run_command([*words, "--device", device]) == 2
        err = capsys.readouterr().err
        assert repr(device) in err
        assert err.startswith("gpuclust: ")
        assert err.count("\n") == 1
    assert [file.name for file in here.iterdir()] == ["X.npy"]


def test_clusters_options_reach_kmeans(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.rand(300, 5, generator=torch.Generator().manual_seed(0)).numpy()
    np.save("X.npy", x)
    given: list[dict[str, Any]] = [
        {"init": "random"},
        {"init": "k-means||", "tol": 0.1},
        {"algorithm": "hartigan-wong", "max_iter": 3},
        {"metric": "cosine", "n_init": 2},
    ]
    inertias = set()
    for options in given:
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        assert run_command(["cluster", "X.npy", "--clusters", "9", "--force", *words]) == 0
        shown = capsys.readouterr().out
        expected = gpuclust.KMeans(9, **{"n_init": 10, "random_state": 0, **options}).fit(x)
        np.testing.assert_array_equal(np.load("X.labels.npy"), expected.labels_)
        assert f"inertia {expected.inertia_:.10g}  iterations {expected.n_iter_}  " in shown
        assert ("moves" in shown) == ("algorithm" in options)
        assert "algorithm" not in options or f"  moves {expected.fit_report_.moves}  " in shown
        inertias.add(expected.inertia_)
    assert len(inertias) == len(given)


def test_cluster_tells_what_a_reader_should_know(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuclust.cluster.backends import plain

    np.save("X.npy", torch.rand(300, 5, generator=torch.Generator().manual_seed(0)).numpy())
    right, calls = plain.reference_dist2, []

    def fails_once(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return right(*given)

    monkeypatch.setattr(plain, "reference_dist2", fails_once)
    assert run_command(["cluster", "X.npy", "--clusters", "4"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\nnote: memory ran out once.*\nlabels: X.labels.npy\n$", shown)


def test_the_seed_of_a_file_of_rows_has_nothing_to_do_with_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cluster", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "images" not in shown
    for option in ("--init", "--n-init", "--tol", "--algorithm", "--metric", "--seed"):
        assert option in shown


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "cupy", "triton", "cuml", "cpu", "CUDA"):
        assert word in shown


def test_demo_may_be_run_again_but_takes_no_other_run(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr("gpuclust.cli._analyze", lambda *_, force, **__: told.append((_[2], force)))
    assert run_command(["demo"]) == 0
    state = here / "gpuclust-demo/.state"
    state.mkdir(parents=True)
    for model in ("DemoNet", "alexnet"):
        (state / "run.json").write_text(json.dumps({"model": model}))
        assert run_command(["demo"]) == 0
    assert told == [("gpuclust-demo", False), ("gpuclust-demo", True), ("gpuclust-demo", False)]
