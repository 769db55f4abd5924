// Reference distance of each row to its centroid, for what is asked of all rows once: moments, inertia, farthest rows.
//
// The tile: -DGROUP=32, a warp for each row of up to 4096 features, or -DGROUP=256, a block for each wider one.
// Threads of a group read neighbouring features; the sum is the tree of tree.cuh, in HELD values of shared memory for
// each group. -DCENTRE=float or double is the type of the centroids.
#include "rows.cuh"
#include "tree.cuh"

constexpr int THREADS = 256, GROUPS = THREADS / GROUP;
// A warp sums up to 4096 features.
constexpr int HELD = GROUP == 32 ? 256 : 2048, DEEP = GROUP == 32 ? 4 : LEVELS - 1;

extern "C" __global__ void __launch_bounds__(THREADS) dist2(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const CENTRE* centroids, const int* which,
    double* out) {
  __shared__ double values[GROUPS][HELD];
  const Rows x = {first, n, d, row_stride, column_stride};
  const int group = threadIdx.x / GROUP, thread = threadIdx.x % GROUP;
  for (int64 row = (int64)blockIdx.x * GROUPS + group; row < n; row += (int64)gridDim.x * GROUPS) {
    const CENTRE* centroid = centroids + (which ? which[row] : 0) * d;
    const double dist2 = tree_sum<GROUP, DEEP>(d, values[group], HELD, thread, [&](int64 feature) {
      const double apart = sum_of(to_double(*x.at(row, feature)), -(double)centroid[feature]);
      return product_of(apart, apart);
    });
    if (thread == 0) out[row] = dist2;
  }
}
