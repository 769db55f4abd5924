"""Several processes, one fit: the bits of one process, and an error of one that is an error of all."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_cluster import blobs, rows
from cases_rows import Changing, reorder

from gpuclust.cluster import KMeans, shared
from gpuclust.cluster.distributed import Block, Group, OneProcess, TorchGroup
from gpuclust.cluster.lloyd import Weights
from gpuclust.errors import InputError, UnavailableError

FOLDER = Path(__file__).parent
N = 240
# Enough for one restart at a time.
LITTLE = 3_000_000
# Where the rows of each process end.
CUTS = {2: (7, N), 3: (90, 95, N)}


# ---- what is fitted


def _blobs(dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(blobs(np.random.RandomState(3), N, 6, k=8, apart=2.0) + offset).to(dtype)


def _weights(zeros: int) -> np.ndarray:
    weights = np.random.RandomState(1).exponential(size=N) * 1e3
    weights[::3] = 0
    weights[:zeros] = 0
    return weights


def _far(x: torch.Tensor, count: int) -> torch.Tensor:
    """Centroids of which ``count`` are so far away that they begin empty."""
    far = x.amax() * 100 + torch.arange(count, dtype=x.dtype)[:, None] * torch.ones(x.shape[1], dtype=x.dtype)
    return torch.cat([x[: 9 - count], far])


def _mirrored() -> torch.Tensor:
    """Every row is equally far from the centroids that it may belong to, and several are the farthest."""
    corners = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-3.0, -3.0], [3.0, 3.0]])
    return corners.repeat(N // 6, 1)


def _cases(size: int) -> dict[str, tuple[torch.Tensor, dict[str, Any], np.ndarray | None]]:
    """Rows, parameters, weights; for two processes all of them."""
    x = _blobs(torch.float64)
    cases: dict[str, tuple[torch.Tensor, dict[str, Any], np.ndarray | None]] = {
        "more clusters than a process has rows": (_blobs(torch.float32), {"n_clusters": 30}, None),
        "weights, float16": (_blobs(torch.float16), {"n_init": 3}, _weights(0)),
        "k-means||, weights": (x, {"init": "k-means||", "n_init": 3}, _weights(0)),
        "random, weights": (x, {"init": "random", "n_init": 3}, _weights(0)),
        "array, empty clusters": (x, {"init": _far(x, 8)}, None),
        "array, empty clusters, equally far rows": (_mirrored(), {"init": _far(_mirrored(), 5)}, None),
    }
    if size > 2:
        return cases
    for dtype in (torch.float32, torch.float64, torch.float16):
        cases[f"k-means++, {dtype}"] = (_blobs(dtype), {"n_init": 3}, None)
    for init in ("k-means++", "random", "k-means||"):
        cases[f"{init}, offset"] = (_blobs(torch.float32, 1e4), {"init": init, "n_init": 3}, None)
        cases[f"{init}, a process without weight"] = (_blobs(torch.float32), {"init": init, "n_init": 2}, _weights(100))
        cases[f"{init}, duplicates"] = (rows("noise", 6, 3).repeat(N // 6, 1), {"init": init}, _weights(100))
        cases[f"{init}, tight groups, far row"] = (rows("one far row", N, 3), {"init": init, "n_init": 3}, None)
        cases[f"{init}, little memory"] = (
            _blobs(torch.float32),
            {"init": init, "n_init": 2, "memory_limit": LITTLE},
            None,
        )
    cases["k-means++, weights"] = (x, {"n_init": 3}, _weights(0))
    cases["weights that are one here and two there"] = (_blobs(torch.float32), {}, np.where(np.arange(N) < 7, 1.0, 2.0))
    cases["array"] = (x, {"init": x[50:59]}, None)
    cases["cosine, weights"] = (_blobs(torch.float32), {"metric": "cosine", "n_init": 3}, _weights(0))
    cases["array, empty clusters, weights"] = (x, {"init": _far(x, 4)}, _weights(0))
    cases["equally good restarts"] = (_mirrored(), {"n_clusters": 2, "init": "random", "n_init": 8}, None)
    return cases


def _fit(x: Any, options: dict[str, Any], weights: Any) -> dict[str, Any]:
    """All that a fit says, as bytes where bits count."""
    parameters = {"n_clusters": 9, "random_state": 5, "max_iter": 20, "verbose": 1, **options}
    with warnings.catch_warnings(record=True) as told, redirect_stdout(StringIO()) as printed:
        warnings.simplefilter("always")
        model = KMeans(**parameters).fit(x, sample_weight=weights)
    return {
        "labels": model.labels_.tolist(),
        "centers": model.cluster_centers_.numpy().tobytes(),
        "inertia": model.inertia_.hex(),
        "n_iter": model.n_iter_,
        "trace": [value.hex() for value in model.fit_report_.trace],
        "dist2": model.fit_report_.dist2.numpy().tobytes(),
        "score": model.score(x, sample_weight=weights).hex(),
        "warnings": [str(one.message) for one in told],
        # After the line about the solvers, which says that processes share the rows.
        "printed": printed.getvalue().partition("\n")[2],
    }


def _all_cases(group: Group, part: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        name: _fit(shared(part(x), group), options, None if weights is None else part(weights))
        for name, (x, options, weights) in _cases(group.size).items()
    }


# ---- what is refused

# Passes in which a process can no longer read its rows, from the first sample of them to the last distances.
LOST = range(1, 17)


def _refusals(group: Group, part: Callable[[Any], Any]) -> dict[str, Any]:
    """What each of these raises, in this process."""
    x, rank, last = _blobs(torch.float32), group.rank, group.rank == 1
    bad = x.clone()
    bad[200, 4] = float("nan")
    bad[210, 1] = float("inf")
    zeros = x.clone()
    zeros[220] = 0
    ones = np.ones(len(part(x)))

    def changing(at: int, change: Callable[[torch.Tensor], Any]) -> Changing:
        return Changing(part(x).clone(), at if last else 0, change)

    def lose(_: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    attempts: dict[str, Callable[[], Any]] = {
        "NaN": lambda: KMeans(3).fit(shared(part(bad), group)),
        "no rows": lambda: KMeans(3).fit(shared(x[:0] if last else x, group)),
        "three dimensions": lambda: KMeans(3).fit(shared(x[None] if last else x, group)),
        "sparse": lambda: KMeans(3).fit(shared(x.to_sparse() if last else x, group)),
        "too many clusters": lambda: KMeans(N + 1).fit(shared(part(x), group)),
        "parameter": lambda: KMeans(0 if last else 3).fit(shared(x, group)),
        "clusters": lambda: KMeans(3 + rank, random_state=0).fit(shared(x, group)),
        "width": lambda: KMeans(3, random_state=0).fit(shared(x[:, rank:], group)),
        "dtype": lambda: KMeans(3, random_state=0).fit(shared(x.double() if last else x, group)),
        "starts": lambda: KMeans(3, init=x[rank : rank + 3]).fit(shared(x, group)),
        "callable": lambda: KMeans(3, init=lambda x, k, random_state: x[:k]).fit(shared(x, group)),
        "weights missing": lambda: KMeans(3).fit(shared(part(x), group), sample_weight=None if last else ones),
        "weights negative": lambda: KMeans(3).fit(shared(part(x), group), sample_weight=-ones if last else ones),
        "weights zero": lambda: KMeans(3).fit(shared(part(x), group), sample_weight=0 * ones),
        "too large": lambda: KMeans(3).fit(shared(part(x.double() * (1e160 if last else 1)), group)),
        "zeros": lambda: KMeans(3, metric="cosine").fit(shared(part(zeros), group)),
        "metric": lambda: KMeans(3, metric="cosine" if last else "euclidean", random_state=0).fit(shared(x, group)),
        "changed": lambda: KMeans(3, random_state=0).fit(shared(changing(7, lambda x: x[1:2].add_(1)), group)),
        "another order": lambda: KMeans(3, random_state=0).fit(shared(changing(5, reorder), group)),
        **{
            f"lost in pass {at}": lambda at=at: KMeans(3, random_state=0).fit(shared(changing(at, lose), group))
            for at in LOST
        },
        "score": lambda: KMeans(3).fit(x).score(shared(bad if last else x, group)),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


def _alone(part: Callable[[Any], Any]) -> tuple[list[int], float]:
    """A model of this process that has nothing to do with those of the others."""
    model = KMeans(3, random_state=0).fit(part(_blobs(torch.float64)))
    return model.labels_.tolist(), model.inertia_


def _drawn(rank: int, part: Callable[[Any], Any]) -> bytes:
    """Centroids of all processes where their random states are not the same."""
    np.random.seed(rank)
    return KMeans(3, init="random").fit(shared(part(_blobs(torch.float64)))).cluster_centers_.numpy().tobytes()


def _outsider(processes: Any) -> str:
    """What a process is told that does not belong to the group."""
    try:
        return str(TorchGroup(processes))
    except UnavailableError as error:
        return str(error)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes gives; one that waits for ever is a failure."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, cwd=FOLDER.parent) for rank in range(3)
    ]
    try:
        for process in processes:
            _, told = process.communicate(timeout=120)
            assert process.returncode == 0, told.decode()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [pickle.loads((folder / f"answer-{rank}").read_bytes()) for rank in range(3)]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_find_the_bits_of_one(size: int, answers: list[dict[str, Any]]) -> None:
    for name, (x, options, weights) in _cases(size).items():
        whole = _fit(x, options, weights)
        parts = [answer[f"cases of {size}"][name] for answer in answers[:size]]
        assert [part["printed"] for part in parts] == [whole["printed"]] + [""] * (size - 1), name
        for part in parts:
            for fact in ("centers", "inertia", "n_iter", "trace", "score", "warnings"):
                assert part[fact] == whole[fact], (name, fact)
        assert [label for part in parts for label in part["labels"]] == whole["labels"], name
        assert b"".join(part["dist2"] for part in parts) == whole["dist2"], name


def test_an_error_of_one_process_is_an_error_of_all(answers: list[dict[str, Any]]) -> None:
    one, two = (answer["refusals"] for answer in answers[:2])
    assert one == two
    for name, kind, words in (
        ("NaN", "InputError", "process 1 of 2: Input X contains NaN. It is nan in row 200, column 4"),
        ("no rows", "InputError", "process 1 of 2: Found array with 0 sample"),
        ("three dimensions", "InputError", "process 1 of 2: Expected 2D array"),
        ("sparse", "TypeError", "process 1 of 2: Sparse data"),
        ("too many clusters", "InputError", f"n_samples={N} should be >= n_clusters={N + 1}"),
        ("parameter", "ParameterError", "process 1 of 2: The 'n_clusters' parameter"),
        ("clusters", "InputError", "need the same n_clusters; got 3 in process 0, 4 in process 1"),
        ("width", "InputError", "need the same features; got 6 in process 0, 5 in process 1"),
        ("dtype", "InputError", "need the same dtype; got torch.float32 in process 0, torch.float64 in process 1"),
        ("starts", "InputError", "need the same init; got"),
        ("callable", "InputError", "a callable 'init' sees the rows of one process alone"),
        ("weights missing", "InputError", "need the same sample_weight; got 'given' in process 0, None in process 1"),
        ("weights negative", "InputError", "process 1 of 2: Negative values"),
        ("weights zero", "InputError", "sample_weight is zero for every row"),
        ("too large", "InputError", "too large"),
        ("zeros", "InputError", "process 1 of 2: Input X contains a row of zeros: row 220 "),
        ("metric", "InputError", "need the same metric; got 'euclidean' in process 0, 'cosine' in process 1"),
        ("changed", "InputError", "X changed between two passes"),
        ("another order", "InputError", "process 1 of 2: X changed between two passes"),
        *((f"lost in pass {at}", "GpuclustError", "process 1 of 2: OSError: the disk is gone") for at in LOST),
        ("score", "InputError", "process 1 of 2: Input X contains NaN. It is nan in row 200, column 4"),
    ):
        assert one.pop(name)[0] == kind, name
        assert words in two[name][1], (name, two[name])
    assert not one


def test_a_process_group_alone_makes_no_fit_distributed(answers: list[dict[str, Any]]) -> None:
    x, start = _blobs(torch.float64), 0
    for answer, end in zip(answers, CUTS[3], strict=True):
        model = KMeans(3, random_state=0).fit(x[start:end])
        assert answer["alone"] == (model.labels_.tolist(), model.inertia_)
        start = end


def test_the_random_state_of_the_first_process_counts(answers: list[dict[str, Any]]) -> None:
    np.random.seed(0)
    expected = KMeans(3, init="random").fit(_blobs(torch.float64)).cluster_centers_.numpy().tobytes()
    assert [answer["drawn"] for answer in answers] == [expected] * 3


def test_a_process_outside_the_group_is_told_so(answers: list[dict[str, Any]]) -> None:
    assert "does not belong to the process group" in answers[2]["outsider"]


# ---- in one process


def test_without_a_process_group_nothing_can_be_shared() -> None:
    with pytest.raises(UnavailableError, match="init_process_group"):
        TorchGroup()
    with pytest.raises(UnavailableError, match="init_process_group"):
        shared(torch.ones(3, 2))


def test_a_group_of_one_is_no_difference() -> None:
    x = _blobs(torch.float32)
    assert _fit(shared(x, OneProcess()), {"n_init": 2}, None) == _fit(x, {"n_init": 2}, None)


class Rank:
    """One of several processes, of which nothing is asked but how many rows they have."""

    def __init__(self, rank: int, counts: list[int]) -> None:
        self.rank, self.size, self.counts = rank, len(counts), counts

    def gather(self, item: Any) -> list[Any]:
        return self.counts

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        raise AssertionError("nothing is to be added")


def test_blocks_follow_each_other_and_none_is_empty() -> None:
    counts = [3, 1, 4]
    blocks = [Block.of(count, Rank(rank, counts)) for rank, count in enumerate(counts)]
    assert [(block.first, block.here, block.n) for block in blocks] == [(0, 3, 8), (3, 1, 8), (4, 4, 8)]
    index = torch.tensor([7, 0, 3, 3, 4, 2])
    here, local = blocks[2].place(index)
    assert here.tolist() == [True, False, False, False, True, False]
    assert local.tolist() == [3, 0]
    for rank in range(2):
        with pytest.raises(InputError, match=r"process 1 of 2 holds no rows.*got \[3, 0\]"):
            Block.of(3, Rank(rank, [3, 0]))


def test_weights_lost_in_the_unit_count_as_the_lightest() -> None:
    assert Weights(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)).lightest == 0.125
    with pytest.raises(InputError, match="differ by a factor of 2"):
        Weights(torch.tensor([1e300, 5e-324], dtype=torch.float64))


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=3)
    pair = torch.distributed.new_group([0, 1])

    def part(size: int) -> Callable[[Any], Any]:
        cuts = (0, *CUTS[size])
        return lambda x: x[cuts[rank] : cuts[rank + 1]]

    answer: dict[str, Any] = {
        "cases of 3": _all_cases(TorchGroup(), part(3)),
        "alone": _alone(part(3)),
        "drawn": _drawn(rank, part(3)),
    }
    if rank == 2:
        answer["outsider"] = _outsider(pair)
    else:
        two = TorchGroup(pair)
        answer["cases of 2"] = _all_cases(two, part(2))
        answer["refusals"] = _refusals(two, part(2))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    (folder / f"answer-{rank}").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
