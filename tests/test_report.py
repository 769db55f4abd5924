"""What Report writes is whole, exact and the same each time, and load_report gives it back or says what is wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import cases_report as cases
import numpy as np
import pandas
import pytest
import rich.console

import gpuclust
from gpuclust.compare.result import COLUMNS
from gpuclust.errors import InputError
from gpuclust.report import Report, Samples, load_report
from gpuclust.report import page as page_module
from gpuclust.report.folder import RunFolder


@pytest.fixture(scope="module")
def report() -> Report:
    made = cases.report(layers=4, classes=3, per_class=12)
    made.results[0].scores["silhouette"] = float("nan")
    made.results[1] = replace(made.results[1], notes={"silhouette": "a sample of 400"})
    return made


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "deep" / "out"
    report.save(path)
    return path


def test_load_report_gives_back_what_was_saved(report: Report, folder: Path) -> None:
    loaded = load_report(folder)
    assert loaded.run == report.run
    assert loaded.chance == report.chance
    assert (loaded.samples.paths, loaded.samples.classes) == (report.samples.paths, report.samples.classes)
    assert loaded.samples.thumbs == report.samples.thumbs
    np.testing.assert_array_equal(loaded.samples.labels, report.samples.labels)
    assert loaded.samples.labels.dtype == np.int64
    assert len(loaded.results) == len(report.results)
    for got, wanted in zip(loaded.results, report.results, strict=True):
        for name in (field.name for field in fields(wanted)):
            ours, theirs = getattr(got, name), getattr(wanted, name)
            if isinstance(theirs, np.ndarray):
                assert ours.dtype == theirs.dtype, name
                np.testing.assert_array_equal(ours, theirs, err_msg=name)
            elif name == "scores":
                np.testing.assert_equal(ours, theirs)
            else:
                assert ours == theirs, name
    assert gpuclust.load_report is load_report


def test_the_folder_holds_what_the_design_lists(folder: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        *(f".state/{index:03d}.npz" for index in range(4)),
        ".state/samples.npz",
        "assignments.parquet",
        *(f"figures/{name}.png" for name in ("figure2", "heatmaps", "projections", "trend")),
        "layers.csv",
        "report.html",
        "run.json",
    ]


def test_layers_csv_holds_every_bit_of_every_number(report: Report, folder: Path) -> None:
    with open(folder / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.results)
    for row, result in zip(rows, report.results, strict=True):
        assert list(row) == list(COLUMNS)
        # Python reads a float back exactly; pandas's own reader may be off by its last bit.
        read = {name: type(value)(row[name] or "nan") for name, value in result.row().items()}
        np.testing.assert_equal(read, result.row())
    assert rows[0]["silhouette"] == ""
    assert b"\r" not in (folder / "layers.csv").read_bytes()


def test_equal_reports_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    load_report(folder).save(tmp_path)
    for name in ("layers.csv", "assignments.parquet", "run.json", "report.html", "figures/trend.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_assignments_have_a_row_per_image_and_a_column_per_layer(report: Report, folder: Path) -> None:
    table = pandas.read_parquet(folder / "assignments.parquet")
    assert list(table.columns) == ["path", "label", *(result.layer for result in report.results)]
    assert list(table["path"]) == list(report.samples.paths)
    assert list(table["label"]) == [report.samples.classes[label] for label in report.samples.labels]
    for result in report.results:
        assert table[result.layer].dtype == np.int32
        np.testing.assert_array_equal(table[result.layer], result.labels)


def test_a_layer_named_as_a_column_and_a_path_that_is_not_utf8_are_told_apart(report: Report, tmp_path: Path) -> None:
    odd = os.fsdecode(b"dog/caf\xe9.jpg")
    samples = replace(report.samples, paths=(odd, *report.samples.paths[1:]))
    first = replace(report.results[0], layer="label", module="body.label")
    made = Report([first, *report.results[1:]], samples, report.chance, report.run)
    made.save(tmp_path, figures=False)
    table = pandas.read_parquet(tmp_path / "assignments.parquet")
    np.testing.assert_array_equal(table["label@body.label"], first.labels)
    assert table["label"][0] == "car"
    assert table["path"][0] == r"dog/caf\udce9.jpg"
    assert load_report(tmp_path).samples.paths[0] == odd


def test_run_json_is_strict_json_whatever_the_run_holds(report: Report, tmp_path: Path) -> None:
    run = {"times": {"a": np.float64(1.5), "b": float("nan")}, "sizes": (1, np.int64(2)), "path": tmp_path, "ok": True}
    Report(report.results, report.samples, report.chance, run).save(tmp_path, figures=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert read["times"] == {"a": 1.5, "b": None}
    assert (read["sizes"], read["path"], read["ok"]) == ([1, 2], str(tmp_path), True)


def test_the_page_comes_last_and_a_failure_leaves_only_whole_files(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Report) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(page_module, "render_page", fail)
    with pytest.raises(OSError, match="no space left"):
        report.save(tmp_path, figures=False)
    assert not (tmp_path / "report.html").exists()
    assert load_report(tmp_path).chance == report.chance

    before = (tmp_path / "layers.csv").read_bytes()

    def half(_: pandas.DataFrame, path: Path, **__: object) -> None:
        Path(path).write_text("half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="no space left"):
        report.save(tmp_path, figures=False)
    assert (tmp_path / "layers.csv").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_load_report_says_what_is_wrong(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no finished run.*run\.json"):
        load_report(tmp_path)
    report.save(tmp_path, figures=False)

    def spoil(name: str, change: bytes, pattern: str) -> None:
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(change)
        with pytest.raises(InputError, match=pattern):
            load_report(tmp_path)
        path.write_bytes(whole)

    state = tmp_path / ".state"
    layer = (state / "001.npz").read_bytes()
    spoil(".state/001.npz", layer[:500] + bytes(200) + layer[700:], r"damaged at .*001\.npz")
    spoil(".state/samples.npz", (state / "samples.npz").read_bytes()[:300], r"damaged at .*samples\.npz")
    spoil(".state/samples.npz", b"", r"damaged at .*samples\.npz")
    spoil(".state/002.npz", (state / "003.npz").read_bytes(), r"holds layer .*run\.json says")
    spoil("run.json", b'{"format": 1, ', r"damaged at .*run\.json")
    spoil("run.json", b'{"format": 1}', r"damaged at .*run\.json")
    spoil("run.json", b'{"format": 99, "layer_names": [], "chance": {}}', "has format 99")
    (state / "003.npz").unlink()
    with pytest.raises(InputError, match=r"damaged at .*003\.npz"):
        load_report(tmp_path)


def test_a_longer_run_before_leaves_no_layer_behind(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path, figures=False)
    Report(report.results[:2], report.samples, report.chance).save(tmp_path, figures=False)
    assert [result.layer for result in load_report(tmp_path).results] == [r.layer for r in report.results[:2]]


def test_a_report_saved_over_a_run_leaves_nothing_to_resume_it_with(report: Report, tmp_path: Path) -> None:
    state, own = tmp_path / ".state", tmp_path / ".state/mine.npz"
    with RunFolder(tmp_path) as run:
        run.begin({"model": "one"})
        run.keep_samples(report.samples, {"seed": 0})
        for index in range(6):
            run.keep_result(index, report.results[0])
        own.write_text("mine")
        with pytest.raises(InputError, match="a run is going on in"):
            report.save(tmp_path)
    report.save(tmp_path, figures=False)
    assert sorted(file.name for file in state.iterdir()) == [
        *(f"00{i}.npz" for i in range(4)),
        "mine.npz",
        "samples.npz",
    ]
    with RunFolder(tmp_path, resume=True) as run, pytest.raises(InputError, match="without the state of its run"):
        run.results({"model": "one"}, 6)
    read = load_report(tmp_path)
    read.save(tmp_path, figures=False)  # its thumbnails are in a file that is replaced
    assert load_report(tmp_path).samples.thumbs == report.samples.thumbs


def test_what_does_not_fit_together_is_refused(report: Report) -> None:
    with pytest.raises(InputError, match="at least one layer"):
        Report([], report.samples, {})
    with pytest.raises(InputError, match="36 rows for 1 images"):
        Report(report.results, Samples(("a",), np.zeros(1, np.int64), ("car",)), {})
    with pytest.raises(InputError, match="chance"):
        Report(report.results, report.samples, {}, {"chance": 1})
    with pytest.raises(InputError, match="2 paths and 1 labels"):
        Samples(("a", "b"), np.zeros(1, np.int64), ("car",))
    with pytest.raises(InputError, match="thumbnail per path"):
        Samples(("a", "b"), np.zeros(2, np.int64), ("car",), (b"x",))


def test_best_is_the_first_best_layer(report: Report) -> None:
    values = [0.2, 0.9, 0.9, 0.4]
    results = [
        replace(result, scores={**result.scores, "accuracy": value, "error": 1 - value, "silhouette": float("nan")})
        for result, value in zip(report.results, values, strict=True)
    ]
    results[3].scores["silhouette"] = 0.1
    made = Report(results, report.samples, report.chance)
    assert (made.best("accuracy"), made.best("error"), made.best("silhouette")) == (1, 1, 3)
    with pytest.raises(InputError, match=r"one of .*got 'f1'"):
        made.best("f1")


def test_table_shows_each_layer_and_chance(report: Report) -> None:
    result = replace(report.results[0], layer="[red]conv[/red]")
    made = Report([result, *report.results[1:]], report.samples, report.chance)
    console = rich.console.Console(file=io.StringIO(), width=120)
    console.print(made.table())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["layer", "d", "accuracy", "purity", "ari", "ami", "nmi", "silhouette", "error"]
    assert lines[1].split()[:3] == ["[red]conv[/red]", "12", f"{result.scores['accuracy']:.3f}"]
    assert "–" in lines[1]
    assert lines[-1].split()[:2] == ["chance", f"{report.chance['accuracy']:.3f}"]
    assert len(lines) == 6


def test_the_page_words_what_the_run_says_of_itself(report: Report) -> None:
    images = {
        "data": "pictures/",
        "classes": list(report.samples.classes),
        "available": {"car": 12_345, "dog": 40, "flower": 30},
        "delivered": {"car": 12, "dog": 12, "flower": 12},
        "skipped": [{"path": "a.png", "class": "dog", "reason": "it is empty"}] * 300,
    }
    run = {"images": images, "plan": {"total_bytes": 27_100_000_000}, "times": {"capture_s": 6.125, "n": 20_000}}
    page = page_module.render_page(Report(report.results, report.samples, report.chance, run))
    text = " ".join(re.sub(r"<[^>]*>", " ", page.partition("<footer>")[0]).split())
    assert "class available delivered car 12,345 12 dog 40 12 flower 30 12" in text
    assert "Images: 300 skipped" in text
    assert "The first 200 of 300 skipped; run.json lists all." in text
    assert text.count("a.png dog it is empty") == 200
    assert "plan total 27.1 GB" in text
    assert "capture 6.12 s n 20,000" in text
    assert f"Chance: {report.chance['accuracy']:.3f}, the mean of random clusterings." in text
