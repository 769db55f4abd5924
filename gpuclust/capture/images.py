"""Image sources: which images of which classes take part, and their batches in a fixed order."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpuclust.capture.batches import Batch, grouped, joined, unchanged
from gpuclust.capture.catalog import Catalog, read_folder, shown
from gpuclust.capture.codec import require_torchcodec
from gpuclust.capture.datasets import open_torchvision, read_dataset
from gpuclust.capture.decode import BadImage
from gpuclust.capture.keys import Keys, SeededOrder
from gpuclust.capture.loader import (
    CHUNK,
    FEW_IMAGES,
    Chunks,
    DatasetReader,
    FileReader,
    Reader,
    Transform,
    cannot_be_sent,
    default_workers,
    load_chunks,
    random_from,
    shapes_differ,
)
from gpuclust.capture.manifest import read_manifest
from gpuclust.capture.models import call_object
from gpuclust.capture.transport import ByteTransform
from gpuclust.config import DECODERS
from gpuclust.errors import InputError

DATA = (
    "data is a folder of class folders, a manifest .csv, torchvision:NAME:ROOT, package.module:callable, "
    "or a torch Dataset or DataLoader"
)


@dataclass(frozen=True)
class Skipped:
    """An image that couldn't be used, and why; `class_name` is empty where it failed before its label was known."""

    path: str
    class_name: str
    reason: str


def open_images(
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    class_level: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    on_bad_image: str = "skip",
    max_pixels: int = 100_000_000,
    decoder: str = "pillow",
) -> ImageSource:
    """Find the images of `data`, and choose classes and images. Nothing is decoded yet.

    Parameters
    ----------
    data
        A folder of class folders; a manifest .csv with the columns path and label; ``torchvision:NAME:ROOT`` with
        options as in ``?split=test``; ``package.module:callable`` (the current folder is importable) returning a torch
        Dataset or DataLoader of (image, label); or such an object itself.
    classes
        Names of the classes that take part; all by default.
    class_level
        Cut the folder path that names a class after so many folders.
    per_class
        Images of each class; what the smallest class has by default.
    seed
        Of the choice: the images of a class are taken in the order of the SHA-256 of ``"{seed}:{path}"``, where path is
        relative, POSIX and Unicode NFC (the index, for a data set). So the choice is the same on every machine.
    on_bad_image
        ``skip`` replaces a bad image by the next of its class in that order and lists it; ``fail`` raises.
    max_pixels
        An image of more pixels is a bad image; known from the header, before it is decoded.
    decoder
        What decodes JPEG files: ``pillow``, or ``torchcodec``, whose pixels differ a little. Others are Pillow's.

    Raises
    ------
    InputError
        If `data` is none of these, isn't there, has fewer than two classes or an empty one, if a class is unknown, or
        if a class has fewer images than `per_class`, or if a decoder is asked for that a data set has no use for.
    UnavailableError
        If torchcodec is asked for and cannot be used here.
    """
    if on_bad_image not in ("skip", "fail"):
        raise InputError(f"on_bad_image is skip or fail; got {on_bad_image!r}")
    for name, value in (("class_level", class_level), ("per_class", per_class), ("max_pixels", max_pixels)):
        if value is not None and value < 1:
            raise InputError(f"{name} is at least 1; got {value}")
    if decoder not in DECODERS:
        raise InputError(f"decoder is one of {', '.join(DECODERS)}; got {decoder!r}")
    if decoder == "torchcodec":
        require_torchcodec()
    catalog = _read(data, class_level)
    if decoder != "pillow" and catalog.dataset is not None:
        raise InputError(f"decoder {decoder} is for image files; {catalog.data} gives its images decoded")
    if on_bad_image == "fail" and catalog.unlabelled:
        key, reason = catalog.unlabelled[0]
        raise InputError(f"item {key} of {catalog.data} is bad: {reason} (on_bad_image is fail)")
    names = _chosen_classes(catalog, classes)
    smallest = min(names, key=lambda name: catalog.counts[name])
    if per_class is not None and per_class > catalog.counts[smallest]:
        raise InputError(
            f"per_class is {per_class}, and class {smallest!r} has {catalog.counts[smallest]} images: "
            "ask for at most that many, or leave that class out with classes"
        )
    return ImageSource(
        catalog,
        names,
        catalog.counts[smallest] if per_class is None else per_class,
        seed=seed,
        on_bad_image=on_bad_image,
        max_pixels=max_pixels,
        decoder=decoder,
    )


