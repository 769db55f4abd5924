"""RunFolder: the folder of a run while it goes on; what makes it possible to go on after an interruption.

``.state/run.json`` holds what the results depend on, ``.state/NNN.npz`` the result of a layer, ``.state/samples.npz``
and ``.state/images.json`` the images. Each is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from gpuclust.compare.result import LayerResult
from gpuclust.errors import InputError
from gpuclust.report.report import DAMAGE, Samples, put, write

_FILES = ("report.html", "layers.csv", "assignments.parquet", "run.json")
_FIGURES = ("trend", "heatmaps", "projections", "figure2")


class RunFolder:
    """A run's folder, claimed for one run.

    Parameters
    ----------
    path : path or None
        Made if need be; None keeps nothing.
    identity : dict
        What the results depend on, for JSON.
    resume, force : bool
        Go on with the run that is there, or remove it.

    Raises
    ------
    InputError
        If the folder holds a run and neither is said, or if the run there is another one (what differs is named).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        identity: dict[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        if resume and force:
            raise InputError("resume goes on with the run that is there, force removes it: give one of the two")
        self._state = None if path is None else Path(path) / ".state"
        if self._state is None:
            return
        folder = self._state.parent
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out is a folder; {str(folder)!r} is a file")
        if (folder / "run.json").exists() or self._state.exists():
            if force:
                remove_run(folder)
            elif resume:
                self._compare(json.loads(json.dumps(identity)))
            else:
                raise InputError(
                    f"{str(folder)!r} holds a run: --resume goes on with it, --force removes it, --out takes another "
                    "folder"
                )
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._keep("run.json", identity)
        except OSError as error:
            raise InputError(f"cannot write into {str(folder)!r}: {error.strerror}") from error

    def results(self, count: int) -> dict[int, LayerResult]:
        """Those of ``count`` layers that are done, by index."""
        read = {index: self._read(f"{index:03d}.npz", LayerResult.load) for index in range(count)}
        return {index: result for index, result in read.items() if result is not None}

    def samples(self) -> Samples | None:
        """The images of the run, if a pass over them was finished."""
        return self._read("samples.npz", Samples.load)

    def images(self) -> dict[str, Any] | None:
        """What was chosen and skipped in that pass."""
        return self._read("images.json", lambda path: json.loads(path.read_text(encoding="utf-8")))

    def keep_samples(self, samples: Samples, images: dict[str, Any]) -> None:
        """Keep the images and what `ImageSource.describe` says of them."""
        if self._state is not None:
            samples.save(self._state / "samples.npz")
            self._keep("images.json", images)

    def keep_result(self, index: int, result: LayerResult) -> None:
        """Keep the result of the layer of that index."""
        if self._state is not None:
            result.save(self._state / f"{index:03d}.npz")

    def _compare(self, identity: dict[str, Any]) -> None:
        before = self._read("run.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(before, dict):
            return remove_run(self._folder)  # it died before anything was done, or is damaged
        changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if changed:
            said = "; ".join(_difference(name, before.get(name), identity.get(name)) for name in changed)
            raise InputError(
                f"the run in {str(self._folder)!r} is another one: {said}. Resume it as it was begun, remove it with "
                "--force, or take another folder with --out"
            )

    @property
    def _folder(self) -> Path:
        assert self._state is not None
        return self._state.parent

    def _read(self, name: str, reader: Any) -> Any:
        if self._state is None or not (self._state / name).is_file():
            return None
        try:
            return reader(self._state / name)
        except DAMAGE:
            return None

    def _keep(self, name: str, value: dict[str, Any]) -> None:
        assert self._state is not None
        text = json.dumps(value, indent=1)
        write(self._state / name, partial(put, text.encode("utf-8", "backslashreplace")))


def remove_run(folder: Path) -> None:
    """Remove what gpuclust wrote into a folder, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FIGURES:
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    if (folder / "figures").is_dir() and not any((folder / "figures").iterdir()):
        (folder / "figures").rmdir()
    shutil.rmtree(folder / ".state", ignore_errors=True)


def _difference(name: str, before: Any, now: Any) -> str:
    if name in ("images", "parameters"):
        return f"the {'images' if name == 'images' else 'weights of the network'} are not the same"
    return f"{name} was {before!r}, is {now!r}"
