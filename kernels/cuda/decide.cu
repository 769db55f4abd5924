// The reference distance decides what two passes left open: least distance, lowest index of a tie (exact.decide).
//
// The tile: a block takes one open row of a restart after another, from a list whose length is on the device. Its warps
// compute the float32 scores of all centroids once more, a centroid per warp, lanes across the features; a centroid
// whose lower end is not above the row's known upper end is a candidate, and so is one whose score is no number.
// Candidates of 1024 centroids at a time wait in shared memory; then all threads together compute each one's reference
// distance (tree.cuh), for any d and without room for d values. Centroids that equal an earlier one have a bound that
// keeps them out (exact.repeated_in): they can't win.
#include "best.cuh"
#include "rows.cuh"
#include "tree.cuh"

constexpr int THREADS = 256, WAITING = 1024, HELD = 1024, SLICE = 1024;

__device__ __forceinline__ float product(
    const Rows& x, const Frame& frame, int64 row, const float* column, int lane) {
  float total = 0.0f;
  for (int64 slice = 0; slice < x.d; slice += SLICE) {
    float part = 0.0f;
    const int64 end = slice + SLICE < x.d ? slice + SLICE : x.d;
    for (int64 f = slice + lane; f < end; f += 32) part = fmaf(frame.seen(*x.at(row, f), f), column[f], part);
    total += part;
  }
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) decide(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const float* matrix, const float* low, const float* slope, const Wide* centroids, int64 k,
    int64 r, int* labels, int64 label_stride, const int* open_count, const int* open_rows, const float* open_upper) {
  __shared__ double values[HELD];
  __shared__ int candidates[WAITING];
  __shared__ int waiting;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};

  for (int64 restart = 0; restart < r; ++restart) {
    const int open = open_count[restart];
    for (int64 place = blockIdx.x; place < open; place += gridDim.x) {
      const int64 row = open_rows[restart * n + place];
      const float upper = open_upper[restart * n + place], norm = norms[row];
      double least = 0.0;
      int label = -1;
      for (int64 from = 0; from < k; from += WAITING) {
        const int64 end = from + WAITING < k ? from + WAITING : k;
        if (threadIdx.x == 0) waiting = 0;
        __syncthreads();
        for (int64 j = from + warp; j < end; j += THREADS / 32) {
          const int64 at = restart * k + j;
          const float lower = lower_end(product(x, frame, row, matrix + at * d, lane), low[at], slope[at], norm);
          // Not "<=": what is no number must stay possible.
          if (lane == 0 && !(lower > upper)) candidates[atomicAdd(&waiting, 1)] = (int)j;
        }
        __syncthreads();
        const int count = waiting;
        for (int i = 0; i < count; ++i) {
          const int j = candidates[i];
          const Wide* centroid = centroids + (restart * k + j) * d;
          const double dist2 = tree_sum<THREADS>(d, values, HELD, threadIdx.x, [&](int64 feature) {
            const double apart = sum_of(to_double(*x.at(row, feature)), -(double)centroid[feature]);
            return product_of(apart, apart);
          });
          if (label < 0 || dist2 < least || (dist2 == least && j < label)) {
            least = dist2;
            label = j;
          }
        }
        __syncthreads();
      }
      if (threadIdx.x == 0 && label >= 0) labels[restart * label_stride + row] = label;
    }
  }
}
