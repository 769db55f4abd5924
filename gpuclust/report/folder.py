"""RunFolder: the folder of a run while it goes on; what makes it possible to go on after an interruption.

``.state/run.json`` holds what the results depend on, ``.state/NNN.npz`` the result of a layer, ``.state/samples.npz``
and ``.state/images.json`` the images. Each is written whole or not at all. ``.state/lock`` is of the run that goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from gpuclust.compare.result import LayerResult
from gpuclust.errors import GpuclustError, InputError
from gpuclust.files import make_folder, put, temporary_name, write
from gpuclust.identity import alike
from gpuclust.report.lock import FolderLock
from gpuclust.report.report import DAMAGE, LAYER_FILE, STATE, Report, Samples, layer_file, samples_file
from gpuclust.report.thumbs import Thumbs

_FILES = ("report.html", "run.json", "layers.csv", "assignments.parquet")
_FIGURES = ("trend", "heatmaps", "projections", "figure2")
# What says only that it is another one: how that is told, and what tells it better where it changed as well.
_TOLD = {
    "images": (
        "the images are not the same",
        ("data", "classes", "class_level", "per_class", "seed", "on_bad_image", "max_pixels"),
    ),
    "network": ("the network is not the same", ("model", "seed", "python")),
    "tensors": ("the weights are not the same", ("model", "weights", "seed", "network", "torch")),
    "code": ("the code of gpuclust is not the same ({gpuclust} both times)", ("gpuclust",)),
    "transform": ("transform was {before}, is {now}", ("python",)),
    "input": ("the transform makes something else of the first image", ("model", "python", "transform", "images")),
    "activations": (
        "the network makes something else of the first image",
        ("model", "weights", "seed", "layers", "python", "torch", "device", "network", "tensors", "images", "input"),
    ),
}
# What is compared but for rounding.
_ROUNDED = ("input", "activations")

Read = TypeVar("Read")


class RunFolder:
    """A run's folder, which no other run can use inside the ``with`` block.

    Nothing but the lock is written before `begin`, and nothing at all where ``path`` is None.

    Parameters
    ----------
    path : path or None
        Made if need be.
    resume, force : bool
        Go on with the run that is there, or replace it.

    Attributes
    ----------
    samples : Samples or None
        The images of the run, once a pass over them is finished.
    images : dict or None
        What was chosen and skipped in that pass.

    Raises
    ------
    InputError
        When the block is entered: if another run goes on in the folder, or if it holds a run and neither ``resume`` nor
        ``force`` is said.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, resume: bool = False, force: bool = False) -> None:
        if resume and force:
            raise InputError("--resume goes on with the run that is there, --force replaces it: give one of the two")
        self.samples: Samples | None = None
        self.images: dict[str, Any] | None = None
        self._path = None if path is None else Path(path)
        self._resume, self._force = resume, force
        self._lock: FolderLock | None = None
        self._begun = False

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        with self._writing(kept=False):
            if self._path.exists() and not self._path.is_dir():
                raise InputError(f"--out is a folder; {str(self._path)!r} is a file")
            self._lock = FolderLock(self._path)
        try:
            held = _held(self._path)
            if held and not (self._resume or self._force):
                raise InputError(
                    f"{str(self._path)!r} holds a run ({held[0]}): --resume goes on with it, --force replaces it, "
                    "--out takes another folder"
                )
            with self._writing(kept=False):
                for file in _written(self._path):  # what a run that was killed left half written
                    temporary_name(file).unlink(missing_ok=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: object = None, error: BaseException | None = None, at: object = None) -> None:
        if self._path and isinstance(error, KeyboardInterrupt):
            done = len(layers_done(self._path)) if self._resume or self._begun else 0
            error.add_note(f"{done} layers are done" if done else "no layer was done yet")
        lock, self._lock = self._lock, None
        if lock:
            lock.release()

    def results(self, identity: dict[str, Any], count: int) -> dict[int, LayerResult]:
        """Those of ``count`` layers that are done already, by index; none unless the run is resumed.

        Raises
        ------
        InputError
            If the run there depends on something else than ``identity`` says; what differs is named.
        """
        if self._path is None or not self._resume or not _held(self._path):
            return {}
        before = _read(self._path / STATE / "run.json", _read_json)
        if not isinstance(before, dict):
            raise InputError(
                f"{str(self._path)!r} holds a report without the state of its run, so it cannot be resumed: --force "
                "replaces it, --out takes another folder"
            )
        if said := _differences(before, json.loads(json.dumps(identity))):
            raise InputError(
                f"the run in {str(self._path)!r} is another one: {'; '.join(said)}. Resume it as it was begun, replace "
                "it with --force, or take another folder with --out"
            )
        self.samples = _read(samples_file(self._path), Samples.load)
        self.images = _read(self._path / STATE / "images.json", _read_json)
        if self.samples is None or self.images is None:
            return {}
        read = {index: _read(layer_file(self._path, index), LayerResult.load) for index in range(count)}
        return {index: result for index, result in read.items() if result is not None}

    def begin(self, identity: dict[str, Any]) -> None:
        """Make the folder ready for results: what is in the way goes, unless the run is resumed."""
        if self._path is None:
            return
        with self._writing(kept=False):
            if not self._resume:
                remove_run(self._path)
            self._begun = True
            make_folder(self._path / STATE)
            _keep(self._path / STATE / "run.json", identity)

    def thumbs(self) -> Thumbs:
        """Where the thumbnails of the images go while they are read: a file without a name on the folder's disk."""
        if self._path is None:
            return Thumbs()
        with self._writing():
            return Thumbs(self._path / STATE)

    def keep_samples(self, samples: Samples, images: dict[str, Any]) -> None:
        """Keep the images and what `ImageSource.describe` says of them.

        Raises
        ------
        InputError
            If they are not those that the layers which are done already were clustered with.
        """
        before, described = self.samples, self.images or {}
        if before and (before.paths != samples.paths or before.labels.tolist() != samples.labels.tolist()):
            raise InputError(
                f"the images that could be read are not those of the run in {str(self._path)!r}: --force starts over"
            )
        if before and described.get("replacements") != images.get("replacements"):
            raise InputError(
                f"images that replace bad ones changed since the run in {str(self._path)!r} began: --force starts over"
            )
        self.samples, self.images = samples, images
        if self._path is not None:
            with self._writing():
                samples.save(samples_file(self._path))
                _keep(self._path / STATE / "images.json", images)

    def keep_result(self, index: int, result: LayerResult) -> None:
        """Keep the result of the layer of that index."""
        if self._path is not None:
            with self._writing():
                result.save(layer_file(self._path, index))

    def finish(self, report: Report) -> None:
        """Write the report, of results and images that are kept already."""
        if self._path is not None:
            with self._writing():
                report.publish(self._path)

    @contextmanager
    def _writing(self, kept: bool = True) -> Iterator[None]:
        """An error of the file system inside the block, as one line that says what is kept."""
        try:
            if self._lock and not self._lock.stands():
                raise FileNotFoundError
            yield
        except OSError as error:
            if self._lock and not self._lock.stands():
                raise GpuclustError(
                    f"{str(self._path)!r}, or {STATE}/lock in it, was removed or replaced while the run went on, so "
                    "nothing more is written there: --resume goes on with what is left"
                ) from error
            advice = "what is done is kept, and --resume goes on" if kept else "--out takes another folder"
            raise GpuclustError(
                f"cannot write into {str(self._path)!r}: {error.strerror or error}; {advice}"
            ) from error


