"""Triton's interpreter, as it is but for one thing: it patches `triton.language` once for a kernel, not once more for
each function that the kernel calls, which is a quarter of its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once() -> None:
    """Within a kernel, calls of functions find the modules as they were patched for it; see `interpreter._patch_lang`.

    Other versions of Triton, which have no such scopes, stay as they are.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang
    language = interpreter.tl
    patched = set[frozenset[str]]()

    def patch_if_new(function: Any) -> Any:
        seen = frozenset(
            module.__name__ for module in function.__globals__.values() if module is language or module is language.core
        )
        if seen in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore

        def ended() -> None:
            patched.clear()  # of the functions, too: their scopes are never ended, but what they share with it was
            restore()

        scope.restore = ended
        patched.add(seen)
        return scope

    interpreter._patch_lang = patch_if_new
