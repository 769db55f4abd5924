// For wide rows: what is before and after their products, of torch, of product.cu or of assign.cu's streamed tiles.
//
// Tiles: `convert` centres, scales and rounds features to float16, a thread 8 of a row at a time. `select`, a warp per
// row, reads products of a chunk, (slices, n, r k), while they are in the cache: its lanes go across the centroids of a
// restart, add the slices, and keep the two least lower ends, then label the row or add it to the list of open rows, as
// assign.cu does. `merge`, a thread per row, does that with the least two that assign.cu kept of each span of the centroids.
#include "best.cuh"
#include "rows.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) convert(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    int64 width, uint4* out) {
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  const bool aligned = x.aligned();
  const int64 eighths = width / 8, step = (int64)gridDim.x * THREADS;
  for (int64 i = (int64)blockIdx.x * THREADS + threadIdx.x; i < n * eighths; i += step) {
    out[i] = seen_8(x, frame, i / eighths, i % eighths * 8, aligned);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) select(
    const float* products, int64 n, int64 slices, const float* norms, const float2* terms, const float* reach, int64 k, int64 r,
    int* labels, int64 label_stride, int* open_count, int* open_rows, int64 open_stride, int64 row_of_first) {
  const int lane = threadIdx.x % 32;
  const int64 row = (int64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= n) return;
  const float norm = norms[row];
  for (int64 restart = 0; restart < r; ++restart) {
    const float* product = products + (row * r + restart) * k;
    const int64 at = restart * k;
    Best best;
    best.clear();
    for (int64 j = lane; j < k; j += 32) {
      const float2 term = terms[at + j];  // low and slope
      float sum = product[j];
#pragma unroll 8
      for (int64 slice = 1; slice < slices; ++slice) sum += product[slice * n * r * k + j];
      best.take(lower_end(sum, term.x, term.y, norm), (int)j);
    }
    best.merge_lanes(1, 32);
    if (lane == 0) {
      const int64 place = at + best.index;
      settle(best, reach[place], terms[place].y, norm, labels + restart * label_stride + row,
             Open{open_count, open_rows, nullptr, open_stride}, restart, row_of_first + row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) merge(
    const Best* parts, int64 n, int64 spans, const float* norms, const float* terms, const float* reach, int64 k,
    int64 r, int* labels, int64 label_stride, int* open_count, int* open_rows, int64 open_stride, int64 row_of_first) {
  const int64 row = (int64)blockIdx.x * THREADS + threadIdx.x;
  if (row >= n) return;
  for (int64 restart = 0; restart < r; ++restart) {
    Best best = parts[restart * spans * n + row];
    for (int64 span = 1; span < spans; ++span) best.merge(parts[(restart * spans + span) * n + row]);
    const int64 place = restart * k + best.index;  // k with the padding
    settle(best, reach[place], terms[2 * place + 1], norms[row], labels + restart * label_stride + row,
           Open{open_count, open_rows, nullptr, open_stride}, restart, row_of_first + row);
  }
}
