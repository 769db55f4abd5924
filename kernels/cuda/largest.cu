// The largest absolute value of each column, as its bits: those of NaN are above infinity's, infinity's above any number's.
//
// The tile: a block takes `rows_per_block` rows and up to THREADS columns; where there are fewer columns its threads take
// several rows at a time. A thread keeps the largest of its column; an atomic maximum of whole numbers joins the blocks.
#include "rows.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ unsigned size_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }
__device__ __forceinline__ unsigned long long size_bits(double value) {
  return (unsigned long long)__double_as_longlong(value) & 0x7fffffffffffffffull;
}
typedef decltype(size_bits(Wide())) Bits;

extern "C" __global__ void __launch_bounds__(THREADS) largest(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, int64 rows_per_block, Bits* out) {
  const Rows x = {first, n, d, row_stride, column_stride};
  const int columns = d < THREADS ? (int)d : THREADS, together = THREADS / columns, own = threadIdx.x / columns;
  const int64 from = (int64)blockIdx.x * rows_per_block, end = from + rows_per_block < n ? from + rows_per_block : n;
  if (own >= together) return;
  for (int64 f = (int64)blockIdx.y * columns + threadIdx.x % columns; f < d; f += (int64)gridDim.y * columns) {
    Bits most = 0;
#pragma unroll 4
    for (int64 row = from + own; row < end; row += together) {
      const Bits bits = size_bits(Pass<ROW>::of(*x.at(row, f)));
      most = bits > most ? bits : most;
    }
    atomicMax(out + f, most);
  }
}
