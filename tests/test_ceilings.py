"""Ceilings: rates that are measured, and the limit of a shape from them."""

from __future__ import annotations

import pytest
import torch

from gpuclust.bench import ceilings as module
from gpuclust.bench.ceilings import Ceilings, limit_s, measure

CPU = torch.device("cpu")
# A GPU with round numbers.
ROUND = Ceilings(1e12, {"float32": 1e13, "tf32": 4e14, "float16": 8e14, "bfloat16": 8e14}, 1e13)


def test_rates_of_this_machine(monkeypatch):
    monkeypatch.setitem(module._COPY_BYTES, "cpu", 32 << 20)
    monkeypatch.setitem(module._SIDE, "cpu", 512)
    found = measure(CPU)
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert set(found.flop_per_s) == {"float32"}
    assert 1e8 < found.flop_per_s["float32"] < 1e14
    assert found.pairs_per_s is None
    assert "copy" in str(found)
    assert "TFLOP/s" in str(found)
    # A type that has no product of its own is labelled by float32's.
    assert found.product_rate("float16") == found.flop_per_s["float32"]


def test_the_setting_of_float32_is_as_it_was(monkeypatch):
    monkeypatch.setitem(module._COPY_BYTES, "cpu", 4 << 20)
    monkeypatch.setitem(module._SIDE, "cpu", 64)
    before = torch.backends.cuda.matmul.fp32_precision
    measure(CPU)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_limits_of_an_operation():
    n, d, k = 1_000_000, 128, 1000
    product_s, pass_s, epilogue_s = 2 * n * d * k / 8e14, n * d * 2 / 1e12, n * k / 1e13
    for repeats in (1, 10):
        least, serial = limit_s(ROUND, "fit", n, d, k, torch.float16, repeats)
        assert least == pytest.approx(repeats * product_s)
        assert serial == pytest.approx(repeats * (product_s + 2 * pass_s + epilogue_s))
    assert limit_s(ROUND, "update", n, d, k, torch.float16) == pytest.approx((pass_s, pass_s))
    assert limit_s(ROUND, "assign", n, d, k, torch.float16)[1] == pytest.approx(product_s + pass_s + epilogue_s)
    assert limit_s(ROUND, "seed", n, d, k, torch.float16) == pytest.approx((pass_s, product_s + pass_s + epilogue_s))
    assert limit_s(ROUND, "capture", n, d, k, torch.float16) is None


def test_float32_may_be_proposed_in_tf32_and_few_clusters_are_bound_by_memory():
    n, d = 1_000_000, 128
    assert limit_s(ROUND, "fit", n, d, 4096, torch.float32)[0] == pytest.approx(2 * n * d * 4096 / 4e14)
    assert limit_s(ROUND, "fit", n, d, 10, torch.float32)[0] == pytest.approx(n * d * 4 / 1e12)


@pytest.mark.gpu
def test_rates_of_a_gpu():
    found = measure(torch.device("cuda", 0))
    assert set(found.flop_per_s) == {"float32", "float16", "bfloat16", "tf32"}
    assert found.flop_per_s["tf32"] > found.flop_per_s["float32"]
    assert found.copy_bytes_per_s > 1e11
