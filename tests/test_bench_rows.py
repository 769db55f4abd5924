"""Rows of benchmarks: their columns, the files they are appended to, the commit they are of."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest
import torch

from gpuclust import __version__
from gpuclust.bench.rows import COLUMNS, append, check_file, checkout, new_row, read
from gpuclust.errors import GpuclustError, InputError

CPU = torch.device("cpu")
COMMITTED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.csv"))


def test_a_row_says_where_it_ran():
    row = new_row("a case", "somebody", CPU, time_s=1.5, k=3, inertia=None)
    assert set(row) <= set(COLUMNS)
    assert row["gpuclust"] == __version__
    assert row["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert row["device"].endswith("(cpu)")
    assert (row["time_s"], row["k"], row["threads"]) == (1.5, 3, torch.get_num_threads())
    assert "inertia" not in row
    with pytest.raises(ValueError, match="no columns \\['seconds'\\]"):
        new_row("a case", "somebody", CPU, seconds=1)


def test_rows_are_appended_and_read(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    first, second = (new_row("a, case", what, CPU, note='with "quotes"\nand lines') for what in ("one", "other"))
    append(file, [first])
    append(file, [second])
    found = read(file)
    assert [row["what"] for row in found] == ["one", "other"]
    assert found[0]["note"] == first["note"]
    assert found[0]["time_s"] == ""
    assert tuple(found[0]) == COLUMNS


@pytest.mark.parametrize("text", ["date,commit\n", "\x00\x01", "{}"])
def test_a_file_with_other_columns_is_refused(tmp_path, text):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(InputError, match="other columns"):
        append(file, [])
    assert file.read_text() == text


def test_files_that_cannot_be_are_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no folder"):
        check_file(tmp_path / "file" / "rows.csv")
    with pytest.raises(InputError, match="cannot read"):
        check_file(tmp_path)
    with pytest.raises(GpuclustError, match="cannot write"):
        append(Path("/proc/nothing/rows.csv"), [])
    check_file(tmp_path / "not there yet" / "rows.csv")


def test_the_commit_and_whether_files_differ(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    assert checkout(tmp_path) == ("", "")
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    checkout.cache_clear()
    commit, dirty = checkout(tmp_path)
    assert (len(commit), dirty) == (40, "no")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "rows.csv").write_text("rows are no change")
    checkout.cache_clear()
    assert checkout(tmp_path) == (commit, "no")
    (tmp_path / "a").write_text("2")
    checkout.cache_clear()
    assert checkout(tmp_path) == (commit, "yes")
    # Installed inside somebody else's repository, a commit of theirs says nothing.
    assert checkout(results) == ("", "")
    checkout.cache_clear()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_committed_rows_can_be_appended_to(file):
    rows = read(file)
    assert rows
    with open(file, newline="") as stream:
        assert {len(fields) for fields in csv.reader(stream)} == {len(COLUMNS)}
    for row in rows:
        assert len(row["commit"]) == 40
        assert row["dirty"] == "no"
        assert row["missing"] or float(row["time_s"]) > 0
