"""The first look of the CuPy backend at wide rows whose tiles `assign.cu` does not hold: products, then `select`."""

from __future__ import annotations

from typing import Any

import torch

from gpuclust.cluster.backends.base import SLICE
from gpuclust.cluster.backends.cupy_rows import strided
from gpuclust.cluster.backends.tile import MOST_PARTS, PIECE, blocks
from gpuclust.cluster.relief import relieved

# As in product.cu: rows of a block.
_ROWS = 128
_THREADS, _WARPS = 256, 8
# Bytes of products that stay in the cache until `select` has seen them; and that those of the fewest rows may take.
_PRODUCT_BYTES, _MOST_BYTES = 24 << 20, 256 << 20
# Centroids of all restarts for which reading the rows, twice at most, is what takes the time.
_FEW = 256


class WideLook:
    """Part of the backend."""

    launch: Any
    _options: Any

    def _multiply(
        self,
        x: torch.Tensor,
        norms: torch.Tensor,
        operand: Any,
        labels: torch.Tensor,
        lists: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        """The first look without a tile: products of some rows, all slices of them, and `select`."""
        r, k, _ = operand.centroids.shape
        n, device = x.shape[0], x.device
        matrix = operand.padded.view(r * k, -1)
        slices = blocks(matrix.shape[1], SLICE)
        row_bytes = 4 * r * k * slices
        few = r * k <= _FEW and slices * blocks(r * k, _tile_columns(r * k)) <= MOST_PARTS
        if few and row_bytes * _ROWS <= relieved(_MOST_BYTES):
            multiply, parts = self._few, slices
        else:  # a slice of the rows, too, is on the way
            multiply, parts, row_bytes = self._many, 1, max(4 * r * k, 2 * SLICE)
        size = max(1, relieved(_PRODUCT_BYTES) // (row_bytes * _ROWS)) * _ROWS
        for first in range(0, n, size):
            some = x[first : first + size]
            rows = some.shape[0]
            products = multiply(some, matrix, operand)
            self.launch(
                device, "select.cu", self._options(x), "select", (blocks(rows, _WARPS), 1), _THREADS, 0,
                products, rows, parts, norms[first:], operand.terms, operand.reach, k, r,
                labels[:, first:], labels.stride(0), *lists, n, first,
            )  # fmt: skip

    def _few(self, x: torch.Tensor, matrix: torch.Tensor, operand: Any) -> torch.Tensor:
        """The products of each slice, float32 (slices, b, r k); the rows are read once for each tile of centroids."""
        (columns, width), tile = matrix.shape, _tile_columns(len(matrix))
        slices, tiles = blocks(width, SLICE), blocks(columns, tile)
        products = torch.empty(slices, x.shape[0], columns, dtype=torch.float32, device=x.device)
        self.launch(
            x.device, "product.cu", (*self._options(x), f"-DCOLUMNS={tile}"), "product",
            (blocks(x.shape[0], _ROWS), slices * tiles), 256 if tile < 64 else 512, 4 * (_ROWS + tile) * (PIECE + 8),
            *strided(x), operand.shift, operand.scale, matrix, width, columns, tiles, products,
        )  # fmt: skip
        return products

    def _many(self, x: torch.Tensor, matrix: torch.Tensor, operand: Any) -> torch.Tensor:
        """The products, float32 (b, r k): slices of features as float16, multiplied by torch and added."""
        products: torch.Tensor | None = None
        for start in range(0, x.shape[1], SLICE):
            some = x[:, start : start + SLICE]
            width = min(SLICE, matrix.shape[1] - start)
            seen = torch.empty(x.shape[0], width, dtype=torch.float16, device=x.device)
            grid = blocks(seen.numel(), 8 * _THREADS), 1
            self.launch(
                x.device, "select.cu", self._options(x), "convert", grid, _THREADS, 0,
                *strided(some), operand.shift[start:], operand.scale, width, seen,
            )  # fmt: skip
            product = multiplied(seen, matrix[:, start : start + width].t())
            products = product if products is None else products.add_(product)
        assert products is not None
        return products


def _tile_columns(columns: int) -> int:
    """Centroids of a tile of product.cu."""
    return next((size for size in (16, 32, 64) if columns <= size), 128)


def multiplied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of float16 matrices, summed and returned in float32."""
    matmul: Any = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        return torch.mm(a, b, out_dtype=torch.float32)
    finally:
        matmul.allow_fp16_reduced_precision_reduction = reduced
