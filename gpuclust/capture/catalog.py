"""What images there are, by class: a folder of class folders, or a manifest. Nothing is decoded or chosen here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gpuclust.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Catalog:
    """All images of all classes.

    Attributes
    ----------
    data : str
        What was asked for, in words.
    kind : str
        ``folder``, ``manifest`` or ``dataset``.
    keys : dict of str to list of str
        The images of each class, classes in their final order: paths relative to `root` in POSIX form, or the indices
        of a data set in digits.
    parts : dict of str to tuple of str
        Folder path of each class.
    empty : tuple of str
        Class folders without any image.
    ignored : int
        Files that aren't images by their name, images that are in no class, and repeated lines of a manifest.
    unlabelled : tuple of (str, str)
        Items of a data set that failed when they were read for their label: key and reason.
    root : Path, optional
        What the paths are relative to.
    dataset : Dataset, optional
        What the indices are of.
    """

    data: str
    kind: str
    keys: dict[str, list[str]]
    parts: dict[str, tuple[str, ...]]
    empty: tuple[str, ...] = ()
    ignored: int = 0
    unlabelled: tuple[tuple[str, str], ...] = ()
    root: Path | None = None
    dataset: Dataset[Any] | None = field(default=None, repr=False)


def natural(name: str) -> tuple[Any, ...]:
    """Sorting key: path parts one by one, runs of digits as numbers (``class2`` before ``class10``)."""
    pieces = [
        tuple(int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]{1,18})", part)))
        for part in name.split("/")
    ]
    return (*pieces, (name,))


# Folders


def read_folder(root: Path, class_level: int | None = None) -> Catalog:
    """List the images below `root`: a class is a folder that directly holds images, named by its path from `root`.

    With `class_level`, paths are cut after so many folders, and images of deeper folders belong to that class. Hidden
    files and folders are passed over; images directly in `root` are in no class.

    Raises
    ------
    InputError
        If a folder can't be read, or if there is no image.
    """
    images, ignored = _scan(root)
    loose = images.pop("", [])
    holding = {parent for folder in images if images[folder] for parent in _upwards(folder)}
    # A folder below a class folder is no class of its own for being empty; nor is one below the level of the classes.
    empty = sorted(
        folder
        for folder in images
        if folder not in holding
        and ((parent := folder.rpartition("/")[0]) in holding or not parent)
        and not images.get(parent)
        and (class_level is None or folder.count("/") < class_level)
    )
    found: dict[str, list[str]] = {}
    for folder, names in images.items():
        if names:
            label = "/".join(folder.split("/")[:class_level])
            found.setdefault(label, []).extend(f"{folder}/{name}" for name in names)
    if not found:
        hint = f"; {len(loose)} lie in it directly, without a class folder" if loose else ""
        raise InputError(f"no class folder in {root} holds an image ({' '.join(SUFFIXES)}){hint}")
    keys = {shown(name): found[name] for name in sorted(found, key=natural)}
    parts = {name: tuple(name.split("/")) for name in keys}
    return Catalog(str(root), "folder", keys, parts, tuple(map(shown, empty)), ignored + len(loose), root=root)


def _scan(root: Path) -> tuple[dict[str, list[str]], int]:
    """Names of the images directly in each folder below `root`, and how many other files there are.

    Links to folders are followed, after all real folders, to folders not seen before: so no loop can hang the scan.
    """
    images: dict[str, list[str]] = {}
    ignored = 0
    folders, links = [""], list[str]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            info = os.stat(root / folder)
            if (info.st_dev, info.st_ino) in seen:
                ignored += 1
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(root / folder) as entries:
                visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"cannot read the folder {root / folder}: {error.strerror}") from error
        names = images.setdefault(folder, [])
        for entry in visible:
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{folder}/{entry.name}".lstrip("/"))
            elif entry.name.lower().endswith(SUFFIXES):
                names.append(entry.name)
            else:
                ignored += 1
    _demote_picture_folders(images)
    return images, ignored


def _demote_picture_folders(images: dict[str, list[str]]) -> None:
    """A folder named as a picture that holds none counts as a picture of its parent: a bad one, listed as such."""
    holding = {parent for folder in images if images[folder] for parent in _upwards(folder)}
    for folder in [name for name in images if name not in holding and name.lower().endswith(SUFFIXES)]:
        parent, _, name = folder.rpartition("/")
        if images.get(parent):
            del images[folder]
            images[parent].append(name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: not a folder, and a bad image if it is named as one
        return False


def _upwards(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def shown(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that aren't UTF-8 as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# Manifests


def read_manifest(path: Path, class_level: int | None = None) -> Catalog:
    """List the images in a table with the columns path and label (UTF-8, commas; other columns are passed over).

    Relative paths are relative to the table. The parts of a label between slashes are its folder path, which
    `class_level` cuts. A file that isn't there is found out when it is decoded.

    Raises
    ------
    InputError
        If the table can't be read, lacks a column or an entry, or puts one image in two classes.
    """
    labels: dict[str, str] = {}
    spelled: dict[str, str] = {}  # one file may be written in several ways
    repeated = 0
    for line, image, label in _rows(path):
        if not image or not label:
            raise InputError(f"{path}, line {line}: {'path' if not image else 'label'} is empty")
        key = spelled.setdefault(os.path.abspath(path.parent / image), Path(image).as_posix())
        name = "/".join(label.split("/")[:class_level])
        if labels.setdefault(key, name) != name:
            raise InputError(f"{path}, line {line}: {image} is in class {labels[key]!r} already, and now in {name!r}")
        repeated += 1
    if not labels:
        raise InputError(f"{path} lists no image")
    keys: dict[str, list[str]] = {name: [] for name in sorted(set(labels.values()), key=natural)}
    for key, name in labels.items():
        keys[name].append(key)
    parts = {name: tuple(part for part in name.split("/") if part) or (name,) for name in keys}
    return Catalog(str(path), "manifest", keys, parts, ignored=repeated - len(labels), root=path.parent)


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if missing := {"path", "label"} - set(header):
                wanted = " and ".join(sorted(missing, reverse=True))
                raise InputError(f"{path} has no column {wanted}: a manifest has path,label; its header is {header}")
            image, label = header.index("path"), header.index("label")
            for row in reader:
                if row:
                    row += [""] * (len(header) - len(row))
                    yield reader.line_num, row[image], row[label].strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise InputError(f"{path} is not a comma-separated table: line {reader.line_num}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
