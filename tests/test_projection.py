"""The sparse random projection: what it promises of squared distances, and the same bits wherever it is done."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases_rows import peak_bytes

from gpuclust.capture import projection
from gpuclust.capture.projection import Distortion, Projection, projection_bytes


def _errors(x, m, seeds):
    """Relative errors of the squared lengths of rows (b, d), for each seed."""
    length = x.double().square().sum(1)
    return torch.stack([Projection(x.shape[1], m, s, "cpu")(x).double().square().sum(1) / length - 1 for s in seeds])


def _dense(d, m, seed):
    return Projection(d, m, seed, "cpu")(torch.eye(d, dtype=torch.float64))


def test_the_matrix_is_the_one_described():
    """One value of +-1/sqrt(8) in each block for each feature; a group never meets itself."""
    d, m = 1003, 64
    dense = _dense(d, m, 5).view(d, 8, 8)
    assert (dense.ne(0).sum(2) == 1).all()
    np.testing.assert_allclose(dense[dense != 0].abs(), 1 / math.sqrt(8))
    bucket = dense.abs().argmax(2)
    for start in range(0, d, 8):
        group = bucket[start : start + 8]
        assert all(len(set(group[:, r].tolist())) == len(group) for r in range(8))
    # Blocks and groups are turned on their own: buckets of the groups' first values, all alike often.
    first = bucket[::8]
    assert torch.bincount(first.flatten(), minlength=8).min() > first.numel() / 8 * 0.7
    assert 0.4 < (dense.sum(2) > 0).double().mean() < 0.6


def test_collisions_and_signs_are_independent_between_blocks():
    d, m, seeds = 64, 64, 400
    dense = torch.stack([_dense(d, m, s) for s in range(seeds)]).view(seeds, d, 8, 8)
    bucket, sign = dense.abs().argmax(3), dense.sum(3).sign()
    meets = (bucket[:, 3] == bucket[:, 60]).double()  # of two groups: (seeds, 8)
    assert meets.mean() == pytest.approx(1 / 8, abs=5 * math.sqrt(7 / 64 / meets.numel()))
    both = (meets[:, :-1] * meets[:, 1:]).mean()
    assert both == pytest.approx(1 / 64, abs=5 / 8 / math.sqrt(meets.numel()))
    assert abs((sign[:, 3] * sign[:, 60]).mean()) < 5 / math.sqrt(seeds * 8)
    assert abs((sign[:, :, 0] * sign[:, :, 1]).mean()) < 5 / math.sqrt(seeds * d)


@pytest.mark.parametrize("kind", ["spread", "channels", "few", "two", "runs"])
def test_squared_lengths_are_right_on_average_and_within_the_rms(kind):
    generator = torch.Generator().manual_seed(0)
    d, m, seeds = 5000, 128, 600
    x = torch.zeros(1, d)
    if kind == "spread":
        x = torch.randn(1, d, generator=generator).relu()
    elif kind == "channels":
        x = torch.rand(1, d, generator=generator) * torch.logspace(-3, 1, 50).repeat_interleave(100)
    elif kind == "few":
        x[0, torch.randperm(d, generator=generator)[:12]] = 1.0
    elif kind == "two":
        x[0, [17, 4000]] = 1.0
    else:
        x[0, 100:180], x[0, 2000:2080] = 1.0, -1.0
    errors = _errors(x, m, range(seeds))[:, 0]
    groups = torch.nn.functional.pad(x, (0, -d % 16)).double().view(-1, 16).square().sum(1)
    variance = 2 / m * (1 - float(groups.square().sum() / groups.sum() ** 2))
    assert variance <= 2 / m
    # Standard errors of a mean and of a variance; the fourth moment is measured.
    assert abs(errors.mean()) < 4.5 * math.sqrt(variance / seeds)
    spread = errors.square().std() / math.sqrt(seeds)
    assert abs(errors.square().mean() - variance) < 4.5 * spread
    if kind == "two":
        assert errors.abs().max() <= 8 / 8 + 1e-6
        np.testing.assert_allclose(errors * 8, (errors * 8).round(), atol=1e-4)


def test_one_feature_keeps_its_length():
    x = torch.zeros(1, 9000)
    x[0, 1234] = -3.0
    np.testing.assert_allclose(_errors(x, 64, range(20)), 0, atol=1e-6)


def test_linear_and_fixed():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4, 3, 20, 21, generator=generator, dtype=torch.float64) for _ in range(2))
    project = Projection(1260, 64, 7, "cpu")
    assert project(x).dtype == torch.float64
    torch.testing.assert_close(project(2 * x - 3 * y), 2 * project(x) - 3 * project(y))
    torch.testing.assert_close(project(x), x.flatten(1) @ _dense(1260, 64, 7))
    assert torch.equal(project(x), Projection(1260, 64, 7, "cpu")(x))
    assert not torch.equal(project(x), Projection(1260, 64, 8, "cpu")(x))
    # Written down once: a change of these numbers changes everybody's sketches.
    ones = Projection(40, 8, 0, "cpu")(torch.arange(40.0)[None])
    np.testing.assert_allclose(ones * math.sqrt(8), [[46, 184, 80, -20, -6, -124, -100, 196]], atol=1e-3)


@pytest.mark.parametrize("shape", [(5000,), (7, 31, 23), (197, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_same_bits_alone_in_a_batch_and_in_any_layout(monkeypatch, shape, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, *shape, generator=generator).to(dtype)
    x[2] = 0.0
    project = Projection(math.prod(shape), 64, 3, "cpu")
    together = project(x)
    assert together.dtype == (dtype if dtype == torch.float64 else torch.float32)
    seen = [torch.cat([project(row[None]) for row in x]), torch.cat([project(x[:4]), project(x[4:])])]
    if len(shape) == 3:
        seen.append(project(x.contiguous(memory_format=torch.channels_last)))
    seen.append(project(x.transpose(0, -1).contiguous().transpose(0, -1)))
    for size in (1, 1 << 14, 1 << 30):
        monkeypatch.setattr(projection, "_TURNED_BYTES", {"cpu": size})
        seen.append(project(x))
    for other in seen:
        assert other.numpy().tobytes() == together.numpy().tobytes()


@pytest.mark.gpu
def test_the_same_bits_on_the_gpu():
    x = torch.randn(20, 16, 60, 61, generator=torch.Generator().manual_seed(4)).relu()
    for dtype in (torch.float32, torch.float16, torch.float64):
        rows = x.to(dtype)
        on_host = Projection(58560, 256, 1, "cpu")(rows)
        project, on_device = Projection(58560, 256, 1, "cuda"), rows.cuda()
        assert torch.equal(project(on_device).cpu(), on_host)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert torch.equal(project(on_device.to(memory_format=torch.channels_last)).cpu(), on_host)
        held = torch.cuda.max_memory_allocated() - before - on_device.nbytes
        assert held <= projection_bytes(58560, 256, 20, dtype.itemsize, "cuda")[1] + (1 << 14)


@pytest.mark.parametrize(
    ("b", "shape", "m", "dtype"),
    [
        (8, (64, 56, 56), 4096, torch.float32),
        (64, (64, 56, 56), 256, torch.float16),
        (1, (4097,), 4096, torch.float32),
        (3, (16, 50, 50), 64, torch.float64),
    ],
)
def test_what_it_holds_is_foretold(b, shape, m, dtype):
    project = Projection(math.prod(shape), m, 0, "cpu")
    x = torch.ones(b, *shape, dtype=dtype)
    stays, said = projection_bytes(project.d, m, b, dtype.itemsize, "cpu")
    peak = peak_bytes(lambda: project(x))
    assert 0.5 * said < peak <= said + 256
    kept = sum(t.nbytes for t in vars(project).values() if isinstance(t, torch.Tensor))
    assert kept == pytest.approx(stays, abs=8)


def test_distortion_is_that_of_the_pairs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, 30, 30, generator=generator).relu() + 50
    x[7] = x[3]
    project, seen = Projection(5400, 256, 0, "cpu"), Distortion(rows=30)
    for batch in x.to(memory_format=torch.channels_last).split(16):
        seen.see(batch, project(batch))
    errors = []
    for rows in (x[:16], x[16:30]):
        before, after = (torch.nn.functional.pdist(t.flatten(1).double()).square() for t in (rows, project(rows)))
        errors.append((after / before - 1)[before > 0])
    wanted = torch.cat(errors)
    assert seen.pairs == len(wanted) == 119 + 91
    assert seen.mean == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert seen.rms == pytest.approx(float(wanted.square().mean().sqrt()), rel=1e-3)
    assert seen.largest == pytest.approx(float(wanted.abs().max()), rel=1e-3)
    assert seen.rms < 1.5 * math.sqrt(2 / 256)
    assert seen.describe().startswith("measured on 210 pairs of images: ")


def test_distortion_without_pairs_says_so():
    seen = Distortion()
    for _ in range(3):
        seen.see(torch.ones(1, 5), torch.ones(1, 5))
    seen.see(torch.ones(4, 5), torch.ones(4, 5))  # all alike
    assert seen.pairs == 0
    assert math.isnan(seen.rms)
    assert seen.describe().startswith("not measured")
