"""One case measured: the gate, rows of everybody, and who is wrong, fails, or has no such call."""

from __future__ import annotations

import csv
import math
from time import monotonic
from types import SimpleNamespace

import pytest
import torch

from gpuclust.bench import command, run, timing
from gpuclust.bench.case import Case
from gpuclust.bench.ceilings import Ceilings
from gpuclust.bench.ours import Ours
from gpuclust.bench.peers import OPS, Found, Peer, Stored, Work
from gpuclust.bench.peers_cpu import PlainTorch, ScikitLearn
from gpuclust.bench.rows import COLUMNS
from gpuclust.bench.run import Bench
from gpuclust.bench.show import lines
from gpuclust.cli import run_command

CPU = torch.device("cpu")
ROUND = Ceilings(1e10, {"float32": 1e11})
SMALL = Case(600, 8, 6, iterations=4)


class Wrong(Peer):
    """Gives every tenth row to the next cluster."""

    name = "wrong"

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        work = PlainTorch().fit(rows, starts, iterations)

        def read(result):
            found = work.read(result)
            for one in found:
                one.labels[::10] = (one.labels[::10] + 1) % len(starts[0])
            return found

        return Work(work.call, read)


class WrongOurs(Wrong):
    name = "gpuclust wrong"
    exact = True


class Failing(Peer):
    """Raises at its nth call."""

    name = "failing"

    def __init__(self, at: int, exact: bool = False) -> None:
        self.at, self.exact, self.calls = at, exact, 0

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        work = PlainTorch().fit(rows, starts, iterations)

        def call():
            self.calls += 1
            if self.calls >= self.at:
                raise RuntimeError(f"call {self.calls}\nand more")
            return work.call()

        return Work(call, work.read)


def measured(case, ops, *peers, **options):
    rows = []
    bench = Bench(CPU, peers, ROUND, rows.append, budget_s=0.05, **options)
    bench.run(case, ops)
    return bench, rows


def test_a_whole_run_with_scikit_learn_and_torch():
    bench, rows = measured(SMALL, OPS, Ours("torch"), ScikitLearn(), PlainTorch())
    assert bench.failures == []
    assert len(rows) == 3 * len(OPS)
    by = {(row["op"], row["what"]): row for row in rows}
    for row in rows:
        assert set(row) <= set(COLUMNS)
        assert (row["n"], row["d"], row["k"], row["dtype"]) == (600, 8, 6, "float32")
        assert ("time_s" in row) != ("missing" in row)
    for what in ("gpuclust torch", "scikit-learn", "torch"):
        fit = by["fit", what]
        assert (fit["wrong_labels"], fit["checked_rows"], fit["mislabel_rate"]) == (0, 600, 0.0)
        assert (fit["iterations"], fit["n_iter"], fit["n_init"]) == (4, 4, 1)
        assert 0 < fit["time_p20_s"] <= fit["time_s"] <= fit["time_p80_s"]
        assert fit["rounds"] >= 3
        # 4 iterations of 2 * 600 * 8 * 6 operations, or of reading 600 * 8 * 4 bytes
        assert fit["limit_s"] == pytest.approx(4 * max(57_600 / 1e11, 19_200 / 1e10))
        assert fit["limit_share"] == pytest.approx(fit["limit_s"] / fit["time_s"])
        assert all(0 <= by[op, what].get("peak_bytes", 0) < 1 << 30 for op in ("assign", "fit"))
    ours = by["fit", "gpuclust torch"]
    assert 0 <= ours["recheck_share"] < 1
    assert by["assign", "gpuclust torch"]["recheck_share"] == 0
    assert all("limit_share" in row for row in rows if "time_s" in row)
    assert "ratio" not in ours
    for what in ("scikit-learn", "torch"):
        assert by["fit", what]["beside"] == "gpuclust torch"
        assert by["fit", what]["ratio_of_medians"] == pytest.approx(by["fit", what]["time_s"] / ours["time_s"])
        assert by["fit", what]["inertia"] == pytest.approx(ours["inertia"], rel=1e-5)
    assert by["update", "scikit-learn"]["missing"] == "it has no call for update alone"
    assert by["update", "torch"]["inertia"] == pytest.approx(by["update", "gpuclust torch"]["inertia"])
    assert by["assign", "torch"]["inertia"] == pytest.approx(by["assign", "gpuclust torch"]["inertia"])
    assert by["seed", "torch"]["missing"] == "it has no call for seed alone"
    assert by["seed", "scikit-learn"]["inertia"] > ours["inertia"]
    text = "\n".join(lines(rows))
    assert "0 of 600" in text
    assert "ratio: time over that of gpuclust torch" in text
    assert text.count("not measured:") >= 2


