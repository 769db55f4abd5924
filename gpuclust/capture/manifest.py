"""Manifests: a table of paths and labels, read line by line as often as need be and never held."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpuclust.capture.catalog import Catalog, natural
from gpuclust.capture.keys import Keys, Wanted
from gpuclust.errors import InputError


def read_manifest(path: Path, class_level: int | None = None) -> Catalog:
    """Count the images in a table with the columns path and label (UTF-8, commas; other columns are passed over).

    Relative paths are relative to the table. The parts of a label between slashes are its folder path, which
    `class_level` cuts. A file that isn't there is found out when it is decoded. While the table is read for the first
    time 8 bytes a line are held, to find the images that are there twice; these are read once more.

    Raises
    ------
    InputError
        If the table can't be read, lacks a column or an entry, or puts one image in two classes.
    """
    base = os.path.join(os.path.abspath(path.parent), "")
    found: dict[str, int] = {}
    hashes = array("q")
    for line, image, label in _rows(path):
        if not image or not label:
            raise InputError(f"{path}, line {line}: {'path' if not image else 'label'} is empty")
        hashes.append(hash(_absolute(base, image)))
        name = _class(label, class_level)
        found[name] = found.get(name, 0) + 1
    if not found:
        raise InputError(f"{path} lists no image")
    repeats = array("q")
    classes: dict[str, str] = {}
    if twice := _twice(hashes):
        for number, (line, image, label) in enumerate(_rows(path)):
            if hash(key := _absolute(base, image)) not in twice:
                continue
            name = _class(label, class_level)
            if key not in classes:
                classes[key] = name
            elif classes[key] == name:
                repeats.append(number)
                found[name] -= 1
            else:
                raise InputError(
                    f"{path}, line {line}: {image} is in class {classes[key]!r} already, and now in {name!r}"
                )

    def walk(wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        chosen = {name: Keys() for name in wanted}
        again = iter(repeats)
        repeat = next(again, None)
        for number, (_, image, label) in enumerate(_rows(path)):
            if number == repeat:
                repeat = next(again, None)
            elif (want := wanted.get(name := _class(label, class_level))) and want(key := _posix(image)):
                chosen[name].append(key)
        for name in wanted:
            yield name, chosen.pop(name)

    counts = {name: found[name] for name in sorted(found, key=natural)}
    parts = {name: tuple(part for part in name.split("/") if part) or (name,) for name in counts}
    return Catalog(str(path), "manifest", counts, walk, parts, ignored=len(repeats), root=path.parent)


def _twice(hashes: array[int]) -> set[int]:
    """The hashes that are there more than once: of images that may be, too. Sorts them where they are."""
    numbers = np.frombuffer(hashes, np.int64)
    numbers.sort()
    return set(numbers[1:][numbers[1:] == numbers[:-1]].tolist())


def _class(label: str, class_level: int | None) -> str:
    return "/".join(label.split("/")[:class_level])


def _absolute(base: str, image: str) -> str:
    """One file may be written in several ways; this is the same for all of them."""
    if _is_normal(image):
        return image if image[0] == "/" else base + image
    return os.path.abspath(os.path.join(base, image))


def _posix(image: str) -> str:
    return image if _is_normal(image) else Path(image).as_posix()


def _is_normal(image: str) -> bool:
    """Whether it is plain at a glance that no part of a path is empty, a dot or two: most are, and pathlib is slow."""
    return os.sep == "/" and image[0] != "." and image[-1] != "/" and "//" not in image and "/." not in image


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
