"""Report: the results of a run, written to a folder and read back."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gpuclust.compare.result import COLUMNS, LayerResult
from gpuclust.errors import InputError
from gpuclust.files import make_folder, put, replacing, write
from gpuclust.report.lock import FolderLock
from gpuclust.report.thumbs import Thumbs

if TYPE_CHECKING:
    import pandas
    import rich.table

FORMAT = 1
_RESERVED = ("format", "layer_names", "chance")
STATE = ".state"
LAYER_FILE = re.compile(r"\d{3,}\.npz")
# What reading a damaged file raises.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Samples:
    """The images of a run, in the order of every layer's rows.

    Attributes
    ----------
    paths : tuple of str
        Where each image came from, n of them.
    labels : int64 array (n,)
        Index of each image's class.
    classes : tuple of str
        Names of the classes.
    thumbs : sequence of bytes
        A small WebP, JPEG or PNG per image, ``b""`` where there is none; or no thumbnails at all. `Thumbs` keeps them
        in a file.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    thumbs: Sequence[bytes] = ()

    def __post_init__(self) -> None:
        n = len(self.paths)
        if len(self.labels) != n:
            raise InputError(f"samples need a label per path; got {n} paths and {len(self.labels)} labels")
        if self.thumbs and len(self.thumbs) != n:
            raise InputError(f"samples need a thumbnail per path or none; got {n} paths and {len(self.thumbs)}")

    def save(self, path: Path) -> None:
        """Write to ``path`` (.npz); a file under its final name is whole."""
        text = json.dumps({"paths": self.paths, "classes": self.classes}).encode()
        sizes = np.fromiter(map(len, self.thumbs), np.int64, len(self.thumbs))
        pixels = {"descr": "|u1", "fortran_order": False, "shape": (int(sizes.sum()),)}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as file:  # as np.savez does
            for name, values in (("text", np.array(text)), ("labels", self.labels), ("sizes", sizes)):
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
            with file.open("pixels.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, pixels)
                for thumb in self.thumbs:
                    member.write(thumb)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what ``save`` wrote; the thumbnails stay in the file."""
        whole = open(path, "rb")  # noqa: SIM115 - the thumbnails close it
        try:
            with np.load(whole, allow_pickle=False) as file:
                text, labels = json.loads(file["text"].item()), file["labels"]
                ends = array("q", np.cumsum(file["sizes"], dtype=np.int64).tobytes())
                thumbs = Thumbs.inside(whole, _start(whole, file.zip, "pixels.npy"), ends)
        except BaseException:
            whole.close()
            raise
        return cls(tuple(text["paths"]), labels, tuple(text["classes"]), thumbs)


def _start(whole: IO[bytes], file: zipfile.ZipFile, name: str) -> int:
    """Where in an archive the numbers of an array begin that is stored as it is; its checksum is looked at."""
    place = file.getinfo(name)
    with file.open(place) as member:
        np.lib.format.read_magic(member)
        np.lib.format.read_array_header_1_0(member)
        header = member.tell()
        while member.read(1 << 20):
            pass
    whole.seek(place.header_offset + 26)
    names = sum(struct.unpack("<HH", whole.read(4)))
    return place.header_offset + 30 + names + header


@dataclass(eq=False)
class Report:
    """What a run found: a result per layer, the images, and the circumstances.

    Attributes
    ----------
    results : list of LayerResult
        One per layer, in forward order.
    samples : Samples
        The images, in the order of the rows of every layer.
    chance : dict
        What each score comes to for clusters that know nothing of the classes.
    run : dict
        Options, network, images skipped, plan, versions, hardware, seeds, times: all that JSON can hold.
    """

    results: list[LayerResult]
    samples: Samples
    chance: dict[str, float]
    run: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.results:
            raise InputError("a report needs the result of at least one layer; got none")
        for result in self.results:
            if result.n != len(self.samples.paths):
                raise InputError(f"layer {result.layer!r} has {result.n} rows for {len(self.samples.paths)} images")
        if taken := [name for name in _RESERVED if name in self.run]:
            raise InputError(f"run must not hold {', '.join(taken)}: run.json uses these names itself")

    @property
    def layers(self) -> pandas.DataFrame:
        """One row per layer, with the columns of layers.csv."""
        import pandas

        return pandas.DataFrame([result.row() for result in self.results], columns=list(COLUMNS))

    @property
    def assignments(self) -> pandas.DataFrame:
        """One row per image: ``path``, ``label`` (the class's name) and the cluster (int32) at each layer.

        A layer whose name would repeat a column's is called ``NAME@module``.
        """
        import pandas

        columns: dict[str, Any] = {
            "path": [_printable(path) for path in self.samples.paths],
            "label": [_printable(self.samples.classes[label]) for label in self.samples.labels],
        }
        for result in self.results:
            name = f"{result.layer}@{result.module}" if result.layer in columns else result.layer
            columns[name] = result.labels.astype(np.int32)
        return pandas.DataFrame(columns)

    def best(self, score: str = "accuracy") -> int:
        """Index of the first layer with the best ``score``: the largest, or the smallest ``error``.

        Raises
        ------
        InputError
            If there is no such score.
        """
        allowed = list(self.results[0].scores)
        if score not in allowed:
            raise InputError(f"score is one of {', '.join(allowed)}; got {score!r}")
        values = np.array([result.scores[score] for result in self.results])
        values = -values if score == "error" else values
        return int(np.argmax(np.where(np.isnan(values), -np.inf, values)))

    def table(self) -> rich.table.Table:
        """The layers and their main scores, for a terminal; the best accuracy is bold."""
        import rich.table
        from rich.markup import escape

        scores = ("accuracy", "purity", "ari", "ami", "nmi", "silhouette", "error")
        table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer")
        for name in ("d", *scores):
            table.add_column(name, justify="right")
        best = self.best("accuracy")
        for index, result in enumerate(self.results):
            cells = [_three_places(result.scores[name]) for name in scores]
            table.add_row(escape(result.layer), f"{result.d:,}", *cells, style="bold" if index == best else None)
        chance = [_three_places(self.chance.get(name, math.nan)) for name in scores]
        table.add_row("chance", "", *chance, style="dim")
        return table

    def save(self, folder: str | os.PathLike[str], figures: bool = True) -> None:
        """Write the report: report.html, layers.csv, assignments.parquet, run.json, figures/*.png and .state/.

        Every file is written under a temporary name and renamed; report.html comes last, so a folder that has it has
        all. A run that is there is replaced, and cannot be resumed any more.

        Parameters
        ----------
        folder : path
            Made if need be.
        figures : bool
            Whether to draw figures/.

        Raises
        ------
        InputError
            If a run goes on in the folder.
        """
        folder = Path(folder)
        lock = FolderLock(folder)
        try:
            state = folder / STATE
            for file in (folder / "report.html", folder / "run.json", state / "run.json", state / "images.json"):
                file.unlink(missing_ok=True)  # what says whose the others are
            names = {layer_file(folder, index).name for index in range(len(self.results))}
            for file in state.glob("*.npz"):
                if LAYER_FILE.fullmatch(file.name) and file.name not in names:
                    file.unlink()
            for index, result in enumerate(self.results):
                result.save(layer_file(folder, index))
            self.samples.save(samples_file(folder))
            self.publish(folder, figures)
        finally:
            lock.release()

    def publish(self, folder: Path, figures: bool = True) -> None:
        """Write what `save` does but for .state/, which a run has filled layer by layer."""
        from gpuclust.report.page import render_page

        layers, assignments = self.layers, self.assignments
        write(folder / "layers.csv", lambda path: layers.to_csv(path, index=False, lineterminator="\n"))
        write(folder / "assignments.parquet", lambda path: assignments.to_parquet(path, engine="pyarrow", index=False))
        if figures:
            from gpuclust.report.figures import draw_figures

            make_folder(folder / "figures")
            for name, image in draw_figures(self):
                write(folder / "figures" / f"{name}.png", partial(put, image))

        names = [result.layer for result in self.results]
        run = json.dumps(
            _plain({"format": FORMAT, "layer_names": names, "chance": self.chance, **self.run}),
            indent=1,
            allow_nan=False,
        )
        write(folder / "run.json", partial(put, run.encode() + b"\n"))
        write(folder / "report.html", partial(put, render_page(self).encode("utf-8", "backslashreplace")))


def load_report(folder: str | os.PathLike[str]) -> Report:
    """Read the report that ``Report.save`` wrote.

    Parameters
    ----------
    folder : path
        The run's ``--out`` folder.

    Raises
    ------
    InputError
        If the folder holds no finished run, or one that is damaged or of another version's format.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise InputError(f"{str(folder)!r} holds no finished run: it has no run.json; give the --out folder of a run")
    reading = folder / "run.json"
    try:
        run = json.loads(reading.read_text(encoding="utf-8"))
        version, names, chance = (run.pop(name) for name in _RESERVED)
        if version != FORMAT:
            raise InputError(f"{str(reading)!r} has format {version!r}; this gpuclust reads format {FORMAT}")
        results = []
        for index, name in enumerate(names):
            reading = layer_file(folder, index)
            results.append(LayerResult.load(reading))
            if results[-1].layer != name:
                raise ValueError(f"it holds layer {results[-1].layer!r}, run.json says {name!r}")
        reading = samples_file(folder)
        return Report(results, Samples.load(reading), chance, run)
    except InputError:
        raise
    except DAMAGE as error:
        message = f"the run in {str(folder)!r} is damaged at {str(reading)!r} ({error}); run it again with --force"
        raise InputError(message) from error


def layer_file(folder: Path, index: int) -> Path:
    """Where a run's folder keeps the result of its layer ``index``."""
    return folder / STATE / f"{index:03d}.npz"


def samples_file(folder: Path) -> Path:
    """Where a run's folder keeps its `Samples`."""
    return folder / STATE / "samples.npz"


def _printable(text: str) -> str:
    """A file name that is not UTF-8 reaches Python with lone surrogates, which no file format takes: escape those."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _three_places(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it: NumPy scalars and paths as their plain kin, a float that is not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
