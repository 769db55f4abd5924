"""Reading images in worker processes: keys go in, chunks of tensors come out in the same order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import re
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpuclust.capture.codec import Encoded, decode_here, decode_on
from gpuclust.capture.decode import BROKEN, BadImage, decode_file, encode_thumbnail, to_rgb, words
from gpuclust.capture.transport import ByteTransform, Transform
from gpuclust.errors import GpuclustError, InputError, is_out_of_memory

MAX_WORKERS = 8
FEW_IMAGES = 64  # fewer are decoded before the workers have started
CHUNK = 16


class Reader(Protocol):
    """Where the image of a key comes from: an RGB picture or its file, or a tensor that is ready for the network."""

    def read(self, key: str) -> Image.Image | Encoded | Tensor:
        """The image, or `BadImage`."""


@dataclass(frozen=True)
class FileReader:
    """Keys are paths relative to `root`; `decoder` is one of `DECODERS`, or ``later`` to leave JPEG files encoded."""

    root: Path
    max_pixels: int
    decoder: str = "pillow"

    def read(self, key: str) -> Image.Image | Encoded:
        jpeg = {"pillow": None, "torchcodec": decode_here, "later": Encoded}[self.decoder]
        return decode_file(self.root / key, self.max_pixels, jpeg)


@dataclass(frozen=True)
class DatasetReader:
    """Keys are indices of `dataset` in digits."""

    dataset: Dataset[Any]

    def read(self, key: str) -> Image.Image | Tensor:
        try:
            image = self.dataset[int(key)][0]
            if isinstance(image, Image.Image):
                return to_rgb(image)
        except BadImage:
            raise
        except Exception as error:  # whatever a user's data set raises on one item is one bad image
            if is_out_of_memory(error):
                raise
            raise BadImage(f"{type(error).__name__}: {error}") from error
        if not isinstance(image, Tensor):
            raise TypeError(f"the image of an item is a PIL image or a tensor (c, h, w); got {type(image).__name__}")
        return image


@dataclass(frozen=True)
class Chunk:
    """What became of some of the keys, by their positions among all keys.

    Attributes
    ----------
    images : Tensor (b, c, h, w)
        float32; uint8 of a `ByteTransform`.
    good : list of int
        Positions of the rows of `images`.
    thumbs : list of bytes
        A small JPEG of each row; none if they were not asked for.
    bad : list of (int, str)
        Positions and reasons of the images that can't be used.
    waiting : list of Tensor and Encoded
        What the rows of `images` will be made of; `images` is empty then.
    fault : (str, str), optional
        What went wrong in the transform or the data set's types, and its traceback: nothing an image is to blame for.
        It travels as text since not every exception can be pickled.
    """

    images: Tensor
    good: list[int]
    thumbs: list[bytes]
    bad: list[tuple[int, str]]
    fault: tuple[str, str] | None = None
    waiting: list[Tensor | Encoded] = field(default_factory=list)


class Chunks(Dataset[Chunk]):
    """`keys`, read and transformed `size` at a time; sent to the workers, pickled where they need that.

    Random numbers that an item or the transform draws from Python's, NumPy's or torch's global generators depend on
    `seed` and the key alone, and leave the generators as they were.

    Where `shape` is given, the images were read before: one of another shape now is a bad one, and no small pictures
    are made.
    """

    def __init__(
        self,
        reader: Reader,
        transform: Transform | None,
        keys: list[str],
        size: int,
        seed: int,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.reader, self.transform, self.keys, self.size, self.seed = reader, transform, keys, size, seed
        self.shape = shape
        # To set three generators and set them back takes a third of the time of a small picture.
        known = isinstance(reader, FileReader) and isinstance(transform, ByteTransform) and not transform.draws()
        self._draws = not known

    def __len__(self) -> int:
        return -(-len(self.keys) // self.size)

    def __getitem__(self, index: int) -> Chunk:
        return self.load(index)

    def load(self, index: int, pool: Executor | None = None) -> Chunk:
        """The chunk of that number, its images read one after the other, or side by side in a pool of threads."""
        positions = range(index * self.size, min((index + 1) * self.size, len(self.keys)))
        if pool is None:
            return self._collected(positions, lambda position: self._load(self.keys[position]))
        reading = {position: pool.submit(self._load, self.keys[position]) for position in positions}
        return self._collected(positions, lambda position: reading.pop(position).result())

    def for_threads(self) -> bool:
        """Whether threads can read them: they run side by side in Pillow, and nothing draws from a generator."""
        files = isinstance(self.reader, FileReader) and self.reader.decoder == "pillow"
        return files and not self._draws and isinstance(self.transform, ByteTransform) and self.transform.on_pictures()

    def finished(self, chunk: Chunk, device: torch.device) -> Chunk:
        """The chunk with its images on the device, where the files among them are decoded and transformed."""
        if not chunk.waiting:
            return replace(chunk, images=chunk.images.to(device))
        transform = self.transform
        assert isinstance(transform, ByteTransform)
        decoded = iter(decode_on(device, [item for item in chunk.waiting if isinstance(item, Encoded)]))
        items, thumbs = iter(chunk.waiting), iter(chunk.thumbs)

        def load(_: int) -> tuple[Tensor, list[bytes]]:
            item, thumb = next(items), list(islice(thumbs, 1))
            if not isinstance(item, Encoded):
                return item.to(device), thumb
            picture = next(decoded)
            if isinstance(picture, str):
                raise BadImage(picture)
            return transform.on_tensor(picture), thumb

        made = self._collected(chunk.good, load)
        return replace(made, bad=sorted(chunk.bad + made.bad), fault=made.fault or chunk.fault)

    def _collected(
        self, positions: Iterable[int], load: Callable[[int], tuple[Tensor | Encoded, list[bytes]]]
    ) -> Chunk:
        """The chunk of what ``load`` gives for each position: an image, or a file, and its thumbnail or none."""
        images: list[Tensor | Encoded] = []
        good: list[int] = []
        thumbs: list[bytes] = []
        bad: list[tuple[int, str]] = []
        fault = None
        for position in positions:
            key = self.keys[position]
            try:
                with random_from(self.seed, key) if self._draws else nullcontext():
                    image, thumb = load(position)
                self._check([*images[:1], image])
            except BadImage as error:
                bad.append((position, str(error)))
                continue
            except Exception as error:  # raised again in the main process, with the key
                if is_out_of_memory(error):  # no image is to blame, and the run may go on with less
                    raise
                fault = (f"{key}: {type(error).__name__}: {error}", traceback.format_exc())
                break
            images.append(image)
            good.append(position)
            thumbs += thumb
        ready = [image for image in images if isinstance(image, Tensor)]
        if len(ready) < len(images):
            return Chunk(torch.empty(0), good, thumbs, bad, fault, images)
        return Chunk(torch.stack(ready) if ready else torch.empty(0), good, thumbs, bad, fault)

    def _check(self, images: Sequence[Tensor | Encoded]) -> None:
        """Raise what is wrong with the shape of the last image; files are not looked at."""
        shapes = [image.shape for image in images if isinstance(image, Tensor)]
        if shapes and self.shape is not None and shapes[-1] != self.shape:
            raise BadImage(f"its shape is {tuple(shapes[-1])} and was {tuple(self.shape)}")
        if shapes and shapes[-1] != shapes[0]:
            raise ValueError(shapes_differ(shapes[0], shapes[-1]))

    def _load(self, key: str) -> tuple[Tensor | Encoded, list[bytes]]:
        image = self.reader.read(key)
        if isinstance(image, Encoded):
            try:
                return image, [] if self.shape else [encode_thumbnail(image.small())]
            except BROKEN as error:
                raise BadImage(words(error)) from error
        if not isinstance(image, Tensor):
            thumbs = [] if self.shape else [encode_thumbnail(image)]
            if self.transform is None:
                raise TypeError("a picture needs a transform to become a tensor (c, h, w), and none is given")
            given = self.transform(image)
            return given if isinstance(self.transform, ByteTransform) else _network_input(given), thumbs
        if isinstance(self.transform, ByteTransform):
            raise TypeError("the data set's first image is a picture, and this one a tensor: they are one or the other")
        tensor = _network_input(image)
        return tensor, [] if self.shape else [encode_thumbnail(tensor)]


def load_chunks(chunks: Chunks, workers: int, device: torch.device | None = None) -> Generator[Chunk, None, None]:
    """The chunks in order, read ahead by `workers` processes, or by this one (0) when they are wanted, in threads where
    they can be. The result doesn't depend on `workers`.

    Files that a reader left encoded are decoded here, on `device`.

    Raises
    ------
    InputError
        If the transform fails, or if what it or the data set gives isn't a picture or tensor of one shape.
    GpuclustError
        If one of the processes dies.
    """
    loaded = _read_ahead(chunks, min(workers, len(chunks))) if workers else _read_here(chunks)
    with closing(loaded):
        for chunk in loaded:
            if device is not None:
                chunk = chunks.finished(chunk, device)
            if chunk.fault:
                error = InputError(f"image {chunk.fault[0]}")
                error.add_note(chunk.fault[1])
                raise error
            yield chunk
            del chunk  # its memory may be wanted for the next


def _read_here(chunks: Chunks) -> Generator[Chunk, None, None]:
    with ThreadPoolExecutor(_cores()) if chunks.for_threads() else nullcontext() as pool:
        for index in range(len(chunks)):
            yield chunks.load(index, pool)


def _read_ahead(chunks: Chunks, workers: int) -> Generator[Chunk, None, None]:
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else making an iterator would draw from the global one
        prefetch_factor=4,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        if not re.search(r"DataLoader worker .*(exited|killed)", str(error)):
            raise
        raise GpuclustError(
            f"a process that reads images died: {' '.join(str(error).split())}. Most often memory or /dev/shm ran out: "
            f"take fewer than {workers} workers (--workers), or none (--workers 0)"
        ) from error
    finally:  # at once, not when the last traceback that holds the iterator is gone
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def default_workers(images: int) -> int:
    """A process per core up to `MAX_WORKERS`; none for few images."""
    return 0 if images < FEW_IMAGES else _cores()


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def cannot_be_sent(reader: Reader, transform: Transform | None) -> str | None:
    """Why worker processes can't be given these objects, or None. Forked workers have them already."""
    if multiprocessing.get_start_method() == "fork":
        return None
    try:
        pickle.Pickler(_Nowhere(), pickle.HIGHEST_PROTOCOL).dump((reader, transform))
    except Exception as error:  # pickling runs the user's own code
        return f"{type(error).__name__}: {error}"
    return None


def shapes_differ(first: tuple[int, ...], other: tuple[int, ...]) -> str:
    return (
        f"its shape is {tuple(other)} where the images before have {tuple(first)}: a transform that resizes is needed"
    )


def key_hash(seed: int, key: str) -> bytes:
    """The place of a key in the seeded order, and the seed of its own random numbers: the same on every machine."""
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


@contextmanager
def random_from(seed: int, key: str) -> Iterator[None]:
    own = int.from_bytes(key_hash(seed, key)[:4], "little")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own)
            random.seed(own)
            np.random.seed(own)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _network_input(image: Any) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3:
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"an image for the network is a tensor (c, h, w); got {got}")
    image = image.detach()
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal; the main process alone answers it, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
