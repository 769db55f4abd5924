"""The shapes that are measured, and where each comes from. They are issue 3's "What it must reach" unless said so.

For a GPU each stands once with float32 rows (labels exact) and once with float16 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuclust.bench.case import Case


@dataclass(frozen=True)
class Shape:
    """A case with its name, where it comes from and, where there is one, the goal: times a peer is to take longer."""

    name: str
    case: Case
    source: str
    goal: str = ""

    def title(self) -> str:
        return f"{self.name}: {self.case}"


# Whole fits with restarts and seeds of their own, beside scikit-learn's: `bench_fit.py`.
CPU_FITS = (
    Shape("conv3", Case(1000, 64_896, 5, n_init=10), "AlexNet's conv3 (384 x 13 x 13), 1000 images", "5 times, then 8"),
    Shape("pool5", Case(5000, 9216, 10, n_init=10), "AlexNet's pool5 (256 x 6 x 6), 5000 images", "2.5 times, then 5"),
)
# From the same start, so many iterations: `bench_fit.py` and `bench_assign.py`.
CPU_STEPS = (
    Shape("many clusters", Case(200_000, 64, 1024), "vectors of a quantiser's size", "0.8 times, then above 1"),
)
GPU = (
    Shape("1M x 128, k 256", Case(1_000_000, 128, 256), "flash-kmeans' kernel table: memory and product balance"),
    Shape("1M x 128, k 1024", Case(1_000_000, 128, 1024), "FlashLib's README"),
    Shape("1M x 128, k 4096", Case(1_000_000, 128, 4096), "flash-kmeans' kernel table"),
    Shape("65,536 x 4096, k 4096", Case(65_536, 4096, 4096), "flash-kmeans' kernel table: few wide rows"),
    Shape("50,000 x 9216, k 100", Case(50_000, 9216, 100), "AlexNet's pooled conv5 of 50,000 images"),
    Shape("10,000 x 193,600, k 10", Case(10_000, 193_600, 10), "AlexNet's conv1 (64 x 55 x 55) of 10,000 images"),
    Shape("1M x 1024, k 1024", Case(1_000_000, 1024, 1024), "embeddings"),
    Shape("1M x 512, k 4096", Case(1_000_000, 512, 4096), "flash-kmeans' kernel table"),
    Shape("10M x 128, k 1024", Case(10_000_000, 128, 1024, iterations=5), "flash-kmeans' large case, narrower"),
    Shape(
        "32 x 131,072 x 128, k 1000",
        Case(131_072, 128, 1000, batch=32, iterations=5),
        "flash-kmeans' end to end case: 32 heads of a video model",
    ),
)
BY_DEVICE = {"cpu": CPU_STEPS, "cuda": GPU}
# The same parts at sizes for a test of the command itself; nothing is claimed of them.
SMALL = (
    Shape("small", Case(2000, 16, 8, iterations=3), "a test of the command"),
    Shape("small batch", Case(500, 8, 4, batch=3, iterations=2), "a test of the command"),
)


def fitting(shape: Shape, free_bytes: int, share: float = 0.45) -> Shape:
    """The shape with fewer rows where X would take more than a share of the memory; its name then says so."""
    case = shape.case
    if case.x_bytes <= share * free_bytes:
        return shape
    n = max(case.k, int(case.n * share * free_bytes / case.x_bytes))
    return replace(shape, name=f"{shape.name} (n reduced to {n:,}: memory)", case=replace(case, n=n))


def with_dtype(shape: Shape, dtype: str) -> Shape:
    return replace(shape, case=replace(shape.case, dtype=dtype))