class ImageSource:
    """Chosen images of chosen classes; made by `open_images`.

    The order of the images is that of the classes, within a class the seeded one, without bad images; their
    replacements come after all of them, again class by class. It doesn't depend on batch size or workers.

    Attributes
    ----------
    classes : tuple of str
        Sorted, numbers in them as numbers; a data set's own order where it names its classes.
    class_paths : tuple of tuple of str
        Folder path of each class.
    available : dict of str to int
        How many images each class has.
    per_class, n : int
        Images of each class asked for; images in all if none is bad beyond replacement.
    skipped : list of Skipped
        Bad images of the latest pass, filled while its batches are read.
    replaced : int
        How many of them another image stood in for.
    """

    def __init__(
        self,
        catalog: Catalog,
        names: Sequence[str],
        per_class: int,
        *,
        seed: int = 0,
        on_bad_image: str = "skip",
        max_pixels: int = 100_000_000,
        decoder: str = "pillow",
    ) -> None:
        self.classes = tuple(names)
        self.class_paths = tuple(catalog.parts[name] for name in names)
        self.available = {name: catalog.counts[name] for name in names}
        self.per_class = per_class
        self.n = len(names) * per_class
        self.seed, self.on_bad_image, self.max_pixels, self.decoder = seed, on_bad_image, max_pixels, decoder
        self.skipped: list[Skipped] = []
        self.replaced = 0
        self._catalog = catalog
        self._order = SeededOrder(catalog.walk, self.available, seed)
        self._order.reach(dict.fromkeys(names, per_class))
        self._workers = "0"
        self._pictures: bool | None = None
        self._reset()

    def batches(
        self, transform: Transform | None, batch_size: int, workers: int | None = None
    ) -> Generator[Batch, None, None]:
        """One pass over the images; every batch but the last has exactly `batch_size` of them.

        Parameters
        ----------
        transform
            PIL image (RGB) -> tensor ``(c, h, w)``. Tensors of a data set pass as they are, uint8 ones divided by 255.
        batch_size
            Images of a batch.
        workers
            Processes that read ahead; by default one per core up to 8, none for fewer than 64 images, and none where
            the data set or the transform can't be sent to another process.

        Raises
        ------
        InputError
            If a picture has no transform; if the transform fails, with the file's name; if a whole class is bad; at the
            first bad image where `on_bad_image` is ``fail``.
        """
        return joined(self.groups(transform, batch_size, workers))

    def groups(
        self,
        transform: Transform | None,
        batch_size: int,
        workers: int | None = None,
        device: torch.device | None = None,
    ) -> Generator[list[Batch], None, None]:
        """One pass as `batches`, each batch in the parts in which it came, so that nothing need be copied.

        With a device, where `decodes_on` it, images come there: JPEG files are decoded and scaled on it.
        """
        if batch_size < 1 or (workers is not None and workers < 0):
            raise InputError(f"batch_size is at least 1 and workers at least 0; got {batch_size} and {workers}")
        if transform is None and self._catalog.dataset is None:
            raise InputError("image files need a transform: PIL image -> tensor (c, h, w); none is given")
        return grouped(self._pass(transform, min(CHUNK, batch_size), workers, device), batch_size)

    def again(
        self,
        keys: Sequence[str],
        shape: tuple[int, ...],
        transform: Transform | None,
        batch_size: int,
        workers: int | None = None,
        device: torch.device | None = None,
    ) -> Generator[list[Tensor], None, None]:
        """Images that were delivered before, in batches: the parts of each, ``(b, *shape)``; `device` as in `groups`.

        Raises
        ------
        InputError
            If one cannot be read any more, or has another shape.
        """
        reader, size = self._reader(later=device is not None), min(CHUNK, batch_size)
        count = default_workers(len(keys)) if workers is None else workers if len(keys) >= FEW_IMAGES else 0
        if cannot_be_sent(reader, transform):
            count = 0
        chunks = Chunks(reader, transform, list(keys), size, self.seed, shape)
        with closing(grouped(unchanged(load_chunks(chunks, count, device), keys), batch_size)) as groups:
            for parts in groups:
                yield [part.images for part in parts]
                del parts

    def describe(self) -> dict[str, Any]:
        """What was chosen, and what the latest pass delivered and skipped, for JSON."""
        bad = Counter(skipped.class_name for skipped in self.skipped)
        return {
            "data": self._catalog.data,
            "kind": self._catalog.kind,
            "seed": self.seed,
            "classes": list(self.classes),
            "class_paths": [list(parts) for parts in self.class_paths],
            "available": dict(self.available),
            "per_class": self.per_class,
            "delivered": dict(zip(self.classes, self._delivered, strict=True)),
            "replaced": self.replaced,
            "replacements": self._replacements.hexdigest(),
            "skipped_per_class": {name: bad[name] for name in self.classes},
            "skipped": [{"path": s.path, "class": s.class_name, "reason": s.reason} for s in self.skipped],
            "ignored_files": self._catalog.ignored,
            "workers": self._workers,
            "decoder": self.decoder,
        }

    def decodes_on(self, device: torch.device, transform: Transform | None) -> bool:
        """Whether JPEG files are decoded on a GPU: torchcodec was asked for, and the transform's steps take tensors."""
        wanted = self.decoder == "torchcodec" and device.type == "cuda"
        return wanted and isinstance(transform, ByteTransform) and transform.takes_tensors()

    def for_threads(self, transform: Transform | None) -> bool:
        """Whether threads of this process can read and transform the images (`Chunks.for_threads`)."""
        return Chunks(self._reader(), transform, [], 1, self.seed).for_threads()

    def holds_pictures(self) -> bool:
        """Whether the images need a transform: all but a data set's tensors, of which one item is read."""
        if self._pictures is None:
            self._pictures = self._catalog.dataset is None or self._first_is_a_picture()
        return self._pictures

    def fingerprint(self) -> str:
        """A hash of the choice, to know whether a run can be resumed: it changes if a chosen file does.

        Which images replace bad ones, only a pass tells: `describe` has a hash of these.

        Of files: path, size and time of change. Of a data set: its name and length, the chosen indices, and the content
        of the first image of each class.
        """
        known = [self._catalog.kind, self.classes, self.seed, self.on_bad_image, self.max_pixels]
        digest = hashlib.sha256(json.dumps(known).encode())
        dataset, root = self._catalog.dataset, self._catalog.root
        orders = [self._order[name] for name in self.classes]
        if dataset is not None:
            opening = json.dumps([self._catalog.data, len(dataset), []])  # type: ignore[arg-type]
            digest.update(opening.removesuffix("]]").encode())
            for i, order in enumerate(orders):
                digest.update(f"{', ' if i else ''}{json.dumps(order[: self.per_class])}".encode())
            digest.update(b"]]")
            for order in orders:
                digest.update(self._content(order[0]))
        elif root is not None:
            for key in (order[i] for order in orders for i in range(min(self.per_class, len(order)))):
                digest.update(self._state(root, key))
        return digest.hexdigest()

    def _state(self, root: Path, key: str) -> bytes:
        try:
            info = os.stat(os.path.join(root, key))
            state = [key, info.st_size, info.st_mtime_ns]
        except (OSError, ValueError) as error:  # a bad image; that it is one is part of the state
            state = [key, type(error).__name__]
        return json.dumps(state).encode()

    def _first_is_a_picture(self) -> bool:
        for name in self.classes:
            try:
                return not isinstance(self._item(self._order[name][0]), Tensor)
            except BadImage:
                continue
        return False

    def _item(self, key: str) -> Any:
        with random_from(self.seed, key):
            return self._reader().read(key)

    def _content(self, key: str) -> bytes:
        try:
            image = self._item(key)
        except BadImage as error:  # that it is one is part of the state
            return str(error).encode()
        if isinstance(image, Tensor):
            return image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return image.tobytes()

    def _reader(self, later: bool = False) -> Reader:
        if self._catalog.dataset is not None:
            return DatasetReader(self._catalog.dataset)
        assert self._catalog.root is not None
        return FileReader(self._catalog.root, self.max_pixels, "later" if later else self.decoder)

    def _reset(self) -> None:
        self.skipped[:] = [Skipped(key, "", reason) for key, reason in self._catalog.unlabelled]
        self.replaced = 0
        self._replacements = hashlib.sha256()
        self._delivered = [0] * len(self.classes)
        self._bad = [0] * len(self.classes)

    def _pass(
        self, transform: Transform | None, size: int, workers: int | None, device: torch.device | None
    ) -> Generator[Batch, None, None]:
        """All images in batches of any size: the chosen ones, then rounds of replacements until none is missing."""
        self._reset()
        reader = self._reader(later=device is not None)
        unsendable = cannot_be_sent(reader, transform)
        count = 0 if unsendable else default_workers(self.n) if workers is None else workers
        self._workers = f"0, since they cannot be sent to another process: {unsendable}" if unsendable else str(count)
        taken, wanted = [0] * len(self.classes), [self.per_class] * len(self.classes)
        jobs = self._jobs(taken, wanted)
        first_round, shape = True, None
        while jobs:
            missing = [0] * len(self.classes)
            chunks = Chunks(reader, transform, jobs, size, self.seed)  # type: ignore[arg-type]
            processes = count if first_round or len(jobs) >= FEW_IMAGES else 0
            with closing(load_chunks(chunks, processes, device)) as loaded:
                for chunk in loaded:
                    for position, reason in chunk.bad:
                        self._skip(jobs.label(position), jobs[position], reason)
                        missing[jobs.label(position)] += 1
                    if not chunk.good:
                        continue
                    keys = [jobs[position] for position in chunk.good]
                    labels = np.array([jobs.label(position) for position in chunk.good], dtype=np.int64)
                    shape = shape or chunk.images.shape[1:]
                    if chunk.images.shape[1:] != shape:
                        raise InputError(f"image {keys[0]}: {shapes_differ(shape, chunk.images.shape[1:])}")
                    for i in labels.tolist():
                        self._delivered[i] += 1
                    if not first_round:
                        self.replaced += len(keys)
                        for key in keys:
                            root = self._catalog.root
                            self._replacements.update(self._state(root, key) if root else key.encode())
                    yield Batch(chunk.images, labels, list(map(shown, keys)), chunk.thumbs, keys)
                    del chunk  # its memory may be wanted for the next
            taken = [have + more for have, more in zip(taken, wanted, strict=True)]
            jobs, wanted = self._jobs(taken, missing), missing
            first_round = False

    def _jobs(self, taken: list[int], more: list[int]) -> _Jobs:
        """So many more images of each class after those that were taken, or all that there are."""
        ends = {name: taken[i] + more[i] for i, name in enumerate(self.classes) if more[i]}
        self._order.reach(ends)
        return _Jobs([self._order[name] for name in self.classes], taken, more)

    def _skip(self, index: int, key: str, reason: str) -> None:
        name = self.classes[index]
        if self.on_bad_image == "fail":
            raise InputError(f"image {shown(key)} of class {name!r} is bad: {reason} (on_bad_image is fail)")
        self.skipped.append(Skipped(shown(key), name, reason))
        self._bad[index] += 1
        if self._bad[index] == self.available[name]:
            raise InputError(
                f"all {self.available[name]} images of class {name!r} are bad; the last, {shown(key)}: {reason}"
            )


