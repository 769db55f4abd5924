// Sums and counts of the clusters, free of any order: each term is rounded to a grid on which every partial sum is exact
// (gpuclust.cluster.sums), so that atomic additions in float64 give the same bits in whatever order they come.
//
// Tiles: a block of `accumulate` takes ROWS rows and 256 features of all restarts (of narrow rows several at a time) and
// looks at their labels; only those whose label changed are read, AHEAD of them at once: their terms are added to the
// cluster that gains the row and taken from the one that loses it. No sort, and later iterations cost little more than
// reading the labels. `first` is for the first pass and few clusters: a thread owns one feature, adds many rows up in
// shared memory that it shares with nobody, (levels, k) values per thread, and adds these to the sums at the end.
// `count`: a lane per row; lanes of a warp with one cluster add once, and a block once how many of its rows changed.
#include "rows.cuh"

constexpr int ROWS = 64, THREADS = 256, OWNERS = 128, AHEAD = 4;

// The term of each level of the grid: multiples of its step; what is left goes to the next.
template <class Add>
__device__ __forceinline__ void split(double value, const double* magic, int64 levels, int64 d, int64 f, const Add& add) {
  for (int64 level = 0; level < levels; ++level) {
    const double constant = magic[level * d + f];
    const double term = sum_of(sum_of(value, constant), -constant);
    add(level, term);
    value = sum_of(value, -term);
  }
}

__device__ __forceinline__ double weighted(const Rows& x, const double* weights, int64 row, int64 f) {
  const double value = to_double(*x.at(row, f));
  return weights ? product_of(value, weights[row]) : value;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) accumulate(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const double* weights,
    const double* magic, int64 levels, const int* plus, int64 plus_stride, const int* minus, int64 minus_stride,
    int64 k, int64 r, double* sums, int64 level_stride, int64 restart_stride) {
  __shared__ int moved[ROWS], gains[ROWS], loses[ROWS];
  __shared__ int count;
  const Rows x = {first, n, d, row_stride, column_stride};
  const int64 from = (int64)blockIdx.x * ROWS;
  const int columns = d < THREADS ? (int)d : THREADS, together = THREADS / columns, own = threadIdx.x / columns;
  for (int64 restart = 0; restart < r; ++restart) {
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (threadIdx.x < ROWS && from + threadIdx.x < n) {
      const int64 row = from + threadIdx.x;
      const int gain = plus[restart * plus_stride + row];
      const int lose = minus ? minus[restart * minus_stride + row] : -1;
      if (gain != lose) {
        const int place = atomicAdd(&count, 1);
        moved[place] = threadIdx.x;
        gains[place] = gain;
        loses[place] = lose;
      }
    }
    __syncthreads();
    const int rows = own < together ? count : 0;
    for (int64 f = (int64)blockIdx.y * columns + threadIdx.x % columns; f < d; f += (int64)gridDim.y * columns) {
      double* target = sums + restart * restart_stride + f;
      for (int i = own; i < rows; i += AHEAD * together) {
        double values[AHEAD];  // read before any is added: an addition lets no read go before it
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          const int at = i + a * together;
          values[a] = at < rows ? weighted(x, weights, from + moved[at], f) : 0.0;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          const int at = i + a * together;
          if (at >= rows) break;
          const int gain = gains[at], lose = loses[at];
          split(values[a], magic, levels, d, f, [&](int64 level, double term) {
            atomicAdd(target + level * level_stride + gain * d, term);
            if (lose >= 0) atomicAdd(target + level * level_stride + lose * d, -term);
          });
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(OWNERS) first(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const double* weights,
    const double* magic, int64 levels, const int* plus, int64 k, int64 rows_per_block, double* sums,
    int64 level_stride) {
  DYNAMIC_SHARED(double, own);  // (levels, k, OWNERS)
  const Rows x = {first, n, d, row_stride, column_stride};
  const int64 from = blockIdx.x * rows_per_block, end = from + rows_per_block < n ? from + rows_per_block : n;
  double* mine = own + threadIdx.x;
  for (int64 f = (int64)blockIdx.y * OWNERS + threadIdx.x; f < d; f += (int64)gridDim.y * OWNERS) {
    for (int64 i = 0; i < levels * k; ++i) mine[i * OWNERS] = 0.0;
#pragma unroll 4
    for (int64 row = from; row < end; ++row) {
      const int cluster = plus[row];
      split(weighted(x, weights, row, f), magic, levels, d, f, [&](int64 level, double term) {
        double* sum = mine + (level * k + cluster) * OWNERS;
        *sum = sum_of(*sum, term);
      });
    }
    for (int64 level = 0; level < levels; ++level) {
      for (int64 cluster = 0; cluster < k; ++cluster) {
        const double sum = mine[(level * k + cluster) * OWNERS];
        if (sum != 0.0) atomicAdd(sums + level * level_stride + cluster * d + f, sum);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) count(
    int64 n, const int* plus, int64 plus_stride, const int* minus, int64 minus_stride, int64 k, double* counts,
    unsigned long long* changed) {
  __shared__ int moved;
  if (threadIdx.x == 0) moved = 0;
  __syncthreads();
  const int64 row = (int64)blockIdx.x * THREADS + threadIdx.x, restart = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int gain = row < n ? plus[restart * plus_stride + row] : -1;
  const int lose = row < n && minus ? minus[restart * minus_stride + row] : -1;
  for (int sign = 1; sign >= -1; sign -= 2) {
    const int cluster = gain == lose ? -1 : sign > 0 ? gain : lose;
    int lanes;
    const int leader = same_in_warp(0xffffffffu, cluster, &lanes);
    if (cluster >= 0 && lane == leader) atomicAdd(counts + restart * k + cluster, (double)(sign * lanes));
  }
  const unsigned lanes = __ballot_sync(0xffffffffu, gain != lose);
  if (lane == 0 && lanes) atomicAdd(&moved, __popc(lanes));
  __syncthreads();
  if (threadIdx.x == 0 && changed && moved) atomicAdd(changed + restart, (unsigned long long)moved);
}
