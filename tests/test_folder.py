"""The folder of a run: nothing lost, nothing mixed, nothing of the user's removed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cases_run as cases
import pytest
from torch import Tensor

import gpuclust
from gpuclust import analysis, identity
from gpuclust.capture.images import open_images
from gpuclust.compare.result import LayerResult
from gpuclust.errors import GpuclustError, InputError
from gpuclust.report import folder as folder_module
from gpuclust.report.folder import RunFolder, read_model, remove_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_folder(tmp_path_factory.mktemp("data") / "pictures")


def analyze(data: Path, out: Path, **options: Any) -> gpuclust.Report:
    return gpuclust.analyze((cases.small_net(), cases.to_tensor), data, out=out, **options)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The run ends with ``error`` once so many layers are kept."""
    plain, kept = RunFolder.keep_result, list[int]()

    def keep(self: RunFolder, index: int, result: Any) -> None:
        plain(self, index, result)
        kept.append(index)
        if len(kept) == count:
            raise error

    monkeypatch.setattr(RunFolder, "keep_result", keep)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    analyze(data, out)
    return out


# ---- going on


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_run_goes_on_where_it_was(
    data: Path, whole: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(count, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            analyze(data, out)
    assert not (out / "report.html").exists()
    assert len(list((out / ".state").glob("0*.npz"))) == count
    studied, study = [], analysis.study

    def watch(setup: Any, rows: Any, *rest: Any) -> Any:
        studied.append(rows.layer.name)
        return study(setup, rows, *rest)

    monkeypatch.setattr(analysis, "study", watch)
    report = analyze(data, out, resume=True)
    assert studied == cases.LAYERS[::-1][count:]  # the narrow ones first
    assert cases.results(out) == cases.results(whole)
    assert [result.layer for result in report.results] == cases.LAYERS


def test_a_finished_run_resumes_without_reading_an_image(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    analyze(data, out)
    (out / "report.html").unlink()
    monkeypatch.setattr("gpuclust.capture.pixels.Pixels.first", None)
    analyze(data, out, resume=True)
    assert cases.results(out) == cases.results(whole)
    assert (out / "report.html").is_file()


def test_a_damaged_layer_is_done_again(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    analyze(data, out)
    file = out / ".state/001.npz"
    file.write_bytes(file.read_bytes()[:100])
    (out / ".state/002.npz").unlink()
    analyze(data, out, resume=True)
    assert cases.results(out) == cases.results(whole)


def test_resuming_an_empty_or_new_folder_begins(data: Path, whole: Path, tmp_path: Path) -> None:
    analyze(data, tmp_path / "new", resume=True)
    assert cases.results(tmp_path / "new") == cases.results(whole)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"clusters": 2}, "clusters was 3, is 2"),
        ({"layers": "conv1"}, "layers was conv1,conv2,pool,fc3, is conv1"),
        ({"dtype": "float16"}, "dtype was float32, is float16"),
        ({"batch_size": 5}, "batch_size was 32, is 5"),
        ({"per_class": 7}, "per_class was 8, is 7"),
    ],
    ids=str,
)
def test_another_run_is_not_gone_on_with(
    data: Path, tmp_path: Path, option: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            analyze(data, tmp_path / "run")
    with pytest.raises(InputError, match=f"is another one: .*{message}") as caught:
        analyze(data, tmp_path / "run", resume=True, **option)
    assert "\n" not in str(caught.value)


def test_other_weights_networks_and_images_are_noticed(tmp_path: Path) -> None:
    data, out = cases.write_folder(tmp_path / "pictures", per_class=4), tmp_path / "run"
    analyze(data, out, layers="pool")

    class Doubled(cases.SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * super().forward(images)

    doubled = Doubled()
    doubled.load_state_dict(cases.small_net().state_dict())
    others = {
        "the weights are not the same": (cases.small_net(seed=1), cases.to_tensor),
        "model was SmallNet, is Doubled": (doubled, cases.to_tensor),
        "transform was <function to_tensor> with code .*, is <function .*<lambda>> with code": (
            cases.small_net(),
            lambda picture: cases.to_tensor(picture),
        ),
    }
    for message, other in others.items():
        with pytest.raises(InputError, match=f"is another one: {message}[^;]*$") as caught:
            gpuclust.analyze(other, data, out=out, layers="pool", resume=True)
        assert "\n" not in str(caught.value)
    cases.picture(1, 77).save(data / "cat/00.png")
    with pytest.raises(InputError, match=r"is another one: the images are not the same\."):
        analyze(data, out, layers="pool", resume=True)


class Scaled(cases.SmallNet):
    """With values that are neither weights nor code: one that counts, and one that does not."""

    def __init__(self, scale: float = 1.0, note: object = None) -> None:
        super().__init__()
        self.scale, self.note = scale, note
        self.load_state_dict(cases.small_net().state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.scale)


def shifted(by: int) -> Any:
    return lambda picture: cases.to_tensor(picture).roll(by, -1)


def test_values_that_change_what_is_computed_are_noticed_and_others_are_not(tmp_path: Path) -> None:
    data, out = cases.write_folder(tmp_path / "pictures", per_class=4), tmp_path / "run"

    def resume(network: Any, by: int = 0) -> None:
        gpuclust.analyze((network, shifted(by)), data, out=out, layers="pool", resume=True)

    resume(Scaled())
    resume(Scaled(note="of another run"))
    hooked = Scaled()
    seen: list[int] = []
    hooked.pool.register_forward_hook(lambda *_: seen.append(1))
    resume(hooked)
    assert seen
    for network, by, message in (
        (Scaled(1.01), 0, "the network makes something else of the first image"),
        (Scaled(), 1, "the transform makes something else of the first image"),
    ):
        with pytest.raises(InputError, match=f"is another one: {message}[.] Resume it"):
            resume(network, by)
    hooked.features.register_forward_hook(lambda _, __, output: -output)
    with pytest.raises(InputError, match=r"is another one: the network makes something else of the first image[.]"):
        resume(hooked)


def test_another_image_in_the_place_of_a_bad_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = cases.write_folder(tmp_path / "pictures"), tmp_path / "run"
    chosen = open_images(data, per_class=7)
    taken = {path for batch in chosen.batches(cases.to_tensor, 99, 0) for path in batch.paths}
    spare = next(path for path in sorted(data.glob("cat/*.png")) if f"cat/{path.name}" not in taken)
    (data / min(path for path in taken if path.startswith("cat"))).write_bytes(b"bad")
    with monkeypatch.context() as patch:
        stop_after(1, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            analyze(data, out, per_class=7)
    cases.picture(1, 77).save(spare)
    with pytest.raises(InputError, match=r"images that replace bad ones changed since the run in .*: --force starts"):
        analyze(data, out, per_class=7, resume=True)


def test_other_software_is_noticed(data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=f"is another one: {message}[.] Resume it"):
            analyze(data, whole, resume=True)

    plain = identity.versions()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "code_hash", lambda: "other")
        refused(f"the code of gpuclust is not the same \\({gpuclust.__version__} both times\\)")
        patch.setattr(identity, "versions", lambda: {**plain, "gpuclust": "9.9", "pillow": "1.0"})
        refused(f"gpuclust was {gpuclust.__version__}, is 9.9; pillow was {plain['pillow']}, is 1.0")
    monkeypatch.setattr("torch.__version__", "1.0+other")
    refused("torch was .*, is 1.0[+]other")


def test_what_does_not_matter_to_the_result_may_change(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    analyze(data, out, workers=0)
    (out / ".state/003.npz").unlink()
    analyze(data, out, resume=True, workers=1, memory_limit="1GiB")
    assert cases.results(out) == cases.results(whole)


# ---- what is there


def test_a_folder_with_a_run_needs_a_word(data: Path, tmp_path: Path) -> None:
    analyze(data, tmp_path / "run", layers="pool")
    with pytest.raises(InputError, match=r"holds a run \(report.html\): --resume goes on with it, --force replaces it"):
        analyze(data, tmp_path / "run", layers="pool")
    with pytest.raises(InputError, match="give one of the two"):
        analyze(data, tmp_path / "run", layers="pool", resume=True, force=True)


def test_force_removes_what_gpuclust_wrote_and_nothing_else(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    analyze(data, out)
    own = [out / "notes.txt", out / "figures/mine.png", out / ".state/mine.npz", out / "sub/run.json"]
    for file in own:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    analyze(data, out, layers="conv1", force=True)
    assert [file.read_text() for file in own] == ["mine"] * 4
    assert sorted(file.name for file in (out / ".state").glob("0*")) == ["000.npz"]
    remove_run(out)
    left = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert left == sorted(str(file.relative_to(out)) for file in own)


def test_a_refused_run_leaves_the_one_that_is_there(data: Path, whole: Path) -> None:
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    for option in ({"layers": "nothing"}, {"memory_limit": 1}, {"clusters": 99}, {"backend": "cupy"}):
        with pytest.raises(InputError):
            analyze(data, whole, force=True, **option)
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


def test_a_file_is_no_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("words")
    with pytest.raises(InputError, match=r"--out is a folder; .* is a file"):
        analyze(data, tmp_path / "run")


def test_a_report_without_its_state_cannot_be_resumed(data: Path, tmp_path: Path) -> None:
    gpuclust.analyze((cases.small_net(), cases.to_tensor), data, layers="pool").save(tmp_path / "saved")
    assert read_model(tmp_path / "saved") is None
    with pytest.raises(InputError, match="without the state of its run"):
        analyze(data, tmp_path / "saved", layers="pool", resume=True)


def test_the_network_of_a_run_is_known(whole: Path, tmp_path: Path) -> None:
    assert read_model(whole) == "SmallNet"
    assert read_model(tmp_path) is None


# ---- no room


def test_a_disk_that_is_full_keeps_what_is_done(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "run", LayerResult.save

    def save(self: LayerResult, path: Path) -> None:
        if self.layer == "pool":
            raise OSError(28, "No space left on device")
        plain(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LayerResult, "save", save)
        with pytest.raises(GpuclustError, match=r"cannot write into .*No space left on device; what is done is kept"):
            analyze(data, out)
    assert sorted(file.name for file in (out / ".state").glob("0*")) == ["003.npz"]
    analyze(data, out, resume=True)
    assert cases.results(out) == cases.results(whole)


def test_a_trace_that_cannot_be_written_costs_no_report(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpuclust.profile.replacing", refuse)
    with pytest.raises(GpuclustError, match=r"cannot write .*trace.json': No space left"):
        analyze(data, tmp_path / "run", profile=tmp_path / "trace.json")
    assert cases.results(tmp_path / "run") == cases.results(whole)
    assert (tmp_path / "run/report.html").is_file()


def test_a_disk_without_room_for_thumbnails_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folder_module, "Thumbs", refuse)
    with pytest.raises(GpuclustError, match=r"cannot write into .*Read-only file system; what is done is kept"):
        analyze(data, tmp_path / "run")


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(content: bytes, path: Path) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path / "run") as keeper:
        keeper.begin({"model": "one"})
        monkeypatch.setattr(folder_module, "put", fill)
        with pytest.raises(GpuclustError, match="No space left on device"):
            keeper.begin({"model": "two"})
    assert not list((tmp_path / "run").rglob("*.tmp"))
    state = tmp_path / "run/.state/run.json"
    assert not state.exists() or json.loads(state.read_text()) == {"model": "one"}


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    left = ["report.html.tmp", "figures/trend.png.tmp", ".state/003.npz.tmp", ".state/run.json.tmp"]
    others = ["mine.tmp", "figures/mine.png.tmp", ".state/x.npz.tmp", "layers.csv.tmp.tmp"]
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with RunFolder(tmp_path, resume=True):
        assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.tmp")) == sorted(others)


# ---- the lock


def test_a_file_system_that_goes_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = RunFolder(tmp_path / "run").__enter__()
    stale = OSError(errno.ESTALE, "Stale file handle")
    with monkeypatch.context() as patch:
        for name in ("stat", "fstat"):
            patch.setattr(os, name, Mock(side_effect=stale))
        with pytest.raises(GpuclustError, match="was removed or replaced while the run went on"):
            keeper.keep_result(0, None)  # type: ignore[arg-type]
    keeper.__exit__()
    RunFolder(tmp_path / "run").__enter__().__exit__()


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new/run", tmp_path / "mine"):
        for _ in range(2):
            with RunFolder(folder):
                assert (folder / ".state/lock").read_text().startswith(f"process {os.getpid()} on ")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_the_same_process_is_kept_out_too_and_loses_no_lock(tmp_path: Path) -> None:
    """Closing any descriptor of a file drops the process's lock on it."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    with RunFolder(tmp_path / "run"):
        for folder in (tmp_path / "run", link):
            with pytest.raises(InputError, match=f"a run is going on in .* .process {os.getpid()} on .*: wait for"):
                RunFolder(folder, force=True).__enter__()
        with pytest.raises(BlockingIOError):
            in_another_process(lock_file, tmp_path / "run/.state/lock")
    RunFolder(tmp_path / "run").__enter__().__exit__()


def test_another_process_gets_the_lock_when_it_is_let_go(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as mine, pytest.raises(InputError, match="a run is going on"):
        in_another_process(enter, tmp_path)
    mine.__exit__()  # once more does no harm
    in_another_process(enter, tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_a_word(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=f"run' cannot be locked .{os.strerror(number)}.: nothing keeps another run"):
        keeper = RunFolder(tmp_path / "run").__enter__()
    keeper.begin({})
    keeper.__exit__()
    assert sorted(file.name for file in (tmp_path / "run/.state").iterdir()) == ["run.json"]


def enter(folder: Path) -> None:
    with RunFolder(folder):
        pass


def lock_file(path: Path) -> None:
    with open(path, "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_another_process(task: Callable[[Path], None], path: Path) -> None:
    """Run a task there; what it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(task, path).result()
