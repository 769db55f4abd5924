"""Rows that fit nowhere: computed anew, in a file, in several passes, with the bits of rows that stay on the device."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases_limit as limited
import cases_run as cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gpuclust
from gpuclust.capture.images import open_images
from gpuclust.capture.layers import choose_layers, find_layers
from gpuclust.capture.models import Network
from gpuclust.capture.passes import Passes
from gpuclust.capture.pixels import Pixels
from gpuclust.capture.places import Spill
from gpuclust.capture.recompute import Recomputed
from gpuclust.capture.reduce import Reduction, parse_reductions
from gpuclust.capture.store import LayerStore
from gpuclust.compare.result import COLUMNS
from gpuclust.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")
N, SIDE = 60, 48


class Wide(nn.Module):
    """Two wide layers and two narrow ones; values grow from image to image so that float16 rows are rescaled."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 16, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.features(images)), 1))


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Wide().eval()


def data(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.rand(n, 3, SIDE, SIDE, generator=generator) + labels[:, None, None, None] * 0.4
    return TensorDataset(images * (2.0 ** (torch.arange(n) // 12))[:, None, None, None], labels)


def passes(batch_size: int, keep: bool = False) -> tuple[Passes, list[Any]]:
    network = wide()
    layers = choose_layers(find_layers(network, torch.zeros(1, 3, SIDE, SIDE)), ["auto"])
    pixels = Pixels(
        open_images(data()),
        None,
        batch_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=0,
        keep=keep,
    )
    return Passes(Network("Wide", network, None, None, {}), pixels, 0), layers


# ---- the rows themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [7, 16, 60])
@pytest.mark.parametrize("kind", ["none", "avgpool", "sketch:64"])
def test_rows_that_are_computed_anew_are_those_that_a_store_holds(
    dtype: torch.dtype, batch_size: int, kind: str
) -> None:
    made, layers = passes(batch_size, keep=batch_size == 16)
    reductions = parse_reductions([kind]).choose(layers)
    reduce = {layer.name: reductions[layer.name].on(layer.shape, "cpu") for layer in layers}
    stores = {
        layer.name: LayerStore(N, reductions[layer.name].values(layer.shape), dtype, "cpu", name=layer.name)
        for layer in layers
    }
    for _ in made.first(layers, lambda layer, _, a: stores[layer.name].append(reduce[layer.name](a))):
        pass
    assert made.pixels.n == N
    for layer in layers:
        store = stores[layer.name]
        store.finish()
        source = Recomputed(made, layer, dtype, reductions[layer.name], 0.5)
        assert source.shape == store.shape
        assert source.scale == store.scale
        assert not source.resident
        assert source.pass_s == 0.5
        for rows in (3, 1000):
            found = torch.empty_like(store.rows)
            for start, x in source.chunks(rows):
                assert len(x) <= rows
                found[start : start + len(x)] = x
            assert torch.equal(found, store.rows)
        index = torch.tensor([59, 0, 17, 17, 30])
        assert torch.equal(source.take(index), store.rows[index])
        assert source.take(index[:0]).shape == (0, store.shape[1])
    assert (stores[layers[0].name].scale != 1.0) == (dtype == torch.float16)


def test_only_the_batches_that_hold_wanted_rows_pass_through_the_network_and_only_up_to_the_layer() -> None:
    made, layers = passes(8)
    for _ in made.first([], lambda *_: None):
        pass
    counts = {"first": 0, "fc": 0}
    network = made.network.module
    handles = [
        network.features[0].register_forward_hook(lambda *_: counts.__setitem__("first", counts["first"] + 1)),
        network.fc.register_forward_hook(lambda *_: counts.__setitem__("fc", counts["fc"] + 1)),
    ]
    source = Recomputed(made, layers[0], torch.float32, Reduction(), 0.0)
    source.take(torch.tensor([9, 15, 59]))
    assert counts == {"first": 2, "fc": 0}
    for handle in handles:
        handle.remove()


def test_a_batch_of_rows_is_gone_when_the_next_is_computed() -> None:
    """Whoever reads them in a loop refers to one batch until it has the next."""
    made, layers = passes(8)
    for _ in made.first([], lambda *_: None):
        pass
    sizes: list[list[int]] = []
    rows: list[Tensor] = []
    made.network.module.register_forward_pre_hook(lambda *_: sizes.append([x.untyped_storage().nbytes() for x in rows]))
    for _, x in Recomputed(made, layers[0], torch.float32, Reduction(), 0.0).chunks(3):
        rows.append(x)
    assert len(sizes) == 8
    assert not any(map(any, sizes))
    assert len(rows) == 7 * 3 + 2


def test_activations_that_are_not_finite_name_the_layer_and_the_image() -> None:
    made, layers = passes(8)
    for _ in made.first([], lambda *_: None):
        pass
    made.network.module.features[0].bias.data[3] = float("inf")
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(InputError, match=r"conv1: the network's activation of image 0, value 6912, is inf"):
            list(Recomputed(made, layers[0], dtype, Reduction(), 0.0).chunks(8))


def test_a_network_that_gives_something_else_the_next_time_is_noticed() -> None:
    made, layers = passes(8)
    for _ in made.first([], lambda *_: None):
        pass
    source = Recomputed(made, layers[0], torch.float32, Reduction(), 0.0)
    list(source.chunks(8))
    made.network.module.features[0].bias.data[3] += 1
    with pytest.raises(InputError, match="changed between two passes"):
        list(source.chunks(8))


# ---- files


def test_rows_in_a_file_are_rows_and_the_file_has_no_name(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    rows = spill(5, 7, torch.bfloat16)
    assert rows.shape == (5, 7)
    assert rows.dtype == torch.bfloat16
    rows.copy_(torch.arange(35).view(5, 7))
    assert spill.file is not None
    spill.file.release()
    assert torch.equal(rows.float(), torch.arange(35.0).view(5, 7))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_a_row_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot write rows into .* \(--spill\): .*, which 4.*B of rows need|File too"
    ):
        Spill(tmp_path)(1 << 30, 1 << 30, torch.float32)
    with pytest.raises(InputError, match="No such file or directory"):
        Spill(tmp_path / "missing")(2, 2, torch.float32)


# ---- whole runs


def same(one: gpuclust.Report, other: gpuclust.Report) -> None:
    columns = [name for name in COLUMNS if name not in (*cases.TIMES, "solver")]
    assert one.layers[columns].to_csv() == other.layers[columns].to_csv()
    assert one.assignments.equals(other.assignments)
    for a, b in zip(one.results, other.results, strict=True):
        np.testing.assert_array_equal(a.dist2, b.dist2)
        np.testing.assert_array_equal(a.projection, b.projection)


def forced(monkeypatch: pytest.MonkeyPatch, **ways: Callable[..., Any]) -> None:
    for name, way in ways.items():
        monkeypatch.setattr(f"gpuclust.capture.planner._Maker.{name}", way)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
def test_a_run_whose_rows_fit_nowhere_finds_the_same(dtype: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dtype": dtype, "batch_size": 8, "solver": solver}
    whole = gpuclust.analyze(wide(), data(), **options)
    forced(monkeypatch, _resident=lambda *_: None)
    anew = gpuclust.analyze(wide(), data(), **options)
    same(whole, anew)
    assert all("computed anew" in result.notes["rows"] for result in anew.results)
    assert anew.run["plan"]["passes"] > 4
    if solver != "auto":
        assert {result.solver for result in anew.results} == {solver}


def test_a_limit_below_what_the_rows_take_finds_the_same(tmp_path: Path) -> None:
    whole = gpuclust.analyze(wide(), data(240), batch_size=8, out=tmp_path / "whole")
    limited = gpuclust.analyze(wide(), data(240), batch_size=8, out=tmp_path / "limited", memory_limit="50 MB")
    same(whole, limited)
    assert whole.run["plan"]["activations_bytes"] > 79e6
    assert limited.run["plan"]["peak_bytes"] <= 50e6
    assert {row["rows"] for row in limited.run["plan"]["layers"]} == {"device", "recompute"}
    files = [tmp_path / name / "assignments.parquet" for name in ("whole", "limited")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_that_wait_in_a_file_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpuclust.analyze(wide(), data(), batch_size=8)
    forced(monkeypatch, _resident=lambda *_: None)
    monkeypatch.setattr("gpuclust.capture.planner.DISK_RATE", 1e15)
    spilled = gpuclust.analyze(wide(), data(), batch_size=8, spill=tmp_path)
    same(whole, spilled)
    assert {result.notes["rows"] for result in spilled.results} == {"in a file"}
    assert list(tmp_path.iterdir()) == []


def test_layers_in_several_passes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpuclust.analyze(wide(), data(), batch_size=8)
    monkeypatch.setattr("gpuclust.capture.planner.pack", lambda items, *_: [{item.name} for item in reversed(items)])
    several = gpuclust.analyze(wide(), data(), batch_size=8)
    same(whole, several)
    assert several.run["plan"]["passes"] == 4
    assert len(several.run["plan"]["steps"]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
def test_a_process_stays_under_a_limit_far_below_what_the_layers_take(tmp_path: Path) -> None:
    """Two layers of 79 MB within 57 MB, of which the process itself takes 29."""
    layers, limit = "conv1,conv2,fc7", 57_000_000
    limited.run(tmp_path / "whole", layers)
    peak, _ = limited.run(tmp_path / "limited", layers, "--memory-limit", str(limit))
    assert 0.5 * limit < peak <= limit
    files = [tmp_path / name / "assignments.parquet" for name in ("whole", "limited")]
    assert files[0].read_bytes() == files[1].read_bytes()
    plans = [json.loads((tmp_path / name / "run.json").read_text())["plan"] for name in ("whole", "limited")]
    assert plans[0]["activations_bytes"] > 2.7 * limit
    assert [row["rows"] for row in plans[0]["layers"]] == ["device"] * 3
    assert [row["rows"] for row in plans[1]["layers"]] == ["recompute", "recompute", "device"]
