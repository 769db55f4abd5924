"""How a kernel is launched, without a GPU: what the driver is asked for, and how often."""

from __future__ import annotations

from typing import Any

from gpuclust.kernels.launch import Kernel


class Function:
    """A kernel of CuPy's with static shared memory, which fails where it was not asked for enough of the dynamic."""

    def __init__(self, static_bytes: int) -> None:
        self.static_bytes, self.most, self.asked, self.launches = static_bytes, 0, 0, list[tuple[Any, ...]]()

    @property
    def shared_size_bytes(self) -> int:
        return self.static_bytes

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        raise AssertionError("asking for it costs as much as setting it")

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self.most, self.asked = size, self.asked + 1

    def __call__(self, grid: Any, block: Any, arguments: Any, *, shared_mem: int) -> None:
        assert shared_mem <= max(self.most, (48 << 10) - self.static_bytes), "CUDA_ERROR_INVALID_VALUE"
        self.launches.append((grid, block, arguments, shared_mem))


def test_static_and_dynamic_shared_memory_count_together() -> None:
    function = Function(3 << 10)
    kernel = Kernel(function)
    for dynamic, asked in ((0, 0), (45 << 10, 0), ((45 << 10) + 1, 1), (47 << 10, 2), (46 << 10, 2), (90 << 10, 3)):
        kernel((7, 2), 64, dynamic, (1, 2))
        assert function.asked == asked, dynamic
        assert function.launches[-1] == ((7, 2, 1), (64, 1, 1), (1, 2), dynamic)


def test_what_was_asked_for_once_is_not_asked_for_again() -> None:
    function = Function(1 << 10)
    kernel = Kernel(function)
    for _ in range(3):
        kernel((1, 1), 32, 100 << 10, ())
    assert (function.asked, function.most, len(function.launches)) == (1, 100 << 10, 3)
