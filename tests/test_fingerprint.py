"""Which objects count as the same: those that run the same code, whatever values they hold."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

from gpuclust.fingerprint import Fingerprint

DIFFERENT = {
    "body": "f = lambda x: x + {0}",
    "default": "def f(x, by={0}): return x + by",
    "tuple as default": "def f(x, by=({0}, 2)): return x + by[0]",
    "keyword default": "def f(x, *, by={0}): return x + by",
    "helper": "def helper(x): return x + {0}\ndef f(x): return helper(x)",
    "helper of a nested function": "def helper(x): return x + {0}\ndef f(x): return [helper(y) for y in x]",
    "helper in a module": "import own\nown.by = lambda x: x + {0}\ndef f(x): return own.by(x)",
    "helper in a list": "def helper(x): return x + {0}\nhelpers = [helper]\ndef f(x): return helpers[0](x)",
    "closure": "def make(by):\n    return lambda x: by(x)\nf = make(lambda x: x + {0})",
    "decorated": "import torch\n@torch.no_grad()\ndef f(x): return x + {0}",
    "wrapped": (
        "import functools\ndef twice(g):\n    @functools.wraps(g)\n    def call(x): return g(g(x))\n    return call\n"
        "@twice\ndef f(x): return x + {0}"
    ),
    "cached": "import functools\n@functools.cache\ndef f(x): return x + {0}",
    "partial": "import functools\ndef g(x, by): return x + {0}\nf = functools.partial(g, by=1)",
    "method": "class C:\n    def __call__(self, x): return x + {0}\nf = C()",
    "bound method": "class C:\n    def go(self): return {0}\nf = C().go",
    "static method": "class C:\n    @staticmethod\n    def go(x): return x + {0}\nf = C()",
    "property": "class C:\n    @property\n    def by(self): return {0}\nf = C()",
    "class constant": "class C:\n    by = {0}\nf = C()",
    "class": "class C:\n    by = {0}\ndef f(x): return C().by",
    "attribute": "class C:\n    def __init__(self): self.by = lambda x: x + {0}\nf = C()",
    "slot": "class C:\n    __slots__ = ('by',)\n    def __init__(self): self.by = lambda x: x + {0}\nf = C()",
    "data class": "import dataclasses\n@dataclasses.dataclass\nclass C:\n    by: int = {0}\nf = C()",
    "compose": "from torchvision.transforms import *\nf = Compose([ToTensor(), Lambda(lambda x: x + {0})])",
    "part": "from torch import nn\nclass C(nn.Module):\n    def forward(self): return {0}\nf = nn.Sequential(C())",
    "part's attribute": (
        "from torch import nn\nclass C(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.by = lambda x: x + {0}\nf = nn.Sequential(C())"
    ),
    "mixin after a base of torch's": (
        "from torch import nn\nclass Mixin:\n    def forward(self, x): return x + {0}\n"
        "class C(nn.Sequential, Mixin): pass\nf = C()"
    ),
    "compiled": (
        "import torch\nclass C(torch.nn.Module):\n    def forward(self, x): return x + {0}\n"
        "f = torch.fx.symbolic_trace(C())"
    ),
    "frozen set": "def f(x): return x in {{'{0}', 'b', 'c'}}",
}
SAME = {
    "global": "N = {0}\ndef f(x):\n    global N\n    N += 1\n    return x",
    "closure": "def make(n):\n    return lambda x: x + n\nf = make({0} - 1 or None)",
    "list that is filled": "calls = [1] * {0}\ndef f(x):\n    calls.append(1)\n    return x",
    "attribute": "class C:\n    def __init__(self, n): self.n = n\nf = C({0})",
    "attribute of a part": (
        "from torch import nn\nclass C(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
        "        self.n = n\nf = nn.Sequential(C({0} - 1 or 'none'))"
    ),
    "hook": (
        "from torch import nn\nf = nn.Linear(1, 1)\nfor i in range({0}): f.register_forward_hook(lambda *_: None)"
    ),
    "weights": "from torch import nn\nf = nn.Linear(1, 1)",
    "event": "import threading\nevent = threading.Event()\nif {0} == 1: event.set()\ndef f(x): return event.is_set()",
    "comments": "def f(x):  # {0}\n    return x",
    "generator": "import numpy\nrng = numpy.random.default_rng({0})\ndef f(x): return rng.random()",
}


def made(text: str, by: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("own", "users"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    space = vars(sys.modules["users"])
    exec(text.format(by), space)
    return space["f"]


@pytest.mark.parametrize("text", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_computes_something_else_has_another_hash(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, again, other = (Fingerprint().of(made(text, by, monkeypatch)) for by in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("text", SAME.values(), ids=SAME.keys())
def test_values_do_not_count(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Fingerprint().of(made(text, by, monkeypatch)) for by in (1, 2))
    assert one == other


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(()),
        np.array([{"a": 1}, None], dtype=object),
        threading.Lock(),
        functools.partial(print, 1),
        nn.Linear(2, 2).half(),
        transforms.RandomErasing(),
        open(__file__, "rb"),  # noqa: SIM115
        lambda: undefined,  # type: ignore[name-defined]  # noqa: F821
        super,
        max,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_object_has_a_hash(value: Any) -> None:
    assert Fingerprint().of(value) == Fingerprint().of(value)


def test_objects_that_hold_each_other() -> None:
    def ring(*parts: Any) -> Any:
        first: list[Any] = [*parts]
        first.append([first, ring])
        return first

    assert Fingerprint().of(ring(len)) == Fingerprint().of(ring(len)) != Fingerprint().of(ring(made))


def test_installed_packages_are_known_by_their_versions() -> None:
    import timm
    import torchvision

    seen = Fingerprint()
    seen.of([timm.create_model, transforms.ToTensor(), threading.Lock, Fingerprint])
    assert seen.packages == {"timm": timm.__version__, "torchvision": torchvision.__version__.partition("+")[0]}


def test_processes_agree() -> None:
    code = (
        "import test_fingerprint as t\n"
        "for text in [*t.DIFFERENT.values(), *t.SAME.values()]:\n"
        "    print(t.Fingerprint().of(t.made(text, 1, t.pytest.MonkeyPatch())).hex())"
    )
    places = [Path(__file__).parent, Path(__file__).parents[1]]
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(map(str, places)), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop().splitlines()) == len(DIFFERENT) + len(SAME)
