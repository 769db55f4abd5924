"""What a machine can do at most, measured in the same run, and the time of a k-means that nothing could beat.

Per iteration over n rows of width d with k centroids: T_product = 2 n k d / P, with P the matrix product's rate for the
stored type (TF32's for float32 on CUDA: the labels may be proposed in it); T_memory = bytes of X / B per pass over X,
with B the rate of a copy on the device (bytes read and written); T_epilogue = n k / R, the argmin, on CUDA: an add, a
compare and a select for each pair at the rate of the float32 lanes, if nothing overlapped. Where all overlaps and X is
read once, the time is the largest of product and memory; one after the other and with a second pass for the update, it
is their sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpuclust.config import show_bytes

_COPY_BYTES = {"cuda": 1 << 30}
_SIDE = {"cuda": 8192}
_TRIES = 5
# float32 lanes of a multiprocessor, by compute capability; NVIDIA, "CUDA C++ Programming Guide", arithmetic throughput.
_LANES = {(8, 0): 64}
_LANES_OTHERWISE = 128
_OPERATIONS_PER_PAIR = 3


@dataclass(frozen=True)
class Ceilings:
    """The rates of a device.

    Attributes
    ----------
    copy_bytes_per_s : float
        Bytes read plus bytes written.
    flop_per_s : dict
        Of a matrix product, by the name of the type; on CUDA also "tf32".
    pairs_per_s : float or None
        Scores that the float32 lanes can reduce, from the clock that the device reports; None where it does not.
    """

    copy_bytes_per_s: float
    flop_per_s: dict[str, float]
    pairs_per_s: float | None = None

    def __str__(self) -> str:
        rates = (f"{name} product {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flop_per_s.items())
        return ", ".join([f"copy {show_bytes(self.copy_bytes_per_s)}/s", *rates])

    def product_rate(self, dtype: str) -> float:
        """FLOP/s of the fastest product that rows of that type may be labelled with."""
        rates = [self.flop_per_s[name] for name in (dtype, "tf32") if name in self.flop_per_s and dtype != "float64"]
        return max(rates, default=self.flop_per_s.get(dtype, self.flop_per_s["float32"]))


def measure(device: torch.device) -> Ceilings:
    """Measure the rates of ``device``: the best of several tries, on random data (zeros run faster)."""
    side = _SIDE.get(device.type, 1536)
    generator = torch.Generator(device).manual_seed(0)
    source = torch.empty(_COPY_BYTES.get(device.type, 1 << 28) // 4, device=device)
    source.normal_(generator=generator)
    target = torch.empty_like(source)
    copy_s = _best(device, lambda: target.copy_(source))
    a, b = source[: side * side].view(side, side), target[: side * side].view(side, side)
    rates: dict[str, float] = {}
    # A CPU has no product of 16-bit values with float32 sums: they are labelled by float32's.
    types = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype in types:
        rates[str(dtype).removeprefix("torch.")] = _product_rate(device, a.to(dtype), b.to(dtype), "ieee")
    if device.type == "cuda":
        rates["tf32"] = _product_rate(device, a, b, "tf32")
    return Ceilings(2 * source.nbytes / copy_s, rates, _pairs_per_s(device))


def limit_s(
    ceilings: Ceilings, op: str, n: int, d: int, k: int, dtype: torch.dtype, repeats: int = 1
) -> tuple[float, float] | None:
    """Least seconds of an operation: with everything overlapped, and one thing after the other.

    Parameters
    ----------
    op : {"assign", "update", "iteration", "fit", "seed"}
        "fit" is ``repeats`` iterations. Seeding reads each row at least once; one thing after the other, it finds the
        distance of each row to each centroid, too, as k-means++ does. For any other operation there is no limit: None.
    """
    product_s = 2 * n * k * d / ceilings.product_rate(str(dtype).removeprefix("torch."))
    pass_s = n * d * dtype.itemsize / ceilings.copy_bytes_per_s
    epilogue_s = n * k / ceilings.pairs_per_s if ceilings.pairs_per_s else 0.0
    if op == "seed":
        return repeats * pass_s, repeats * (product_s + pass_s + epilogue_s)
    if op == "update":
        return repeats * pass_s, repeats * pass_s
    if op == "assign":
        return repeats * max(product_s, pass_s), repeats * (product_s + pass_s + epilogue_s)
    if op in ("iteration", "fit"):
        return repeats * max(product_s, pass_s), repeats * (product_s + 2 * pass_s + epilogue_s)
    return None


def _product_rate(device: torch.device, a: torch.Tensor, b: torch.Tensor, precision: str) -> float:
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = precision
        seconds = _best(device, lambda: torch.mm(a, b))
    finally:
        setting.fp32_precision = before
    return 2 * a.shape[0] ** 3 / seconds


def _best(device: torch.device, call: Callable[[], object]) -> float:
    """Least seconds of a call: a ceiling is what was reached once."""
    best = float("inf")
    for _ in range(_TRIES + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return best


def _pairs_per_s(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", 0)
    lanes = _LANES.get((properties.major, properties.minor), _LANES_OTHERWISE)
    rate = properties.multi_processor_count * lanes * clock_khz * 1000 / _OPERATIONS_PER_PAIR
    return rate or None