def test_the_share_that_the_reference_distance_decided_of_labels_alone():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    one = torch.tensor([[1.0, 0.0, 0.0]])
    for other, share in ((-one, 1.0), (one + 100, 0.0)):  # as near for every row, and for none
        work = Ours("torch").assign(Stored(x), torch.cat([one, other]))
        (found,) = work.read(work.call())
        assert (found.recheck_share, found.labels.unique().tolist()) == (share, [0])


def test_the_best_restart_counts_and_problems_add_up():
    _, (ours, sk, plain) = measured(
        Case(300, 4, 5, iterations=3, n_init=3, batch=2), ["fit"], Ours("torch"), ScikitLearn(), PlainTorch()
    )
    assert ours["inertia"] == pytest.approx(sk["inertia"], rel=1e-4)
    assert ours["inertia"] == pytest.approx(plain["inertia"], rel=1e-4)
    assert [row["checked_rows"] for row in (ours, sk, plain)] == [600] * 3
    assert (ours["n_init"], ours["batch"]) == (3, 2)
    assert ours["limit_s"] == pytest.approx(3 * 3 * 2 * max(2 * 300 * 4 * 5 / 1e11, 300 * 4 * 4 / 1e10))


def test_a_problem_for_each_of_a_batch_in_one_call():
    class Together(PlainTorch):
        name = "together"
        calls = 0

        def fit_batch(self, x, starts, iterations):
            works = [self.fit(Stored(one), start[None], iterations) for one, start in zip(x, starts, strict=True)]

            def call():
                Together.calls += 1
                return [work.call() for work in works]

            return Work(call, lambda found: [work.read(one)[0] for work, one in zip(works, found, strict=True)])

    _, (one_by_one, together) = measured(Case(200, 3, 4, iterations=2, batch=3), ["fit"], PlainTorch(), Together())
    assert Together.calls > 3
    assert together["inertia"] == one_by_one["inertia"]


def test_a_peer_with_wrong_labels_is_measured_and_its_rate_told():
    bench, rows = measured(SMALL, ["fit"], Ours("torch"), Wrong())
    assert bench.failures == []
    wrong = rows[1]
    assert wrong["wrong_labels"] == 60
    assert wrong["mislabel_rate"] == pytest.approx(0.1)
    assert wrong["time_s"] > 0
    assert wrong["inertia"] > rows[0]["inertia"]
    assert "60 of 600" in "\n".join(lines(rows))


def test_wrong_labels_of_gpuclust_are_a_failure_and_not_timed():
    bench, rows = measured(SMALL, ["fit"], WrongOurs(), PlainTorch())
    (wrong,) = (row for row in rows if row["what"] == "gpuclust wrong")
    assert "time_s" not in wrong
    assert wrong["missing"] == "60 of 600 labels are not the nearest centroid's"
    assert wrong["wrong_labels"] == 60
    assert len(bench.failures) == 1
    assert "gpuclust wrong, fit of 600 x 8, k 6" in bench.failures[0]
    (other,) = (row for row in rows if row["what"] == "torch")
    assert other["time_s"] > 0
    assert "ratio" not in other  # there is nothing right to compare with


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_peer_that_raises_is_a_row(at):
    bench, rows = measured(SMALL, ["fit"], Ours("torch"), Failing(at), PlainTorch())
    by = {row["what"]: row for row in rows}
    assert by["failing"]["missing"] == f"RuntimeError: call {at}"
    assert "time_s" not in by["failing"]
    assert by["torch"]["ratio"] > 0
    assert bench.failures == []


def test_a_backend_of_gpuclust_that_raises_is_a_failure():
    for at in (1, 4):
        bench, _ = measured(SMALL, ["fit"], Failing(at, exact=True))
        assert bench.failures == [f"failing, fit of {SMALL}: RuntimeError: call {at}"]


def test_who_cannot_run_and_who_refuses_the_case():
    class Absent(Peer):
        name = "absent"

        def unavailable(self, device):
            return "absent is not installed"

    class Refusing(Peer):
        name = "refusing"

        def refuses(self, case, device):
            return f"it takes no more than 4 features; got {case.d}"

    _, rows = measured(SMALL, ["assign", "fit"], Absent(), Refusing())
    assert [(row["what"], row["missing"]) for row in rows] == [
        ("absent", "absent is not installed"),
        ("refusing", "it takes no more than 4 features; got 8"),
    ]


