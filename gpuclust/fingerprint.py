"""Fingerprint: a hash of the code that an object runs, the same in each process and on each machine.

Counted is the code of functions and classes that lie in no installed package, with the literals in it: defaults and
constants of classes. Followed are names that functions use, what they close over, attributes and lists of them, since
transforms and networks hold others there. Installed packages are named, and known by their versions. Values are not
counted, for some count calls or hold times and paths: whether they tell, the first image's activations say
(`gpuclust.identity`). Nor are hooks, or what only running would tell, as ``getattr`` with a computed name.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Literals: what says all of itself by its repr.
_LITERALS = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, Enum, re.Pattern)
_WRAPPED = {staticmethod: "__func__", classmethod: "__func__", property: "fget", functools.cached_property: "func"}
# Packages whose objects hold nothing of the user's; modules of torch's aside.
_CLOSED = ("torch", "numpy", "PIL")
_OF_MODULES = set(vars(nn.Module())) - {"_modules"}
_OF_CLASSES = {"__annotations__", "__annotate__", "__annotate_func__", "__doc__", "__firstlineno__", "__module__"}


class Fingerprint:
    """Hashes of the code of objects that may refer to each other.

    Attributes
    ----------
    packages : dict of str to str
        The version of each installed package that was met.
    """

    def __init__(self) -> None:
        self.packages: dict[str, str] = {}
        self._done: dict[int, tuple[Any, bytes]] = {}  # with the object, so that no other gets its number

    def of(self, value: Any) -> bytes:
        """The hash of an object's code; b"" where it has none."""
        if id(value) not in self._done:
            self._done[id(value)] = value, b"within itself"
            parts = [part for part in self._parts(value) if part]
            self._done[id(value)] = value, _digest(type(value).__name__, *parts) if parts else b""
        return self._done[id(value)][1]

    def _parts(self, value: Any) -> Iterator[str | bytes]:
        """What an object's hash is made of."""
        if isinstance(value, (*_LITERALS, Tensor, np.ndarray, np.generic)):
            return
        if isinstance(value, (list, tuple)):
            yield from map(self.of, value)
        elif isinstance(value, Mapping):
            yield from map(self.of, value.values())
        elif isinstance(value, (set, frozenset)):  # in another order in each process
            yield from sorted(map(self.of, value))
        elif isinstance(value, functools.partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            yield from map(self.of, (value.__func__, value.__self__))
        elif inner := next((name for kind, name in _WRAPPED.items() if isinstance(value, kind)), None):
            yield self.of(getattr(value, inner))
        elif isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, ModuleType):
            yield value.__name__
        elif isinstance(value, type):
            yield from self._of_class(value)
        else:
            yield from self._of_instance(value)

    def _of_function(self, function: FunctionType) -> Iterator[str | bytes]:
        names, code = function.__globals__, function.__code__
        if self._is_installed(str(names.get("__name__", ""))):
            yield f"{names.get('__name__')}.{function.__qualname__}"
            yield self.of(getattr(function, "__wrapped__", None))
            return
        yield _code_hash(code)
        yield from map(self._literal, [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()])
        yield from (self.of(_contents(cell)) for cell in function.__closure__ or ())
        used = sorted({name for part in _nested(code) for name in part.co_names})
        for name in used:
            found = names.get(name)
            if isinstance(found, ModuleType) and not self._is_installed(found.__name__):
                yield from (self.of(vars(found)[inner]) for inner in used if inner in vars(found))
            else:
                yield self.of(found)

    def _of_class(self, kind: type) -> Iterator[str | bytes]:
        for base in kind.__mro__[:-1]:
            yield full_name(base)
            if not self._is_installed(base.__module__):
                for name, value in sorted(vars(base).items()):
                    if name not in _OF_CLASSES:
                        yield name
                        yield self._literal(value)

    def _of_instance(self, value: Any) -> Iterator[str | bytes]:
        kind, attributes = type(value), _attributes(value)
        package = kind.__module__.partition(".")[0]
        yield self.of(attributes.get("__wrapped__"))  # of functions with a cache
        if package == "torch":  # of what torch.fx or torch.jit compiled
            yield str(getattr(value, "code", ""))
        module = isinstance(value, nn.Module)
        if module or not (package in _CLOSED or package in sys.stdlib_module_names):
            yield self.of(kind)
            for name, part in sorted(attributes.items()):
                if not (module and name in _OF_MODULES) and (found := self.of(part)):
                    yield name
                    yield found

    def _literal(self, value: Any) -> bytes:
        """The hash of what stands in a source: with its value, where it is a literal or a tuple of such."""
        if isinstance(value, tuple):
            return _digest(*map(self._literal, value))
        return _digest(described(value)) if isinstance(value, _LITERALS) else self.of(value)

    def _is_installed(self, module: str) -> bool:
        """Whether a module's code is known by a version: that of its package, of Python, or of gpuclust."""
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names or package == "gpuclust":
            return True
        found = _distribution(package)
        if found:
            self.packages.update([found])
        return found is not None


def tensor_hash(value: Tensor) -> bytes:
    """The hash of a tensor's shape, dtype and values; of one that has none, of what it is."""
    if is_lazy(value) or value.is_meta:
        return _digest(type(value).__name__)
    value = value.detach()
    dense = value.dequantize() if value.is_quantized else value if value.layout == torch.strided else value.to_dense()
    numbers = dense.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return _digest(f"{tuple(value.shape)} {value.dtype}", numbers.data)


def full_name(kind: type) -> str:
    """A class's name and where it is from."""
    return f"{kind.__module__}.{kind.__qualname__}"


def described(value: Any) -> str:
    """An object as it describes itself, in one line, but for where it is in memory."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(value)).split())


def _digest(*parts: str | bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.digest()


def _code_hash(code: CodeType) -> bytes:
    """Of a function as it is compiled, so that neither comments nor lines matter."""
    constants = (
        _code_hash(value) if isinstance(value, CodeType)
        # In another order in each process.
        else repr(sorted(map(repr, value))) if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    )  # fmt: skip
    return _digest(code.co_code, repr(code.co_names), *constants)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _nested(value)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for base in type(value).__mro__ for name in _names(vars(base).get("__slots__", ())))
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


@cache
def _distribution(package: str) -> tuple[str, str] | None:
    """Name and version of what an installed package came with; None of code that lies elsewhere."""
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    parts = {part for place in places if place for part in Path(os.fspath(place)).parts}
    if package == "__main__" or not parts & {"site-packages", "dist-packages"}:
        return None
    with suppress(metadata.PackageNotFoundError):
        return package, metadata.version(package)
    for name in metadata.packages_distributions().get(package, []):
        return name.lower(), metadata.version(name)
    return package, str(getattr(module, "__version__", "of unknown version"))