class _Jobs(Sequence[str]):
    """The keys of one round of a pass, class by class; none of them is held a second time."""

    def __init__(self, orders: Sequence[Keys], taken: Sequence[int], more: Sequence[int]) -> None:
        self._orders, self._taken = orders, tuple(taken)
        counts = [min(len(order), have + add) - have for order, have, add in zip(orders, taken, more, strict=True)]
        self._starts = [0, *accumulate(max(count, 0) for count in counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def label(self, position: int) -> int:
        """The class of the image at a position."""
        return bisect_right(self._starts, position) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        label = self.label(index)
        return self._orders[label][self._taken[label] + index - self._starts[label]]


def _read(data: Any, class_level: int | None) -> Catalog:
    text = os.fspath(data) if isinstance(data, (str, os.PathLike)) else None
    if text is not None and os.path.isdir(text):
        return read_folder(Path(text), class_level)
    if text is not None and os.path.isfile(text) and text.lower().endswith(".csv"):
        return read_manifest(Path(text), class_level)
    if isinstance(data, (Dataset, DataLoader)):
        found, name = data, None
    elif text is None:
        raise InputError(f"{DATA}; got {type(data).__name__}")
    elif text.startswith("torchvision:"):
        found, name = open_torchvision(text), text
    elif re.fullmatch(r"[^\W\d]\w*(\.\w+)*:\w+(\.\w+)*", text):
        found, name = call_object(text), text
        if not isinstance(found, (Dataset, DataLoader)):
            raise InputError(
                f"{text} returns a torch Dataset or DataLoader of (image, label); got {type(found).__name__}"
            )
    else:
        there = "is a file that is no manifest .csv" if os.path.isfile(text) else "is not there"
        raise InputError(f"{text!r} {there}: {DATA}")
    if class_level is not None:
        raise InputError(
            f"class_level cuts folder paths; the classes of a data set have none ({name or type(data).__name__})"
        )
    return read_dataset(found, name)


def _chosen_classes(catalog: Catalog, classes: Sequence[str] | None) -> list[str]:
    """The names that take part, in the catalog's order."""
    if classes is None:
        if catalog.empty:
            raise InputError(
                f"no image in class folder {', '.join(map(repr, catalog.empty[:5]))} of {catalog.data}: "
                "remove it, or name the classes that take part"
            )
        chosen = list(catalog.counts)
    else:
        for name in classes:
            if name in catalog.empty:
                raise InputError(f"class {name!r} of {catalog.data} holds no image")
            if name not in catalog.counts:
                close = difflib.get_close_matches(name, catalog.counts, n=4, cutoff=0.4) or list(catalog.counts)[:4]
                raise InputError(
                    f"no class {name!r} in {catalog.data}, which has {len(catalog.counts)}; close: {', '.join(close)}"
                )
        chosen = [name for name in catalog.counts if name in set(classes)]
    if len(chosen) < 2:
        raise InputError(
            f"clusters are compared with two classes or more; {catalog.data} has {len(catalog.counts)}, of which "
            f"{len(chosen)} take part: {', '.join(chosen) or 'none'}"
        )
    return chosen
