// What follows a pass, with the bits of gpuclust.cluster.step: restarts end, wait, or their centroids move to the means.
//
// Tiles: `judge` has a block for each restart, which looks for an empty cluster. `move` has a block for each centroid: a
// thread divides the sums of its features, rounds, writes, and adds up the squares of the way by the tree of tree.cuh.
// `close` has a block for each restart, which adds up its centroids' ways in the same tree.
// -DROW=float or double, the type of the centroids.
#include "rows.cuh"
#include "tree.cuh"

constexpr int THREADS = 256, HELD = 1024;
constexpr int64 MOVES = 0, ENDED = 1, EMPTY = 2;  // as in step.py

// What a restart does, and in `report` (r, 2) whether it makes a step.
extern "C" __global__ void __launch_bounds__(THREADS) judge(
    const int64* changed, const double* masses, int64 k, int64* does, int64* passes, const unsigned char* closing,
    double* report) {
  __shared__ int without;
  const int64 restart = blockIdx.x;
  if (threadIdx.x == 0) without = 0;
  __syncthreads();
  for (int64 j = threadIdx.x; j < k; j += THREADS) {
    if (masses[restart * k + j] == 0.0) without = 1;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const bool moves = does[restart] == MOVES;
  const bool end = moves && (closing[restart] || changed[restart] == 0), empty = moves && !end && without;
  if (moves) ++passes[restart];
  if (end || empty) does[restart] = end ? ENDED : EMPTY;
  report[2 * restart] = moves && !end && !empty ? 1.0 : 0.0;
  report[2 * restart + 1] = 0.0;
}

extern "C" __global__ void __launch_bounds__(THREADS) move(
    Wide* centroids, int64 k, int64 d, const double* sums, int64 levels, int64 level_stride, int64 restart_stride,
    const double* masses, const double* report, double* shifts) {
  __shared__ double values[HELD];
  const int64 j = blockIdx.x, restart = blockIdx.y, at = restart * k + j;
  if (report[2 * restart] == 0.0) return;
  const double mass = masses[at];
  double shift = 0.0;
  if (mass > 0.0) {
    const double* sum = sums + restart * restart_stride + j * d;
    Wide* centroid = centroids + at * d;
    shift = tree_sum<THREADS>(d, values, HELD, threadIdx.x, [&](int64 f) {
      double whole = sum[f];
      for (int64 level = 1; level < levels; ++level) whole = sum_of(whole, sum[level * level_stride + f]);
      const Wide after = (Wide)quotient_of(whole, mass);
      const double way = sum_of((double)after, -(double)centroid[f]);
      centroid[f] = after;
      return product_of(way, way);
    });
  }
  if (threadIdx.x == 0) shifts[at] = shift;
}

extern "C" __global__ void __launch_bounds__(THREADS) close(
    const double* shifts, int64 k, int64 max_iter, double tol, const int64* passes, unsigned char* closing,
    double* report) {
  __shared__ double values[HELD];
  const int64 restart = blockIdx.x;
  if (report[2 * restart] == 0.0) return;
  const double shift = tree_sum<THREADS>(k, values, HELD, threadIdx.x, [&](int64 j) { return shifts[restart * k + j]; });
  if (threadIdx.x != 0) return;
  report[2 * restart + 1] = shift;
  closing[restart] = shift <= tol || passes[restart] >= max_iter;
}
