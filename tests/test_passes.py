"""Geometry of rows that come in passes: the same bits as of rows on the device, in the passes and bytes foretold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_rows import peak_bytes

from gpuclust.compare import workspace
from gpuclust.compare.similarity import geometry
from gpuclust.compare.workspace import geometry_bytes, geometry_passes
from gpuclust.errors import MemoryLimitError


class Streamed:
    """Rows that don't lie on the device: chunks of sizes of its own, gone once the next is asked for."""

    resident = False

    def __init__(self, x, sizes=(7, 1, 40, 3)):
        self.x, self.sizes = x, sizes
        self.shape, self.dtype, self.device = tuple(x.shape), x.dtype, x.device
        self.passes, self.taken = 0, 0

    def chunks(self, rows):
        self.passes += 1
        start, turn = 0, 0
        while start < len(self.x):
            chunk = self.x[start : start + min(rows, self.sizes[turn % len(self.sizes)])].clone()
            yield start, chunk
            start, turn = start + len(chunk), turn + 1
            chunk.fill_(torch.nan)

    def take(self, index):
        self.taken += 1
        return self.x[index]


def _rows(n, d, k=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    rows = torch.randn(n, d, generator=generator) + 2 * torch.randn(k, d, generator=generator)[labels] + 3
    return rows.to(dtype), labels.numpy()


def _same(one, other):
    assert one.projection.tobytes() == other.projection.tobytes()
    assert (one.explained, one.silhouette, one.silhouette_n) == (other.explained, other.silhouette, other.silhouette_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "d", "most"), [(90, 5000, 200), (150, 4001, 40), (1300, 900, 600), (40, 3, 12)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9999, None])
def test_the_same_bits_in_the_passes_foretold(monkeypatch, n, d, most, dtype, share):
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cpu": 1 << 16})
    rows, labels = _rows(n, d, dtype=dtype)
    resident = geometry(rows, labels, 4, seed=1, most=most)
    least = geometry_bytes(n, d, 4, dtype.itemsize, resident=False, device="cpu", most=most)
    whole = geometry_bytes(n, d, 4, dtype.itemsize, resident=False, device="cpu", most=most) + rows.nbytes
    limit = None if share is None else int(least + share * (whole - least))
    source = Streamed(rows)
    _same(geometry(source, labels, 4, seed=1, most=most, memory_limit=limit), resident)
    assert source.passes + source.taken == geometry_passes(n, d, 4, dtype.itemsize, limit, device="cpu", most=most)
    if share is None:
        assert (source.passes, source.taken) == (int(n > most), 1)
    if share == 0.0 and d > 1000:
        assert source.passes > 4


@pytest.mark.parametrize("sizes", [(1,), (1000,), (33, 2)])
def test_chunks_do_not_show(monkeypatch, sizes):
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cpu": 1 << 16})
    rows, labels = _rows(300, 700)
    limit = geometry_bytes(300, 700, 4, 4, resident=False, device="cpu", most=100)
    got = geometry(Streamed(rows, sizes), labels, 4, seed=1, most=100, memory_limit=limit)
    _same(got, geometry(rows, labels, 4, seed=1, most=100))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "k", "most"),
    [
        (300, 40_000, 5, 2048),
        (900, 30_000, 5, 2048),
        (900, 30_000, 5, 120),
        (600, 400_000, 5, 16),
        (1500, 500, 900, 1200),
        (200_000, 16, 3, 1024),
    ],
)
def test_the_workspace_is_what_was_said(n, d, k, most, streamed):
    """Within the bytes, and not far below: a formula that is far too large would refuse what runs."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).half()
    labels = np.arange(n, dtype=np.int32) % k
    said = geometry_bytes(n, d, k, 2, resident=not streamed, device="cpu", most=most)
    source = Streamed(rows, (1 + (1 << 14) // d,)) if streamed else rows
    peak = peak_bytes(lambda: geometry(source, labels, k, seed=0, most=most, memory_limit=said))
    chunks = 2 * (1 + (1 << 14) // d) * rows[:1].nbytes * streamed  # of the source itself
    assert 0.8 * said <= peak <= said + chunks + (1 << 12)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("n", "d", "most"), [(300, 20_000, 2048), (700, 20_000, 256)])
def test_more_is_held_within_the_limit(monkeypatch, n, d, most, share):
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cpu": 1 << 18})
    rows, labels = _rows(n, d, dtype=torch.float16)
    shape = workspace.Workspace(n, d, 4, 2, False, "cpu", most)
    limit = int(shape.least_bytes + share * (shape.held_bytes - shape.least_bytes))
    peak = peak_bytes(lambda: geometry(Streamed(rows, (1,)), labels, 4, seed=0, most=most, memory_limit=limit))
    assert 0.8 * limit <= peak <= limit + 2 * rows[:1].nbytes + (1 << 12)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "d", "most"), [(700, 40_000, 2048), (3000, 9000, 600)])
def test_the_same_bits_and_bytes_on_the_gpu(monkeypatch, n, d, most):
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cuda": 1 << 22})
    rows, labels = _rows(n, d, dtype=torch.float16)
    rows = rows.cuda()
    resident = geometry(rows, labels, 4, seed=1, most=most)
    limit = geometry_bytes(n, d, 4, 2, resident=False, device="cuda", most=most)
    for memory_limit in (limit, 2 * limit, None):
        _same(geometry(Streamed(rows, (64,)), labels, 4, seed=1, most=most, memory_limit=memory_limit), resident)
    del resident
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    geometry(Streamed(rows, (1,)), labels, 4, seed=1, most=most, memory_limit=limit)
    # The decompositions' own workspace is torch's choice: 8 MiB are left for it.
    assert torch.cuda.max_memory_allocated() - before <= limit + (8 << 20)


def test_a_limit_too_small_is_refused_before_any_pass():
    rows, labels = _rows(90, 500)
    source = Streamed(rows)
    least = geometry_bytes(90, 500, 4, 4, resident=False, device="cpu")
    with pytest.raises(MemoryLimitError, match="the geometry of 90 rows"):
        geometry(source, labels, 4, seed=0, memory_limit=least - 1)
    assert source.passes == source.taken == 0


def test_passes_over_vgg_on_cards():
    """Layers that fit no card: more room, fewer passes; the projection needs one more than the sample does."""
    d = 64 * 224 * 224
    passes = [geometry_passes(50_000, d, 1000, 2, gib << 30, device="cuda") for gib in (2, 8, 16)]
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 2
    assert geometry_passes(2000, d, 1000, 2, 16 << 30, device="cuda") == 1