def remove_run(folder: Path) -> None:
    """Remove what gpuclust wrote into a folder, and nothing else.

    What says that the rest is there goes first, what the rest depends on goes last: if it is interrupted, what is left
    is less of the same run.
    """
    for file in _written(folder):
        file.unlink(missing_ok=True)
        temporary_name(file).unlink(missing_ok=True)
    for name in ("figures", STATE):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _written(folder: Path) -> list[Path]:
    """The files that a run writes into its folder, whether they are there or not; of the layers, those that are."""
    state = folder / STATE
    layers = {file.name.removesuffix(".tmp") for file in state.glob("*.npz*")}
    return [
        *(folder / name for name in _FILES),
        *(folder / "figures" / f"{name}.png" for name in _FIGURES),
        *(state / name for name in sorted(layers) if LAYER_FILE.fullmatch(name)),
        *(samples_file(folder), state / "images.json", state / "run.json"),
    ]


def read_model(folder: str | os.PathLike[str]) -> str | None:
    """The name of the network whose run the folder holds, if it holds one."""
    found = _read(Path(folder) / STATE / "run.json", _read_json)
    return found.get("model") if isinstance(found, dict) else None


def layers_done(folder: Path) -> list[str]:
    """Names of the files of the layers that a run in the folder has done."""
    return sorted(file.name for file in (folder / STATE).glob("*.npz") if file.stem.isdigit())


def _held(folder: Path) -> list[str]:
    """Names of the results in a folder. A pass that was interrupted before its first layer was done leaves none."""
    return [
        *(name for name in _FILES if (folder / name).exists()),
        *(f"{STATE}/{name}" for name in layers_done(folder)),
    ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, each as a person would say it."""
    names = {**before, **now}
    changed = [
        name
        for name in names
        if not (alike(before.get(name), now.get(name)) if name in _ROUNDED else before.get(name) == now.get(name))
    ]
    said = []
    for name in changed:
        words, told_by = _TOLD.get(name, (f"{name} was {{before}}, is {{now}}", ()))
        if not set(told_by) & set(changed):
            given = {"before": _show(before.get(name)), "now": _show(now.get(name)), "gpuclust": now.get("gpuclust")}
            said.append(words.format_map(given))
    return said


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _read(path: Path, reader: Callable[[Path], Read]) -> Read | None:
    """What is in a file; None where it is missing or damaged."""
    try:
        return reader(path) if path.is_file() else None
    except DAMAGE:
        return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _keep(path: Path, value: dict[str, Any]) -> None:
    write(path, partial(put, json.dumps(value, indent=1).encode()))
