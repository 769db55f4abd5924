"""What an iteration should take on one H100, by counting bytes and operations: predicted, not measured.

    PYTHONPATH=. python benchmarks/predict.py

prints the table of README.md; a test holds them together. It is of the CuPy backend's kernels, of an iteration after
the first few, with the first look's tile as `gpuclust.cluster.backends.tile` chooses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from shapes import GPU, with_dtype

from gpuclust.bench.case import Case
from gpuclust.bench.ceilings import Ceilings, limit_s
from gpuclust.cluster.backends.base import SLICE
from gpuclust.cluster.backends.tile import Tile
from gpuclust.cluster.sums import Grid

# NVIDIA's data sheet of the H100 SXM: device memory, dense products of each type; a score's argmin, of peers.
H100 = Ceilings(3.35e12, {"float16": 989e12, "bfloat16": 989e12, "tf32": 495e12, "float32": 67e12}, 4.2e12)
SHARED_BYTES, MULTIPROCESSORS = 227 << 10, 132
OPEN_ROWS = 64  # of a block of the second look, which share a reading of the centroids
FEW = 256  # centroids for which product.cu reads the rows, 128 of them at a time
# What is reached of these: a copy (3.0 TB/s); a matrix product of 8192^3 (800 TFLOP/s); and product with argmin, of
# which assign.cu reached 20 % on an H200 (1M x 128, k 1024; results/h200-c4ca698.txt), and published kernels reach 35 %
# (1M x 128, k 256) to 46 % (65,536 x 4096, k 4096) there, in Triton.
COPY, PRODUCT, FUSED = 0.9, 0.81, (0.20, 0.45)
# Reads of the second-level cache; OpenXLA's cost model of a GPU's products has it as measured on an H100.
CACHE_BYTES_PER_S = 6.65e12
# Shares of the rows that the first look and then the second leave open, and that move: found on a CPU in ten iterations
# over 800 to 20,000 rows of each shape, from the fifth on 0 to 2.7 %, 0 to 0.05 % and 0 to 12 %.
OPEN, LEFT, MOVED = 0.02, 2e-4, 0.1
# What the host issues in an iteration, 26 operations of torch and 10 kernels (tests/test_late.py counts them), and how
# many of these run on the device; what the host needs for each, and the device at least.
OPERATIONS, LAUNCHES, HOST_S, DEVICE_S = 36, 14, 5e-6, 2.5e-6
# Bytes that are read and written for each value of the centroids: itself twice and its mean once, as float32, operands
# of 2 + 4 + 4 bytes; and its sums, on each level of their grid.
CENTROID_BYTES, LEVEL_BYTES = 22, 8


@dataclass(frozen=True)
class Prediction:
    """Seconds of an iteration and of its parts: the least and the most of each."""

    first_look: tuple[float, float]
    second_look: tuple[float, float]
    update: float
    centroids: float
    host: float

    @property
    def device(self) -> tuple[float, float]:
        least, most = (a + b for a, b in zip(self.first_look, self.second_look, strict=True))
        return least + self.update + self.centroids, most + self.update + self.centroids

    @property
    def iteration(self) -> tuple[float, float]:
        """The device's time, or the host's where that is longer: it is ahead as far as it can be."""
        least, most = self.device
        return max(least, self.host), max(most, self.host)


def predict(case: Case) -> Prediction:
    """An iteration of one of the problems of a case; of a batch, of all of them, one after the other."""
    n, d, k = case.n, case.d, case.k
    levels = Grid.of(torch.ones(1), n, case.torch_dtype).levels
    moved = MOVED * n * d
    update_s = memory_s(8 * n + moved * case.torch_dtype.itemsize)
    update_s += 2 * levels * moved * 16 / CACHE_BYTES_PER_S  # an atomic addition reads and writes a float64
    steps_s = LAUNCHES * DEVICE_S + memory_s((CENTROID_BYTES + levels * LEVEL_BYTES) * k * d)
    first, second = ([look(case, FUSED[i]) * case.batch for i in (1, 0)] for look in (first_look_s, second_look_s))
    return Prediction(
        (first[0], first[1]),
        (second[0], second[1]),
        update_s * case.batch,
        steps_s * case.batch,
        OPERATIONS * HOST_S * case.batch,
    )


def first_look_s(case: Case, share: float) -> float:
    """Products and argmin; the rows' bytes and what the cache must give overlap with them, or bound them."""
    n, d, k, size = case.n, case.d, case.k, case.torch_dtype.itemsize
    tile = Tile.of(k, d, SHARED_BYTES, MULTIPROCESSORS)
    slices = ceil(d / SLICE)
    if not tile.rows and k <= FEW:  # rows read for each tile of centroids; products go through the cache
        return memory_s(ceil(k / 128) * n * d * size) + 8 * n * k * slices / CACHE_BYTES_PER_S
    if not tile.rows:  # slices as float16, their products, and these added and searched
        product_s = max(2 * n * k * d / (PRODUCT * H100.flop_per_s["float16"]), memory_s(2 * n * d))
        return memory_s(n * d * (size + 2)) + product_s + memory_s(4 * n * k * (4 * slices - 2))
    columns = tile.columns * ceil(k / tile.columns)
    product_s = 2 * n * columns * d / (share * H100.flop_per_s["float16"])
    blocks, width = ceil(n / tile.rows), tile.width(d)
    if not tile.streamed:
        cache_s = 2 * blocks * columns * width / CACHE_BYTES_PER_S
        return max(product_s, cache_s, memory_s(n * d * size))
    cache_s = 2 * blocks * (columns // tile.columns) * (tile.rows + tile.columns) * width / CACHE_BYTES_PER_S
    return memory_s(n * d * (size + 2)) + max(product_s, cache_s)


def second_look_s(case: Case, share: float) -> float:
    """Three products of float16 parts for each open row; then each row that is left, with all centroids in float32."""
    n, d, k = OPEN * case.n, case.d, case.k
    product_s = 3 * 2 * n * k * d / (share * H100.flop_per_s["float16"])
    cache_s = 4 * ceil(n / OPEN_ROWS) * k * d / CACHE_BYTES_PER_S
    return max(product_s, cache_s, memory_s(n * d * case.torch_dtype.itemsize)) + (
        LEFT * case.n * 4 * k * d / CACHE_BYTES_PER_S
    )


def memory_s(count: float) -> float:
    """Seconds for so many bytes of the device's memory."""
    return count / (COPY * H100.copy_bytes_per_s)


def table() -> Iterator[str]:
    """Lines of Markdown: for each shape and type the limit, the parts, and their sum, in milliseconds."""
    yield "| shape | input | memory | product | first look | second look | update | centroids | host | iteration |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for shape in GPU:
        for dtype in ("float32", "float16"):
            case = with_dtype(shape, dtype).case
            made = predict(case)
            memory = case.x_bytes / H100.copy_bytes_per_s
            given = H100, "iteration", case.n, case.d, case.k, case.torch_dtype, case.batch
            least = limit_s(*given)
            assert least is not None
            product = 2 * case.batch * case.n * case.d * case.k / H100.product_rate(dtype)
            assert abs(least[0] - max(memory, product)) < 1e-9
            cells = (ms(memory), ms(product), between(made.first_look), between(made.second_look))
            cells += (ms(made.update), ms(made.centroids), ms(made.host), between(made.iteration))
            yield f"| {shape.name} | {dtype} | {' | '.join(cells)} |"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 9.995e-3 else f"{seconds * 1e3:.1f}"


def between(seconds: tuple[float, float]) -> str:
    least, most = map(ms, seconds)
    return least if least == most else f"{least} to {most}"


if __name__ == "__main__":
    print("\n".join(table()))
