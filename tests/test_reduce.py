"""--reduce: what is chosen for which layer, and what it leaves of an activation."""

from __future__ import annotations

import math

import pytest
import torch
from cases_rows import peak_bytes

from gpuclust.capture.layers import Layer
from gpuclust.capture.reduce import Reduction, parse_reductions
from gpuclust.capture.store import LayerStore
from gpuclust.errors import InputError

LAYERS = [
    Layer("conv1", "features.0", "conv", (64, 55, 55), auto=True),
    Layer("conv2", "features.3", "conv", (192, 27, 27), auto=True),
    Layer("fc8", "classifier.6", "linear", (1000,), auto=True),
    Layer("layer1.0", "layer1.0", "block", (16, 9, 9)),
]


def _chosen(*texts):
    return {name: str(reduction) for name, reduction in parse_reductions(texts).choose(LAYERS).items()}


def test_later_ones_win_and_none_is_a_choice():
    assert set(_chosen().values()) == {"none"}
    assert set(_chosen("avgpool").values()) == {"avgpool"}
    assert _chosen("maxpool", "conv*=avgpool", "features.3 = sketch:4096", "fc8=none") == {
        "conv1": "avgpool",
        "conv2": "sketch:4096",
        "fc8": "none",
        "layer1.0": "maxpool",
    }
    assert _chosen("conv1=avgpool", "none")["conv1"] == "none"
    assert _chosen("conv1,layer1.*=sketch:8")["layer1.0"] == "sketch:8"
    assert parse_reductions(["sketch:64"], seed=9).choose(LAYERS)["fc8"].seed == 9


@pytest.mark.parametrize("text", ["conv1", "=avgpool", "conv1=", "conv1=pool", "sketch", "sketch:", "sketch:1e3", ""])
def test_what_is_no_reduction_is_refused(text):
    with pytest.raises(InputError, match="--reduce takes KIND or PATTERN=KIND"):
        parse_reductions([text])


@pytest.mark.parametrize(("text", "near"), [("sketch:0", 8), ("a=sketch:100", 96), ("sketch:4097", 4096)])
def test_a_sketch_has_a_multiple_of_eight_values(text, near):
    with pytest.raises(InputError, match=f"a sketch has a multiple of 8 values: sketch:{near},"):
        parse_reductions([text])


def test_a_pattern_that_fits_no_layer_is_named_with_close_ones():
    with pytest.raises(
        InputError, match=r"--reduce conv7=avgpool: no layer is called 'conv7'; close: conv[12], conv[12];"
    ):
        _chosen("conv7=avgpool")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 5, 7), (4, 3, 2, 5), (11, 6), (9,)])
def test_pools(shape, dtype):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() if len(shape) == 1 else x.double().flatten(2)
    if len(shape) == 2:
        exact = exact.transpose(1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in ("avgpool", "maxpool"):
        reduction = Reduction(kind)
        got = reduction.on(shape, "cpu")(x)
        assert got.shape == (5, reduction.values(shape))
        if len(shape) == 1:
            assert got is x
            assert reduction.describe(shape) == f"{kind} leaves the layer as it is: its 9 values have no positions"
            continue
        assert got.dtype == wide
        wanted = exact.mean(2) if kind == "avgpool" else exact.amax(2)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_is_told():
    assert Reduction().describe((3, 5)) == "all 15 values"
    assert Reduction("avgpool").describe((64, 55, 55)) == "64 of 193,600 values, the mean over 55 x 55 positions"
    assert Reduction("maxpool").describe((197, 768)) == "768 of 151,296 values, the largest over 197 positions"
    assert Reduction("sketch", 4096, 7).describe((64, 55, 55)) == (
        "4,096 of 193,600 values, a random projection (seed 7): squared distances are right on average over seeds, "
        "within 2.2 % rms"
    )
    assert Reduction("sketch", 4096).describe((1000,)) == "sketch:4096 leaves the layer as it is: it has 1,000 values"


@pytest.mark.parametrize("shape", [(64, 55, 55), (4096,), (4097,), (16,)])
def test_a_sketch_leaves_m_values_or_the_layer_as_it_is(shape):
    reduction = Reduction("sketch", 4096, 1)
    x = torch.randn(2, *shape)
    got = reduction.on(shape, "cpu")(x)
    assert reduction.values(shape) == min(4096, math.prod(shape)) == got.numel() // 2
    assert reduction.changes(shape) == (got is not x) == (math.prod(shape) > 4096)


def test_reduced_batches_go_into_a_store():
    """Batches of any size give the rows of one: (b, values) of a sketch, or the activation as it was."""
    x = torch.randn(10, 8, 9, 9).relu()
    for reduction in (Reduction("sketch", 64, 1), Reduction("avgpool"), Reduction()):
        reduce = reduction.on((8, 9, 9), "cpu")
        store = LayerStore(10, reduction.values((8, 9, 9)), torch.float16, "cpu")
        for batch in x.split(3):
            store.append(reduce(batch))
        store.finish()
        torch.testing.assert_close(store.rows.float() / store.scale, reduce(x).flatten(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", ["avgpool", "maxpool", "sketch:256", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_it_holds_is_foretold(text, dtype):
    shape, b = (64, 40, 40), 16
    reduction = parse_reductions([text]).rules[0][1]
    x = torch.ones(b, *shape, dtype=dtype).to(memory_format=torch.channels_last)
    peak = peak_bytes(lambda: reduction.on(shape, "cpu")(x))
    assert peak <= reduction.work_bytes(shape, b, dtype.itemsize, "cpu") + 256
