"""Manifests: a table of paths and labels, read line by line as often as need be and never held."""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from gpuclust.capture.catalog import Catalog, natural
from gpuclust.capture.keys import Keys, Wanted
from gpuclust.errors import InputError

# A path that no normalisation changes: no part of it is empty, a dot or two.
_NORMAL = re.compile(r"/?(?!\.{0,2}(/|$))[^/]+(/(?!\.{0,2}(/|$))[^/]+)*") if os.sep == "/" else None


def read_manifest(path: Path, class_level: int | None = None) -> Catalog:
    """Count the images in a table with the columns path and label (UTF-8, commas; other columns are passed over).

    Relative paths are relative to the table. The parts of a label between slashes are its folder path, which
    `class_level` cuts. A file that isn't there is found out when it is decoded. While the table is read for the first
    time some 60 bytes a line are held, to find the images that are there twice.

    Raises
    ------
    InputError
        If the table can't be read, lacks a column or an entry, or puts one image in two classes.
    """
    numbers: dict[str, int] = {}
    hashes, classes = bytearray(), array("i")
    base = os.path.join(os.path.abspath(path.parent), "")
    for line, image, label in _rows(path):
        if not image or not label:
            raise InputError(f"{path}, line {line}: {'path' if not image else 'label'} is empty")
        hashes += blake2b(_absolute(base, image).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        classes.append(numbers.setdefault(_class(label, class_level), len(numbers)))
    if not numbers:
        raise InputError(f"{path} lists no image")
    of_class = np.frombuffer(classes, np.intc)
    first = _first_of_each(np.frombuffer(hashes, np.uint64).reshape(-1, 2))
    repeats = np.flatnonzero(first != np.arange(len(first)))
    moved = repeats[of_class[repeats] != of_class[first[repeats]]]
    if len(moved):
        before = list(numbers)[of_class[first[moved[0]]]]
        line, image, label = next(row for i, row in enumerate(_rows(path)) if i == moved[0])
        raise InputError(
            f"{path}, line {line}: {image} is in class {before!r} already, and now in {_class(label, class_level)!r}"
        )
    totals = np.bincount(np.delete(of_class, repeats), minlength=len(numbers))
    counts = {name: int(totals[numbers[name]]) for name in sorted(numbers, key=natural)}

    def walk(wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        found = {name: Keys() for name in wanted}
        again = iter(repeats.tolist())
        repeat = next(again, None)
        for i, (_, image, label) in enumerate(_rows(path)):
            if i == repeat:
                repeat = next(again, None)
            elif (want := wanted.get(name := _class(label, class_level))) and want(key := _posix(image)):
                found[name].append(key)
        for name in wanted:
            yield name, found.pop(name)

    parts = {name: tuple(part for part in name.split("/") if part) or (name,) for name in counts}
    return Catalog(str(path), "manifest", counts, walk, parts, ignored=len(repeats), root=path.parent)


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """For each line the first line that has the same hash (n, 2)."""
    order = np.lexsort(hashes.T)  # stable: equal ones stay in the order of the lines
    fresh = np.ones(len(order), bool)
    fresh[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
    return first


def _class(label: str, class_level: int | None) -> str:
    return "/".join(label.split("/")[:class_level])


def _absolute(base: str, image: str) -> str:
    """One file may be written in several ways; this is the same for all of them."""
    if _NORMAL and _NORMAL.fullmatch(image):
        return image if image[0] == "/" else base + image
    return os.path.abspath(os.path.join(base, image))


def _posix(image: str) -> str:
    return image if _NORMAL and _NORMAL.fullmatch(image) else Path(image).as_posix()


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
