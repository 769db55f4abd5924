"""Options as a person writes them, sizes, the command of a run, the environment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuclust.config import Options, command_line, environment, parse_bytes, read_options, show_bytes, split_names
from gpuclust.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (1073741824, 1 << 30),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("8G", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        ("2TB", 2 * 10**12),
        ("7b", 7),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "1e9", "8GiBs", "GiB", "0", "0.1B", "8 G i B", "٣x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"a size is .*got"):
        parse_bytes(text)


def test_sizes_are_shown_in_powers_of_a_thousand() -> None:
    sizes = (0, 999, 1000, 27_113_424_000, 1.28e12, 5e15)
    assert [show_bytes(size) for size in sizes] == ["0 B", "999 B", "1 kB", "27.1 GB", "1.28 TB", "5000 TB"]


def test_names_between_commas() -> None:
    assert split_names("a, b ,,c") == ["a", "b", "c"]
    assert split_names('"a,b", "c ""d""",e') == ["a,b", 'c "d"', "e"]
    assert split_names("") == []


def test_names_in_two_lines_are_refused() -> None:
    with pytest.raises(InputError, match=r"names stand in one line, with commas between them; got 'a\\nb'"):
        split_names("a\nb")


def test_options_are_taken_as_a_person_writes_them() -> None:
    options = read_options(
        {
            "layers": ["conv*,fc8", "pool"],
            "classes": "cat, dog",
            "memory_limit": "2KiB",
            "per_class": np.int64(3),
            "seed": None,
            "device": torch.device("cuda", 1),
            "weights": Path("a/b.pth"),
        }
    )
    assert options.layers == ("conv*", "fc8", "pool")
    assert options.classes == ("cat", "dog")
    assert (options.memory_limit, options.per_class, options.seed) == (2048, 3, 0)
    assert (options.device, options.weights) == ("cuda:1", "a/b.pth")
    assert read_options({"classes": ["a,b", "c"]}).classes == ("a,b", "c")
    assert read_options({}) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "conv1"}, "there is no option 'layer'; close: layers"),
        ({"qqq": 1}, "there is no option 'qqq'; there are weights, layers"),
        ({"seed": -1}, "seed is a whole number of at least 0; got -1"),
        ({"seed": 1.0}, "seed is a whole number of at least 0; got 1.0"),
        ({"n_init": True}, "n_init is a whole number of at least 1; got True"),
        ({"backend": "numpy"}, "backend is one of auto, cupy, triton, cuml, torch; got 'numpy'"),
        ({"device": "cuda:x"}, "device is auto, cpu, cuda or cuda:INDEX; got 'cuda:x'"),
        ({"memory_limit": "much"}, "got 'much'"),
    ],
    ids=str,
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(given)


def test_the_command_of_a_run_asks_for_the_same_run() -> None:
    options = read_options(
        {"layers": "conv*,fc8", "classes": ["a,b", "it's"], "seed": 4, "memory_limit": "1GiB", "dtype": "float16"}
    )
    words = shlex.split(command_line("alexnet", "my data/x", options))
    assert words[:5] == ["gpuclust", "run", "my data/x", "--model", "alexnet"]
    given = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[5::2], words[6::2], strict=True)
    }
    given["seed"] = int(given["seed"])
    assert read_options(given) == options
    assert command_line("alexnet", "x", Options()) == "gpuclust run x --model alexnet"


def test_the_environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVICE", "MEMORY_LIMIT", "CHUNK_BYTES", "CACHE", "HOPPER"):
        monkeypatch.delenv(f"GPUCLUST_{name}", raising=False)
    nothing = {"device": None, "memory_limit": None, "chunk_bytes": None, "cache": None, "hopper": False}
    assert vars(environment()) == nothing
    monkeypatch.setenv("GPUCLUST_DEVICE", "cpu")
    monkeypatch.setenv("GPUCLUST_MEMORY_LIMIT", "3MiB")
    monkeypatch.setenv("GPUCLUST_CHUNK_BYTES", "64KiB")
    monkeypatch.setenv("GPUCLUST_CACHE", "/some/where")
    monkeypatch.setenv("GPUCLUST_HOPPER", "1")
    assert vars(environment()) == {
        "device": "cpu",
        "memory_limit": 3 << 20,
        "chunk_bytes": 1 << 16,
        "cache": Path("/some/where"),
        "hopper": True,
    }
    monkeypatch.setenv("GPUCLUST_MEMORY_LIMIT", "much")
    with pytest.raises(InputError, match="got 'much'"):
        environment()
