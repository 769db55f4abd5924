"""LayerStore: rows in place, exact conversion, scales that never overflow, NaN named."""

from __future__ import annotations

import math

import pytest
import torch

from gpuclust.capture.store import LayerStore
from gpuclust.errors import InputError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(batches: list[torch.Tensor], dtype: torch.dtype = torch.float32, n: int | None = None) -> LayerStore:
    store = LayerStore(n or sum(map(len, batches)), batches[0][0].numel(), dtype, torch.device("cpu"), name="conv1")
    for batch in batches:
        store.append(batch)
    store.finish()
    return store


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (4, 1, 1), (2, 33, 64)], ids=str)
def test_rows_are_the_activations_in_c_order(layout, dtype, shape):
    batches, d = [random(b, *shape, seed=b) for b in (7, 7, 2)], math.prod(shape)
    store = filled([batch.contiguous(memory_format=layout) for batch in batches], dtype)
    assert torch.equal(store.rows, torch.cat(batches).reshape(16, d).to(dtype))
    assert store.shape == (16, d)
    assert store.scale == 1.0
    assert store.dtype == dtype


def test_float16_rows_do_not_depend_on_how_activations_lie():
    batches = [random(3, 2, 33, 64, seed=b) * 1e5 ** (b + 1) for b in range(3)]
    expected, found = (
        filled([batch.contiguous(memory_format=layout) for batch in batches], torch.float16)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert found.scale == expected.scale < 1
    assert torch.equal(found.rows, expected.rows)


def test_a_vector_per_batch_is_one_column():
    store = filled([random(5), random(3)])
    assert store.shape == (8, 1)
    assert torch.equal(store.rows[:, 0], torch.cat([random(5), random(3)]))


def test_the_rows_are_one_allocation_that_append_does_not_replace():
    store = LayerStore(6, 4, torch.float32, "cpu")
    batch = random(6, 2, 2)
    store.append(batch[:3])
    place = store.rows.data_ptr()
    store.append(batch[3:])
    store.finish()
    assert store.rows.data_ptr() == place
    batch.zero_()  # what is stored is a copy
    assert torch.equal(store.rows, random(6, 2, 2).reshape(6, 4))


def test_fewer_rows_than_planned_are_a_view_of_the_first():
    store = filled([random(3, 4)], n=10)
    assert store.shape == (3, 4)
    assert torch.equal(store.rows, random(3, 4))


def test_chunks_are_views_that_cover_the_rows_in_order():
    store = filled([random(7, 4)])
    chunks = list(store.chunks(3))
    assert [start for start, _ in chunks] == [0, 3, 6]
    assert [len(rows) for _, rows in chunks] == [3, 3, 1]
    assert all(rows.data_ptr() == store.rows[start].data_ptr() for start, rows in chunks)


def test_what_does_not_fit_is_refused():
    store = LayerStore(4, 6, torch.float32, "cpu", name="conv1")
    with pytest.raises(InputError, match=r"room for 4 rows; got 0 \+ 5"):
        store.append(random(5, 6))
    with pytest.raises(InputError, match=r"conv1: rows have 6 values; got activations of shape \(2, 7\)"):
        store.append(random(2, 7))
    with pytest.raises(InputError, match="no activations"):
        store.finish()
    with pytest.raises(InputError, match="float64"):
        LayerStore(4, 6, torch.float64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_activation_is_named(dtype, value):
    store = LayerStore(8, 12, dtype, "cpu", name="conv1")
    store.append(random(4, 3, 4))
    bad = random(4, 3, 4)
    bad[2, 1, 3] = value
    with pytest.raises(InputError, match=r"conv1: .*image 6, value 7, is"):
        store.append(bad)


def test_infinities_of_both_signs_do_not_cancel():
    bad = torch.zeros(2, 4)
    bad[1, 0], bad[1, 1] = float("inf"), float("-inf")
    with pytest.raises(InputError, match="image 1, value 0"):
        LayerStore(2, 4, torch.float32, "cpu").append(bad)


def test_finite_rows_whose_sum_overflows_are_accepted():
    large = torch.full((2, 8), 3e38)
    assert torch.equal(filled([large]).rows, large)


def test_float64_that_overflows_float32_is_refused():
    with pytest.raises(InputError, match="image 0, value 1, is inf"):
        LayerStore(1, 2, torch.float32, "cpu").append(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1.0, 1e5, 1e30])
def test_float16_scale_keeps_every_magnitude(magnitude):
    batch = random(6, 10) * magnitude
    store = filled([batch], torch.float16)
    assert torch.log2(torch.tensor(store.scale)).frac() == 0
    # Eleven bits of significand, but for the subnormals far below the largest.
    error = (store.rows.double() / store.scale - batch.double()).abs()
    assert (error <= batch.abs().double() * 2.0**-11 + batch.abs().max().double() * 2.0**-36).all()
    assert store.rows.isfinite().all()


def test_float16_scale_is_lowered_by_a_later_batch_without_touching_what_the_rows_mean():
    first, second = random(4, 10), random(4, 10, seed=1) * 1e6
    store = filled([torch.zeros(2, 10), first, second], torch.float16)
    lonely = filled([first], torch.float16)
    assert store.scale < lonely.scale
    assert store.rows.isfinite().all()
    assert torch.equal(store.rows[:2], torch.zeros(2, 10).half())
    ratio = store.scale / lonely.scale
    assert torch.equal(store.rows[2:6], (lonely.rows.double() * ratio).half())
    torch.testing.assert_close(store.rows[6:].float() / store.scale, second, rtol=2**-11, atol=1.0)


def test_float16_scale_stays_where_a_later_batch_fits():
    store = filled([random(4, 10), random(4, 10) * 1.5], torch.float16)
    assert store.scale == filled([random(4, 10)], torch.float16).scale


def test_a_store_is_a_chunk_source_as_a_tensor_is():
    from gpuclust.cluster.sources.base import TensorSource

    store, tensor = filled([random(7, 4)], n=9), TensorSource(random(7, 4))
    assert (store.shape, store.dtype, store.device) == (tensor.shape, tensor.dtype, tensor.device)
    pairs = list(zip(store.chunks(3), tensor.chunks(3), strict=True))
    assert all(start == other and torch.equal(rows, same) for (start, rows), (other, same) in pairs)
    index = torch.tensor([5, 0, 5])
    taken = store.take(index)
    assert torch.equal(taken, tensor.take(index))
    taken.zero_()  # a copy
    assert torch.equal(store.rows, random(7, 4))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        store.take(torch.tensor([7]))  # a row that never came is no row


@pytest.mark.gpu
def test_on_cuda_nan_is_found_at_finish():
    store = LayerStore(4, 6, torch.float32, "cuda", name="conv1")
    bad = random(4, 6).cuda()
    bad[3, 5] = float("nan")
    store.append(bad)
    with pytest.raises(InputError, match="image 3, value 5"):
        store.finish()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_activations_are_stored_as_the_numbers_that_they_stand_for():
    values = torch.quantize_per_tensor(random(5, 3, 2), 0.1, 10, torch.quint8)
    assert torch.equal(filled([values]).rows, values.dequantize().reshape(5, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_in_host_memory_are_those_on_the_device(dtype, layout):
    batches = [(random(3, 2, 33, 64, seed=b) * 1e5 ** (b + 1)).cuda() for b in range(3)]
    stores = [LayerStore(9, 2 * 33 * 64, dtype, place, name="conv1") for place in ("cpu", "cuda")]
    for store in stores:
        for batch in batches:
            store.append(batch.contiguous(memory_format=layout))
        store.finish()
    assert torch.equal(stores[0].rows, stores[1].rows.cpu())
    assert stores[0].scale == stores[1].scale
