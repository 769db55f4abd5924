"""Principal components and silhouette against scikit-learn's, and what they may not do with the rows."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch.utils._python_dispatch import TorchDispatchMode

from gpuclust.compare import similarity, workspace
from gpuclust.compare.similarity import geometry, sample_rows
from gpuclust.errors import InputError


def _rows(n, d, k=4, offset=0.0, spread=3.0, dtype=torch.float32, seed=0):
    """Rows of k clusters, with two directions that stand out, so that the components are well defined."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    centres = torch.randn(k, d, generator=generator) * spread / d**0.5
    rows = torch.randn(n, d, generator=generator) / d**0.5 + centres[labels]
    for scale in (4.0, 2.0):
        rows += scale * torch.randn(n, 1, generator=generator) * torch.randn(1, d, generator=generator) / d**0.5
    return (rows + offset).to(dtype), labels.numpy()


def _same_up_to_sign(got, want, tol):
    for j in range(2):
        scale = np.abs(want[:, j]).max()
        error = min(np.abs(got[:, j] - want[:, j]).max(), np.abs(got[:, j] + want[:, j]).max())
        assert error <= tol * scale, f"component {j}: {error} of {scale}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(60, 5000), (700, 900), (900, 40), (300, 3)])
def test_agrees_with_sklearn(n, d, dtype):
    rows, labels = _rows(n, d, dtype=dtype)
    got = geometry(rows, labels, 4, seed=0)
    exact = rows.double().numpy()
    reference = PCA(2, svd_solver="full").fit(exact)
    assert got.projection.dtype == np.float32
    assert got.projection.shape == (n, 2)
    _same_up_to_sign(got.projection, reference.transform(exact), 1e-5)
    np.testing.assert_allclose(got.explained, reference.explained_variance_ratio_, rtol=1e-6)
    assert got.silhouette == pytest.approx(silhouette_score(exact, labels), abs=1e-9)
    assert got.silhouette_n == n


@pytest.mark.parametrize("offset", [1e4, -3e3])
def test_a_large_offset_costs_no_accuracy(offset):
    rows, labels = _rows(400, 3000, offset=offset)
    got = geometry(rows, labels, 4, seed=0)
    exact = rows.double().numpy() - offset
    assert got.silhouette == pytest.approx(silhouette_score(exact, labels), abs=1e-9)
    _same_up_to_sign(got.projection, PCA(2, svd_solver="full").fit_transform(exact), 1e-5)


def test_unequal_features_and_many_duplicates():
    rows, _ = _rows(100, 2000)
    rows = (rows.clamp_min(0) * torch.logspace(-3, 3, 2000)).repeat(2, 1) + 100.0
    labels = np.arange(200) % 100
    got = geometry(rows, labels, 100, seed=0)
    assert got.silhouette == pytest.approx(silhouette_score(rows.double().numpy() - 100, labels), abs=1e-6)


def test_sampled_silhouette_and_projection_of_all_rows():
    rows, labels = _rows(3000, 120)
    got = geometry(rows, labels, 4, seed=3, most=600)
    sample = sample_rows(3000, 600, 3)
    exact = rows.double().numpy()
    assert got.silhouette == pytest.approx(silhouette_score(exact[sample], labels[sample]), abs=1e-9)
    assert got.silhouette_n == 600
    _same_up_to_sign(got.projection, PCA(2, svd_solver="full").fit(exact[sample]).transform(exact), 1e-5)


def test_silhouette_of_singletons_and_absent_clusters():
    rows, _ = _rows(50, 30)
    labels = np.r_[np.zeros(20), np.full(28, 3), [5], [7]].astype(np.int32)
    got = geometry(rows, torch.as_tensor(labels), 9, seed=0)
    assert got.silhouette == pytest.approx(silhouette_score(rows.double().numpy(), labels), abs=1e-9)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_silhouette_is_nan_where_it_is_not_defined(labels):
    got = geometry(torch.randn(4, 6), np.array(labels), 4, seed=0)
    assert math.isnan(got.silhouette)
    assert np.isfinite(got.projection).all()


def test_rows_on_a_line_and_all_alike():
    line = geometry(torch.arange(20.0)[:, None].repeat(1, 7), np.arange(20) % 2, 2, seed=0)
    np.testing.assert_allclose(np.abs(line.projection[:, 0]), np.abs(np.arange(20) - 9.5) * 7**0.5, rtol=1e-6)
    assert (line.projection[:, 1] == 0).all()
    assert line.explained == (pytest.approx(1.0), 0.0)
    alike = geometry(torch.full((600, 9), 1.7), np.arange(600) % 2, 2, seed=0)
    assert (alike.projection == 0).all()
    assert alike.explained == (0.0, 0.0)
    assert alike.silhouette == 0
    one = geometry(torch.ones(1, 5), np.zeros(1, dtype=np.int64), 1, seed=0)
    assert one.projection.tolist() == [[0, 0]]


