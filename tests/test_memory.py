"""MemoryPlan: the bytes of a run before it starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpuclust.capture.layers import Layer
from gpuclust.capture.memory import MemoryPlan, make_plan
from gpuclust.errors import MemoryLimitError

WIDTHS = {
    "alexnet": [193_600, 139_968, 64_896, 43_264, 43_264, 4_096, 4_096, 1_000],
    "vgg16": [3_211_264] * 2 + [1_605_632] * 2 + [802_816] * 3 + [401_408] * 3 + [100_352] * 3 + [4_096] * 2 + [1_000],
}


def plan(network: str = "alexnet", **changes) -> MemoryPlan:
    layers = [Layer(f"layer{i}", f"module.{i}", "conv", (d,)) for i, d in enumerate(WIDTHS[network])]
    options = {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "clusters": 5,
        "n_init": 10,
        "batch_size": 32,
        "module_bytes": 0,
        "free": 16 * 10**9,
        "limit": None,
    } | changes
    n = options.pop("n", 500)
    return make_plan(network, layers, n, **options)


@pytest.mark.parametrize(
    ("network", "dtype", "size", "words"),
    [
        ("alexnet", torch.float32, 988_368_000, "0.99 GB"),
        ("alexnet", torch.float16, 494_184_000, "0.49 GB"),
        ("vgg16", torch.float32, 27_113_424_000, "27.11 GB"),
        ("vgg16", torch.bfloat16, 13_556_712_000, "13.56 GB"),
    ],
)
def test_activations_of_five_classes_of_a_hundred(network, dtype, size, words):
    made = plan(network, dtype=dtype)
    assert made.activations_bytes == size == sum(row["bytes"] for row in made.table())
    (line,) = [line for line in str(made).splitlines() if line.startswith("activations")]
    assert line.endswith(f" {words}")


def test_each_term_is_the_stated_formula():
    made = plan(module_bytes=7)
    once = 40 * 500 + 193_600 * (32 + 24 + 5 * 4)
    assert made.work_bytes == once + 10 * (40 * 500 + 5 * 193_600 * (2 * 4 + 16)) + 32 * 2**20
    assert made.forward_bytes == 3 * 32 * 193_600 * 4
    assert made.total_bytes == 7 + made.activations_bytes + made.work_bytes
    assert plan(batch_size=1000).total_bytes == made.activations_bytes + 3 * 1000 * 193_600 * 4
    assert plan(widest=10**6).forward_bytes == 3 * 32 * 10**6 * 4


def test_it_fits_up_to_the_last_byte():
    made = plan()
    assert replace(made, free_bytes=made.total_bytes).fits
    assert not replace(made, free_bytes=made.total_bytes - 1).fits
    assert not replace(made, limit_bytes=made.total_bytes - 1).fits
    assert not replace(made, free_bytes=made.total_bytes - 1, limit_bytes=made.total_bytes).fits
    made.require()


def test_a_run_that_does_not_fit_says_what_it_needs_has_and_what_to_do():
    made = plan("vgg16")
    with pytest.raises(MemoryLimitError) as error:
        made.require()
    message = str(error.value)
    assert f"{made.total_bytes:,} bytes" in message
    assert "16,000,000,000 bytes) are free" in message
    for advice in ("--per-class", "--layers", "--dtype float16"):
        assert advice in message
    assert "--memory-limit" not in message  # more than there is would not help
    with pytest.raises(MemoryLimitError, match=r"the memory limit is .*8,000,000,000 bytes.*a larger --memory-limit"):
        plan("vgg16", limit=8 * 10**9).require()
    with pytest.raises(MemoryLimitError) as halved:
        plan("vgg16", dtype=torch.float16, free=10**9).require()
    assert "--dtype" not in str(halved.value)


def test_the_table_is_printable():
    text = str(plan(limit=10**9))
    assert "layer0" in text
    assert "193,600" in text
    assert text.splitlines()[-1] == "it does not fit"
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1
