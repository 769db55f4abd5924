"""What a test may need of the machine, decided in one place: a skip says what is missing."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest


@cache
def missing_gpu() -> str | None:
    """Why tests marked gpu cannot run here."""
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@cache
def missing_nvrtc() -> str | None:
    """Why CUDA sources cannot be compiled here; a GPU is not needed for that."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install cupy-cuda13x)"
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        return f"cupy finds no NVRTC: {error}"
    return None


def missing_compiler() -> str | None:
    """Why kernels cannot be compiled for the processor here."""
    return None if shutil.which("g++") else "no g++ on PATH (Debian: apt-get install g++)"


@cache
def chromium() -> str | None:
    """The path of a Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


# Processes side by side (pytest -n) share the cores; torch reads this when it is first imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# Triton reads this when it is first imported. Where there is no CUDA device its kernels run in its interpreter.
if missing_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@cache
def missing_interpreter() -> str | None:
    """Why tests marked interpreter cannot run here."""
    from gpuclust.cluster.backends.triton import TritonBackend

    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels are compiled here, for the CUDA device"
    reason = TritonBackend().unavailable()
    if reason is None:
        from interpreter import patch_once

        patch_once()
    return reason


def missing_browser() -> str | None:
    """Why tests marked browser cannot run here."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install playwright)"
    return None if chromium() else "no Chromium on PATH (Debian: apt-get install chromium)"


MISSING = {
    "interpreter": missing_interpreter,
    "browser": missing_browser,
    "nvrtc": missing_nvrtc,
    "compiler": missing_compiler,
}


def pytest_configure(config: pytest.Config) -> None:
    # Workers (pytest -n) inherit it: what one of them compiles with g++ the others need not.
    if "ON_HOST_BUILT" not in os.environ:
        made = tempfile.TemporaryDirectory()
        os.environ["ON_HOST_BUILT"] = made.name
        config.add_cleanup(made.cleanup)
        config.add_cleanup(lambda: os.environ.pop("ON_HOST_BUILT"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing_gpu()):
        if os.environ.get("GPUCLUST_REQUIRE_GPU") == "1":
            pytest.fail(f"GPUCLUST_REQUIRE_GPU is 1, and {reason}", pytrace=False)
        pytest.skip(reason)
    for marker, missing in MISSING.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="the Ith of N shares of the tests, for N processes side by side")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := config.getoption("--share"):
        kept = share_of(items, share)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests and all modules stay: each collection of garbage would look through them


def share_of(items: list[Any], share: str) -> list[Any]:
    """Dozens of items in turn: neighbours, which share what is cached, mostly stay together."""
    number, count = map(int, share.split("/"))
    return [item for place, item in enumerate(items) if place // 12 % count == number - 1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without windows, for tests marked browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that a container's root does not have; the page is our own.
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.compiler),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.nvrtc]),
    ]
)
def device(request: pytest.FixtureRequest) -> Any:
    """Where CUDA kernels run: on a processor, compiled by g++, and on a GPU."""
    import torch

    return torch.device(request.param)


@pytest.fixture
def make(device: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes CuPy backends of the device."""
    from cases_cupy import maker

    return maker(device, monkeypatch)
