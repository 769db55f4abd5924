"""Keys: many short texts in one piece of memory, and those of each class that stand first in the seeded order."""

from __future__ import annotations

import math
import os
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, overload

from gpuclust.capture.loader import key_hash

# Which classes are walked through, and which keys of each are wanted.
Wanted = Mapping[str, Callable[[str], bool]]


class Walk(Protocol):
    """A way through the keys of a catalog that holds none of them itself."""

    def __call__(self, wanted: Wanted) -> Iterator[tuple[str, Iterable[str]]]:
        """Each class of `wanted` once, with those of its keys that are wanted; read them before going on."""


class Keys(Sequence[str]):
    """Texts, at their length in UTF-8 and 8 bytes each; what they all begin with is held once.

    A list of paths as Python holds them takes some 100 bytes each.
    """

    def __init__(self, keys: Iterable[str] = (), prefix: str = "") -> None:
        self._prefix, self._text, self._ends = prefix, bytearray(), array("Q")
        for key in keys:
            self.append(key)

    def append(self, key: str) -> None:
        """Add a text, which begins with the prefix."""
        # File names that aren't UTF-8 have lone surrogates.
        self._text += key[len(self._prefix) :].encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._prefix + self._text[start : self._ends[index]].decode("utf-8", "surrogatepass")


class SeededOrder:
    """The keys of each class in the order of the SHA-256 of ``"{seed}:{key}"``, as far as they have been asked for.

    A hash is a uniform number, so the first m of a class with count keys are, but for chance, among those whose hash
    is below m / count and a margin. Only these are ever held; where chance, or bad images, ask for more, the class is
    walked through again with a higher limit. The order is the same whatever was asked for.

    Parameters
    ----------
    walk
        Through the catalog's keys.
    counts : dict of str to int
        How many keys each class has.
    seed
        Of the order.
    """

    def __init__(self, walk: Walk, counts: Mapping[str, int], seed: int) -> None:
        self._walk, self._counts, self._seed = walk, counts, seed
        self._found: dict[str, Keys] = {}
        self._whole: set[str] = set()

    def __getitem__(self, name: str) -> Keys:
        """The first keys of a class: as many as `reach` made sure of, and perhaps more."""
        return self._found[name]

    def reach(self, needed: Mapping[str, int]) -> None:
        """See to it that so many keys of these classes are there, or all of a class that has no more."""
        # Twice as many as there are, so that a class of bad images is walked through a few times only.
        short = {
            name: max(need, 2 * len(self._found.get(name, ())))
            for name, need in needed.items()
            if not self._has(name, need)
        }
        while short:
            shares = {name: (need + 4 * math.isqrt(need) + 16) / self._counts[name] for name, need in short.items()}
            for name, keys in self._walk({name: self._below(share) for name, share in shares.items()}):
                ordered = sorted(keys, key=self._rank)
                prefix = os.path.commonprefix(ordered)  # noqa: RUF071 - of the characters, not of whole folders
                self._found[name] = Keys(ordered, prefix)
            self._whole.update(name for name, share in shares.items() if share >= 1)
            short = {name: 2 * need for name, need in short.items() if not self._has(name, need)}

    def _has(self, name: str, need: int) -> bool:
        return name in self._whole or len(self._found.get(name, ())) >= need

    def _below(self, share: float) -> Callable[[str], bool]:
        if share >= 1:
            return _any
        limit = int(share * 2**64).to_bytes(8, "big")
        return lambda key: self._rank(key)[0] < limit

    def _rank(self, key: str) -> tuple[bytes, str]:
        return key_hash(self._seed, key if key.isascii() else unicodedata.normalize("NFC", key)), key


def _any(key: str) -> bool:
    return True
