"""Fingerprint: a hash of Python objects by what they compute, the same in each process and on each machine.

Counted are the code of functions and classes that lie in no installed package, with their defaults, closures, and the
functions, classes and constants that they name; attributes, through transforms that hold others; tensors and arrays.
Installed packages are named, and known by their versions. Not counted is what changes while a run goes on: names that
functions assign, attributes that methods other than ``__init__`` do, hooks, generators; lists and dicts outside of
attributes whose names are not in capitals. Nor is what only running would tell, as ``getattr`` with a computed name.
"""

from __future__ import annotations

import dis
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
from pathlib import Path, PurePath
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Instances that say all of themselves by their repr.
_BUILT_IN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, Enum, PurePath, re.Pattern)
_PLAIN = (*_BUILT_IN, torch.dtype, torch.device, torch.memory_format, torch.layout, np.generic, np.dtype)
_MUTABLE = (list, dict, set, bytearray)
_WRAPPED = {staticmethod: "__func__", classmethod: "__func__", property: "fget", functools.cached_property: "func"}
# Packages of whose instances nothing is looked at, since they hold what changes; modules of torch's aside.
_OPAQUE = ("torch", "numpy", "PIL")
_OF_MODULES = {*vars(nn.Module()), "_forward_hooks", "_forward_pre_hooks"}
_OF_CLASSES = {"__annotations__", "__annotate__", "__annotate_func__", "__doc__", "__firstlineno__", "__module__"}
_BUILDING = ("__init__", "__new__", "__post_init__", "__setstate__")


class Fingerprint:
    """Hashes of objects that may refer to each other.

    Parameters
    ----------
    apart : iterable of Tensor
        Tensors that count as nothing: they are hashed elsewhere.

    Attributes
    ----------
    packages : dict of str to str
        The version of each installed package that was met.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self.packages: dict[str, str] = {}
        self._apart = {id(value) for value in apart}
        self._done: dict[int, tuple[Any, bytes]] = {}  # with the object, so that no other gets its number

    def of(self, value: Any) -> bytes:
        """The hash of an object."""
        if isinstance(value, _PLAIN):
            return _digest(type(value).__name__, described(value))
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = value, b"within itself"
        found = _digest(type(value).__name__, *self._parts(value))
        self._done[id(value)] = value, found
        return found

    def _parts(self, value: Any) -> Iterator[str | bytes]:
        """What an object's hash is made of."""
        if isinstance(value, Tensor):
            yield b"" if id(value) in self._apart else tensor_hash(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            yield f"{value.shape} {value.dtype}"
            yield value.tobytes()
        elif isinstance(value, (list, tuple)):
            yield from map(self.of, value)
        elif isinstance(value, Mapping):
            yield from (self.of(part) for item in value.items() for part in item)
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
        names = function.__globals__
        if self._is_installed(str(names.get("__name__", ""))):
            yield f"{names.get('__name__')}.{function.__qualname__}"
            yield self.of(getattr(function, "__wrapped__", None))
            return
        code, assigned = function.__code__, _assigned(function.__code__)
        yield _code_hash(code)
        yield self.of((function.__defaults__, function.__kwdefaults__))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name not in assigned:
                yield from self._constant(name, _contents(cell))
        used = sorted({name for part in _nested(code) for name in part.co_names} - assigned)
        for name in used:
            found = names.get(name)
            if isinstance(found, ModuleType) and not self._is_installed(found.__name__):
                for inner in used:
                    if inner in vars(found):
                        yield from self._constant(inner, vars(found)[inner])
            elif name in names:
                yield from self._constant(name, found)

    def _of_class(self, kind: type) -> Iterator[str | bytes]:
        for base in kind.__mro__[:-1]:
            yield full_name(base)
            if not self._is_installed(base.__module__):
                assigned = _state_of(base)
                for name, value in sorted(vars(base).items()):
                    if name not in _OF_CLASSES and name not in assigned:
                        yield from self._constant(name, value)

    def _of_instance(self, value: Any) -> Iterator[str | bytes]:
        kind, attributes = type(value), _attributes(value)
        package = kind.__module__.partition(".")[0]
        yield self.of(kind)
        yield self.of(attributes.get("__wrapped__"))  # of functions with a cache
        if package == "torch":  # of what torch.fx or torch.jit compiled
            yield str(getattr(value, "code", ""))
        if isinstance(value, nn.Module):
            yield from map(self.of, (value._modules, value._parameters, value._buffers))
        elif package in _OPAQUE or package in sys.stdlib_module_names:
            return
        state = {name for base in kind.__mro__ if not base.__module__.startswith("torch.") for name in _state_of(base)}
        for name, part in sorted(attributes.items()):
            if name not in state and not (isinstance(value, nn.Module) and name in _OF_MODULES):
                yield name
                yield self.of(part)

    def _constant(self, name: str, value: Any) -> Iterator[str | bytes]:
        """What a name stands for, where that does not look like state."""
        if not isinstance(value, _MUTABLE) or name.isupper():
            yield name
            yield self.of(value)

    def _is_installed(self, module: str) -> bool:
        """Whether a module's code is known by a version: that of its package, of Python, or of gpuclust."""
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names or package == "gpuclust":
            return True
        found = _distribution(package)
        self.packages |= [found] if found else []
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


@cache
def _assigned(code: CodeType, operation: str = r"STORE_(GLOBAL|DEREF)") -> frozenset[str]:
    """Names that a function assigns outside of itself while it runs, or in itself for functions within it."""
    steps = (step for part in _nested(code) for step in dis.get_instructions(part))
    return frozenset(str(step.argval) for step in steps if re.fullmatch(operation, step.opname))


@cache
def _state_of(kind: type) -> frozenset[str]:
    """Attributes that methods of a class assign once an instance is built."""
    codes = (getattr(value, "__code__", None) for name, value in vars(kind).items() if name not in _BUILDING)
    return frozenset().union(*(_assigned(code, "STORE_ATTR") for code in codes if code))


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
