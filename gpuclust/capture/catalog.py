"""What images there are, by class: a folder of class folders. Nothing is decoded, chosen or held here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gpuclust.capture.keys import Walk, Wanted
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
    counts : dict of str to int
        How many images each class has, classes in their final order.
    walk : Walk
        Through the keys of the images: paths relative to `root` in POSIX form, or the indices of a data set in digits.
        It reads the folders or the manifest again, since a catalog of millions of images should take no memory.
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
    counts: dict[str, int]
    walk: Walk
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


@dataclass
class _Folder:
    """How many images lie in a folder itself, and the folders in it that count as images, as bad ones."""

    images: int = 0
    demoted: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.images > 0


def read_folder(root: Path, class_level: int | None = None) -> Catalog:
    """Count the images below `root`: a class is a folder that directly holds images, named by its path from `root`.

    With `class_level`, paths are cut after so many folders, and images of deeper folders belong to that class. Hidden
    files and folders are passed over; images directly in `root` are in no class. Folders are held, images aren't.

    Raises
    ------
    InputError
        If a folder can't be read, or if there is no image.
    """
    folders, ignored = _scan(root)
    loose = folders.pop("").images
    holding = _holding(folders)
    # A folder below a class folder is no class of its own for being empty; nor is one below the level of the classes.
    empty = sorted(
        folder
        for folder in folders
        if folder not in holding
        and ((parent := folder.rpartition("/")[0]) in holding or not parent)
        and not folders.get(parent)
        and (class_level is None or folder.count("/") < class_level)
    )
    found: dict[str, list[str]] = {}
    for folder, content in folders.items():
        if content:
            found.setdefault("/".join(folder.split("/")[:class_level]), []).append(folder)
    if not found:
        hint = f"; {loose} lie in it directly, without a class folder" if loose else ""
        raise InputError(f"no class folder in {root} holds an image ({' '.join(SUFFIXES)}){hint}")
    places = {shown(name): found[name] for name in sorted(found, key=natural)}
    demoted = {folder: content.demoted for folder, content in folders.items() if content.demoted}

    def walk(wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        for name, want in wanted.items():
            keys = (f"{folder}/{image}" for folder in places[name] for image in _images(root, folder, demoted))
            yield name, filter(want, keys)

    return Catalog(
        str(root),
        "folder",
        {name: sum(folders[folder].images for folder in some) for name, some in places.items()},
        walk,
        {name: tuple(name.split("/")) for name in places},
        tuple(map(shown, empty)),
        ignored + loose,
        root=root,
    )


def _scan(root: Path) -> tuple[dict[str, _Folder], int]:
    """Each folder below `root`, and how many files that are no images there are.

    Links to folders are followed, after all real folders, to folders not seen before: so no loop can hang the scan.
    """
    found: dict[str, _Folder] = {}
    ignored = 0
    folders, links = [""], list[str]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            info = os.stat(root / folder)
        except OSError as error:
            raise _unreadable(root / folder, error) from error
        if (info.st_dev, info.st_ino) in seen:
            ignored += 1
            continue
        seen.add((info.st_dev, info.st_ino))
        content = found[folder] = _Folder()
        below = list[tuple[str, bool]]()
        for entry in _entries(root / folder):
            if _is_folder(entry):
                below.append((f"{folder}/{entry.name}".lstrip("/"), entry.is_symlink()))
            elif entry.name.lower().endswith(SUFFIXES):
                content.images += 1
            else:
                ignored += 1
        for name, is_link in sorted(below):
            (links if is_link else folders).append(name)
    _demote_picture_folders(found)
    return found, ignored


def _images(root: Path, folder: str, demoted: dict[str, list[str]]) -> Iterator[str]:
    """The names of the images in a folder, in any order."""
    for entry in _entries(root / folder):
        if entry.name.lower().endswith(SUFFIXES) and not _is_folder(entry):
            yield entry.name
    yield from demoted.get(folder, ())


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, one by one, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] != ".":
                    yield entry
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot read the folder {folder}: {error.strerror}")


def _holding(folders: dict[str, _Folder]) -> set[str]:
    """The folders that hold images themselves or below them."""
    return {parent for folder, content in folders.items() if content for parent in _upwards(folder)}


def _demote_picture_folders(folders: dict[str, _Folder]) -> None:
    """A folder named as a picture that holds none counts as a picture of its parent: a bad one, listed as such."""
    holding = _holding(folders)
    for folder in [name for name in folders if name not in holding and name.lower().endswith(SUFFIXES)]:
        parent, _, name = folder.rpartition("/")
        if folders.get(parent):
            del folders[folder]
            folders[parent].images += 1
            folders[parent].demoted.append(name)


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