def test_without_time_there_are_rows_that_say_so(monkeypatch):
    _, rows = measured(SMALL, ["fit"], Ours("torch"), deadline_s=monotonic() - 1)
    assert [row["missing"] for row in rows] == ["no time was left"]
    monkeypatch.setattr(run, "LONG_S", 0.0)
    _, rows = measured(SMALL, ["fit"], Ours("torch"))
    assert (rows[0]["rounds"], rows[0]["note"]) == (1, "the first call, which was not repeated")
    assert rows[0]["time_s"] == rows[0]["first_s"]


def test_operations_share_the_time_and_who_does_not_fit_a_share_is_named(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run, "monotonic", lambda: clock[0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Peer):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def fit(self, rows, starts, iterations):
            def call():
                clock[0] += self.seconds
                return work.call()

            work = PlainTorch().fit(rows, starts, iterations)
            return Work(call, work.read)

        def assign(self, rows, start):
            return self.fit(rows, start[None], 1)

    # Of 80 seconds 24 for the first calls of labels, the rest of 40 for their rounds; then of what is left again.
    rows = []
    peers = [Slow("first", 5.0), Slow("second", 20.0), Slow("third", 1.0)]
    bench = Bench(CPU, peers, ROUND, rows.append, budget_s=1.0, deadline_s=80.0)
    bench.run(SMALL, ["assign", "fit"])
    told = {(row["op"], row["what"]): row.get("missing", row.get("note")) for row in rows}
    once = "the first call, which was not repeated"
    assert told == {
        ("assign", "first"): None,
        ("assign", "second"): once,
        ("assign", "third"): "no time was left",
        ("fit", "first"): None,
        ("fit", "second"): once,
        ("fit", "third"): None,
    }
    assert [row["rounds"] for row in rows if "time_s" in row] == [1, 1, 3, 1, 3]
    assert clock[0] == 74


def test_labels_that_repeat_leave_no_iteration_to_time():
    class AtOnce(PlainTorch):
        name = "at once"

        def fit(self, rows, starts, iterations):
            work = super().fit(rows, starts, 1)
            return Work(work.call, lambda raw: [Found(one.centroids, one.labels, 1) for one in work.read(raw)])

    _, rows = measured(SMALL, ["iteration"], AtOnce())
    assert rows[0]["missing"] == "the labels repeat after one iteration"


# ---- the command


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(command, "measure", lambda device: ROUND)
    monkeypatch.setattr(run, "BUDGET_S", 0.05)


def test_the_command_prints_ceilings_and_rows(quick, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    words = ["-n", "500", "-d", "6", "-k", "4", "--iterations", "2", "--ops", "assign,fit", "--rows", str(file)]
    assert run_command(["bench", *words, "--device", "cpu", "--peers", "scikit-learn,cuml"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1] == "ceilings: copy 10 GB/s, float32 product 0.1 TFLOP/s"
    assert "gpuclust torch" in out
    assert "not measured: cuml: cuml is not installed" in out or "cuml needs a CUDA device" in out
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    times = {(row["op"], row["what"]): row["time_s"] for row in rows if row["time_s"]}
    assert set(times) >= {(op, what) for op in ("assign", "fit") for what in ("gpuclust torch", "scikit-learn")}
    assert all(math.isfinite(float(seconds)) for seconds in times.values())


def test_a_wrong_label_ends_in_exit_code_1(quick, monkeypatch, capsys):
    monkeypatch.setattr(command, "our_backends", lambda device: [WrongOurs()])
    words = ["-n", "600", "-d", "8", "-k", "6", "--ops", "fit", "--device", "cpu"]
    assert run_command(["bench", *words, "--peers", "torch"]) == 1
    out, err = capsys.readouterr()
    assert "torch" in out  # the others were measured first
    assert err.startswith("gpuclust: gpuclust wrong, fit of 600 x 8")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-n", "5", "-d", "2"], "'-k'"),
        (["-n", "0", "-d", "2", "-k", "2"], "n is a whole number of at least 1"),
        (["-n", "5", "-d", "2", "-k", "6"], "k is at most n"),
        (["-n", "x", "-d", "2", "-k", "2"], "'-n'"),
        (["-n", "5", "-d", "2", "-k", "2", "--dtype", "int8"], "dtype is one of"),
        (["-n", "5", "-d", "2", "-k", "2", "--ops", "sort"], "--ops is some of"),
        (["-n", "5", "-d", "2", "-k", "2", "--peers", "nobody"], "--peers is all, none"),
        (["-n", "5", "-d", "2", "-k", "2", "--iterations", "0"], "iterations is"),
        (["-n", "5", "-d", "2", "-k", "2", "--device", "tpu"], "device is auto"),
        (["-n", "5", "-d", "2", "-k", "2", "--rows", __file__], "has other columns"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(words, told, capsys):
    assert run_command(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
