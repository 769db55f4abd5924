// The reference distance decides what two passes left open: least distance, lowest index of a tie (exact.decide).
//
// The tile: a block takes one open row of a restart after another, from a list whose length is on the device. The row, as
// a pass sees it, lies in shared memory where it fits. The block's warps compute the float32 scores of all centroids once
// more, TOGETHER centroids per warp at a time, lanes across the features: their loads are under way at once, and nine
// exchanges add up the lanes of all of them. A centroid whose lower end is not above the row's known upper end is a
// candidate, and so is one whose score is no number. Candidates of 1024 centroids at a time wait in shared memory; then
// all threads together compute each one's reference distance (tree.cuh), for any d and without room for d values.
// Centroids that equal an earlier one have a bound that keeps them out (prepare.cu): they can't win.
// -DCENTRE=float or double, the type of the centroids: a fitted model is asked about rows of another type, too.
#include "best.cuh"
#include "rows.cuh"
#include "tree.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, WAITING = 1024, HELD = 1024, SLICE = 1024;
// Centroids of a warp at a time, and features that are read before any is used.
constexpr int TOGETHER = 8, AHEAD = LEVELS > 2 ? 1 : 2;
constexpr unsigned ALL = 0xffffffffu;

// Products of a row, seen(feature), with TOGETHER centroids of width d, or the first `there` of them: each lane has that
// of the centroid `centroid_of(lane)`. Lanes sum a slice each, then all slices, then the lanes are added.
template <class Seen>
__device__ __forceinline__ float products(int64 d, const float* columns, int there, int lane, const Seen& seen) {
  float total[TOGETHER] = {};
  for (int64 slice = 0; slice < d; slice += SLICE) {
    float part[TOGETHER] = {};
    const int64 end = slice + SLICE < d ? slice + SLICE : d;
#pragma unroll AHEAD
    for (int64 f = slice + lane; f < end; f += 32) {
      const float value = seen(f);
      const float* column = columns + f;
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) {
        part[i] = fmaf(value, *column, part[i]);
        if (i + 1 < there) column += d;  // beyond the last that one again
      }
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) total[i] += part[i];
  }
  // Of two lanes that differ in a bit, each keeps half of the sums that it has, with the other's of the same centroids.
#pragma unroll
  for (int half = TOGETHER / 2, other = 16; half > 0; half /= 2, other /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = lane & other ? total[i] : total[half + i], kept = lane & other ? total[half + i] : total[i];
      total[i] = kept + __shfl_xor_sync(ALL, given, other);
    }
  }
  for (int other = 16 / TOGETHER; other > 0; other /= 2) total[0] += __shfl_xor_sync(ALL, total[0], other);
  return total[0];
}

__device__ __forceinline__ int centroid_of(int lane) { return lane / (32 / TOGETHER); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) decide(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const float* matrix, const float2* terms, int64 columns, const CENTRE* centroids, int64 k,
    int64 r, int* labels, int64 label_stride, const int* open_count, const int* open_rows, const float* open_upper,
    int64 resident, int64* decided) {
  DYNAMIC_SHARED(float, held);  // (d,), where the row is resident
  __shared__ double values[HELD];
  __shared__ int candidates[WAITING];
  __shared__ int waiting;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    int64 all = 0;
    for (int64 restart = 0; restart < r; ++restart) all += open_count[restart];
    *decided = all;
  }

  for (int64 restart = 0; restart < r; ++restart) {
    const int open = open_count[restart];
    for (int64 place = blockIdx.x; place < open; place += gridDim.x) {
      const int64 row = open_rows[restart * n + place];
      const float upper = open_upper[restart * n + place], norm = norms[row];
      const auto seen = [&](int64 f) { return frame.seen(*x.at(row, f), f); };
      if (resident) {
        for (int64 f = threadIdx.x; f < d; f += THREADS) held[f] = seen(f);
      }
      double least = 0.0;
      int label = -1;
      for (int64 from = 0; from < k; from += WAITING) {
        const int64 end = from + WAITING < k ? from + WAITING : k;
        if (threadIdx.x == 0) waiting = 0;
        __syncthreads();
        for (int64 group = from + warp * TOGETHER; group < end; group += WARPS * TOGETHER) {
          const int there = end - group < TOGETHER ? (int)(end - group) : TOGETHER;
          const float* column = matrix + (restart * k + group) * d;
          const float product = resident ? products(d, column, there, lane, [&](int64 f) { return held[f]; })
                                         : products(d, column, there, lane, seen);
          const int own = centroid_of(lane);
          if (lane % (32 / TOGETHER) == 0 && own < there) {
            const float2 term = terms[restart * columns + group + own];  // low and slope
            // Not "<=": what is no number must stay possible.
            if (!(lower_end(product, term.x, term.y, norm) > upper)) candidates[atomicAdd(&waiting, 1)] = (int)group + own;
          }
        }
        __syncthreads();
        const int count = waiting;
        for (int i = 0; i < count; ++i) {
          const int j = candidates[i];
          const CENTRE* centroid = centroids + (restart * k + j) * d;
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
