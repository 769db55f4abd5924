"""The rows stay where they are: every tensor operation of a fit is watched for copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpuclust.capture.store import LayerStore
from gpuclust.cluster import KMeans

N, K = 20_000, 7
# So wide that the blocks in which rows are read (2**18 values on a processor, 2**24 on a GPU) are a small part of all.
WIDTH = {"cpu": 256, "cuda": 4096}
# In which no copy of the rows has room.
LIMIT = {"cpu": 12 << 20, "cuda": 160 << 20}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and everything that crosses between devices."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.own = x.untyped_storage().data_ptr()
        self.largest = 0
        self.crossings_bytes: list[int] = []
        self.written = False
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in after:
            if tensor.untyped_storage().data_ptr() != self.own:
                self.largest = max(self.largest, tensor.numel())
        if func is torch.ops.aten._local_scalar_dense.default:
            self.crossings_bytes.append(before[0].numel() * before[0].itemsize)
        kinds = {tensor.device.type for tensor in before + after if tensor.ndim}
        if len(kinds) > 1:
            self.crossings_bytes.append(max(tensor.numel() * tensor.itemsize for tensor in after))
        for leaf, schema in zip(args, func._schema.arguments, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write and isinstance(leaf, torch.Tensor):
                self.written |= leaf.untyped_storage().data_ptr() == self.own
        return result


@contextmanager
def watched(x: torch.Tensor) -> Iterator[Watch]:
    """Nothing inside may copy, move or write the rows."""
    kept = x.clone()
    with Watch(x) as watch:
        yield watch
    assert watch.operations > 100, "nothing was seen"
    assert watch.largest < x.numel() // 4, "a copy of the rows, or a good part of one"
    assert all(size <= 8 * len(x) for size in watch.crossings_bytes)
    assert not watch.written
    assert torch.equal(x, kept)


def rows_on(device: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(N, WIDTH[device], generator=generator, device=device).relu_().to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_a_fit_copies_no_rows(device: str, dtype: torch.dtype, init: str) -> None:
    x = rows_on(device, dtype)
    with watched(x):
        model = KMeans(K, init=init, n_init=2, random_state=0, max_iter=3, memory_limit=LIMIT[device]).fit(x)
    assert model.labels_.device == model.cluster_centers_.device == x.device


@pytest.mark.parametrize("device", DEVICES)
def test_weighted_fits_and_what_follows_copy_no_rows(device: str) -> None:
    x = rows_on(device, torch.float32)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)).to(device)
    model = KMeans(K, random_state=0, max_iter=2, memory_limit=LIMIT[device])
    with watched(x):
        model.fit(x, sample_weight=weights)
        model.predict(x)
        model.transform(x)
        model.score(x, sample_weight=weights)


@pytest.mark.parametrize("device", DEVICES)
def test_far_centroids_that_empty_their_clusters_copy_no_rows(device: str) -> None:
    x = rows_on(device, torch.float32)
    init = torch.cat([x[:3], torch.full((4, WIDTH[device]), 100.0, device=device)])
    with watched(x):
        KMeans(K, init=init, max_iter=2, memory_limit=LIMIT[device]).fit(x)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_store_is_clustered_where_it_lies(device: str) -> None:
    store = LayerStore(N, WIDTH[device], torch.float32, device)
    for batch in rows_on(device, torch.float32).split(3000):
        store.append(batch)
    store.finish()
    with watched(store.rows):
        model = KMeans(K, random_state=0, n_init=2, max_iter=3, memory_limit=LIMIT[device]).fit(store)
    plain = KMeans(K, random_state=0, n_init=2, max_iter=3).fit(store.rows)
    assert torch.equal(model.labels_, plain.labels_)
    assert torch.equal(model.cluster_centers_, plain.cluster_centers_)


def test_the_watch_sees_a_copy_a_crossing_and_a_write() -> None:
    x = rows_on("cpu", torch.float32)
    with Watch(x) as watch:
        x.double()
        x.to("meta")
        x[:5].add_(0.0)
    assert watch.largest == x.numel()
    assert watch.crossings_bytes == [4 * x.numel()]
    assert watch.written
