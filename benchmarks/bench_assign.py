"""Labels for given centroids, and the update that follows, beside every peer that has such a call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shapes import CPU_STEPS, GPU, Shape, fitting, with_dtype

CASES = [("cpu", shape) for shape in CPU_STEPS] + [
    ("cuda", with_dtype(shape, dtype)) for shape in GPU if shape.case.batch == 1 for dtype in ("float32", "float16")
]


@pytest.mark.parametrize(
    ("device", "shape"), CASES, indirect=["device"], ids=[f"{device}-{shape.title()}" for device, shape in CASES]
)
def test_assign(device: torch.device, shape: Shape, measure_case: Callable) -> None:
    if device.type == "cuda":
        shape = fitting(shape, torch.cuda.mem_get_info(device)[0])
    measure_case(shape.case, ["assign", "update"], shape.title())