def test_low_rank_with_many_rows():
    rows, labels = _rows(700, 3)
    wide = rows @ torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    got = geometry(wide, labels, 4, seed=0)
    reference = PCA(2, svd_solver="full").fit(wide.double().numpy())
    np.testing.assert_allclose(got.explained, reference.explained_variance_ratio_, rtol=1e-9)
    sampled = geometry(wide[:, :1].contiguous(), labels, 4, seed=0, most=600)
    np.testing.assert_allclose(
        np.abs(sampled.projection[:, 0]).max(), (wide[:, 0] - wide[:, 0].mean()).abs().max(), 0.05
    )
    assert (sampled.projection[:, 1] == 0).all()


def test_the_farthest_row_is_on_the_positive_side():
    for seed in range(5):
        rows, labels = _rows(80, 200, seed=seed)
        projection = geometry(rows, labels, 4, seed=0).projection
        assert (projection[np.abs(projection).argmax(0), [0, 1]] > 0).all()


@pytest.mark.parametrize("n", [300, 1500])
def test_the_same_bits_again_and_for_any_strides(n):
    rows, labels = _rows(n, 400)
    first = geometry(rows, labels, 4, seed=0, most=1000)
    for again in (rows.clone(), torch.cat([rows, rows], 1)[:, :400], rows.t().contiguous().t()):
        second = geometry(again, labels, 4, seed=0, most=1000)
        assert first.projection.tobytes() == second.projection.tobytes()
        assert (first.silhouette, first.explained) == (second.silhouette, second.explained)


def test_sample_is_sorted_distinct_and_fixed():
    assert sample_rows(5, 5, 0).tolist() == [0, 1, 2, 3, 4]
    sample = sample_rows(1000, 100, 0)
    assert len(set(sample.tolist())) == 100
    assert (np.diff(sample) > 0).all()
    assert (sample_rows(1000, 100, 1) != sample).any()
    # Written down once: a change of these numbers changes everybody's silhouettes.
    assert sample_rows(1000, 5, 0).tolist() == [11, 269, 850, 855, 921]


class _Watch(TorchDispatchMode):
    """Notes the bytes of the largest tensor made, and of the single values read, which on a GPU cross to the host."""

    def __init__(self):
        super().__init__()
        self.largest, self.read = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket._qualified_op_name == "aten::_local_scalar_dense":
            self.read += 8
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                size = tensor.numel() * tensor.element_size()
                self.largest = max(self.largest, size)
                if not tensor.is_cuda and any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args):
                    self.read += size
        return result


def test_no_copy_of_the_rows(monkeypatch):
    rows, labels = _rows(512, 20_000)
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cpu": 1 << 20})
    with _Watch() as watch:
        got = geometry(rows, labels, 4, seed=0, most=256)
    assert got.projection.nbytes == 512 * 8
    assert watch.largest <= 2 << 20 < rows.numel() * rows.element_size() // 15
    assert watch.read < 512


def test_slices_do_not_show(monkeypatch):
    rows, labels = _rows(200, 700, offset=10)
    whole = geometry(rows, labels, 4, seed=0)
    monkeypatch.setattr(workspace, "_SLICE_BYTES", {"cpu": 1})
    monkeypatch.setattr(similarity, "_TILE", 7)
    sliced = geometry(rows, labels, 4, seed=0)
    np.testing.assert_allclose(sliced.projection, whole.projection, atol=1e-6)
    assert sliced.silhouette == pytest.approx(whole.silhouette, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "labels", "k", "most"),
    [
        (torch.zeros(0, 3), [], 2, 9),
        (torch.zeros(3), [0, 1, 1], 2, 9),
        (torch.zeros(3, 2), [0, 1], 2, 9),
        (torch.zeros(3, 2), [0, 1, 1], 2, 1),
    ],
)
def test_wrong_shapes_are_named(rows, labels, k, most):
    with pytest.raises(InputError, match="geometry takes rows"):
        geometry(rows, np.array(labels, dtype=np.int64), k, seed=0, most=most)


@pytest.mark.gpu
def test_on_the_gpu_nothing_but_the_result_is_copied():
    rows, labels = _rows(1500, 3000, offset=5.0)
    on_host = geometry(rows, labels, 4, seed=0, most=700)
    rows = rows.cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # What the library behind eigh says at its first use.
        with _Watch() as watch:
            on_device = geometry(rows, labels, 4, seed=0, most=700)
        again = geometry(rows.clone(), labels, 4, seed=0, most=700)
    assert 1500 * 8 <= watch.read <= 1500 * 8 + 512
    np.testing.assert_allclose(on_device.projection, on_host.projection, atol=1e-5)
    assert on_device.silhouette == pytest.approx(on_host.silhouette, abs=1e-9)
    assert on_device.projection.tobytes() == again.projection.tobytes()
    assert on_device.silhouette == again.silhouette
