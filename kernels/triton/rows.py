"""How kernels read rows: float16, float32 and float64 as they are; bfloat16 as its bits, the upper half of a float32's,
since the conversion of Triton's interpreter loses bfloat16's subnormals. On a GPU the shift is the conversion."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def readable(x: torch.Tensor) -> torch.Tensor:
    """``x``, of any strides, as a kernel takes it."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def number(values):
    """What was loaded of `readable` rows, as floating-point numbers."""
    if values.dtype == tl.int16:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values
