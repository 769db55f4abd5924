// Centroids as the passes read them: two operands of -2 (c - m) s, with the bound of their scores (gpuclust.cluster.exact).
//
// The tile: `prepare` has a block for each centroid, and for each that only fills a tile. Its threads go across the
// features: `padded` is float16, `matrix` float32 of another scale, and `parts` that in two float16, DEPTH high and DEPTH
// low ones of as many features a piece; zero beyond d, and in `padded` beyond k. Squares are summed in float64, in any
// order: the bound has d 2**-52 of them for that. `repeated` has a warp for each centroid, which looks for an earlier
// equal one of its restart where the bias is equal: that one wins every tie, and the largest number as both ends keeps
// this one out.
// -DROW=float or double, the type of the centroids. -DTHREADS=128, or 1024 for wide ones. -DSWIZZLED_COLUMNS=n: `padded`
// in tiles of n centroids, see `place`.
#include "rows.cuh"

constexpr int WARPS = THREADS / 32, DEPTH = 32, AHEAD = 4;
constexpr unsigned ALL = 0xffffffffu;
constexpr double INFLATE = 1 + 1.0 / 1024;  // as in exact.py
constexpr float LARGEST = 3.402823466e38f;

// The lower end of what is no centroid: a number where assign_hopper.cu puts bits into it, which would make infinity none.
__device__ __forceinline__ float never() {
#ifdef SWIZZLED_COLUMNS
  return LARGEST;
#else
  return __int_as_float(0x7f800000);  // infinity
#endif
}

// Where the value of a centroid and a feature is in `padded`, of `width` features.
__device__ __forceinline__ int64 place(int64 centroid, int64 feature, int64 width) {
#ifdef SWIZZLED_COLUMNS
  // Tile after tile, in each piece after piece of 64 features, which are 128 bytes of each centroid; of these the eighths
  // change places, so that 8 centroids' same eighth are in as many banks.
  const int64 tile = centroid / SWIZZLED_COLUMNS, column = centroid % SWIZZLED_COLUMNS, inside = feature % 64;
  const int64 line = (tile * (width / 64) + feature / 64) * SWIZZLED_COLUMNS + column;
  return line * 64 + (inside / 8 ^ column % 8) * 8 + inside % 8;
#else
  return centroid * width + feature;
#endif
}

// Numbers of gpuclust.cluster.exact.Bound, where the bias is the square.
struct Bound {
  double of_square, of_length, fixed, slope, least_slope, longest;

  __device__ __forceinline__ void write(bool there, double square, float* terms, float* reach) const {
    if (there) {
      const double length = sqrt(square), margin = of_square * square + of_length * length + fixed;
      const float high = (float)(square + margin * INFLATE), low = (float)(square - margin * INFLATE);
      terms[0] = low;
      // Not ">=": what is no number must not pass.
      terms[1] = length < longest ? (float)((slope * length + least_slope) * INFLATE) : __int_as_float(0x7fc00000);
      *reach = high - low;
    } else {
      terms[0] = never();
      terms[1] = *reach = 0.0f;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const Wide* centroids, int64 k, int64 d, const double* centre, double scale, double of_square, double of_length,
    double fixed, double slope, double least_slope, double longest, Float16* padded, int64 columns, int64 width,
    float* terms, float* reach, double fine_scale, double fine_of_square, double fine_of_length, double fine_fixed,
    double fine_slope, double fine_least_slope, double fine_longest, Float16* parts, int64 fine_columns, int64 pieces,
    float* matrix, float* fine_terms, float* fine_reach, double* bias) {
  __shared__ double sums[WARPS][2];
  const int64 j = blockIdx.x, restart = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool there = j < k;
  const int64 at = restart * k + j, coarse_at = restart * columns + j, fine_at = restart * fine_columns + j;
  const int64 coarse_end = j < columns ? width : 0, fine_end = there ? pieces * DEPTH : 0;
  double square = 0.0, fine_square = 0.0;
  for (int64 f = threadIdx.x; f < coarse_end || f < fine_end; f += THREADS) {
    const double apart = there && f < d ? (double)centroids[at * d + f] - centre[f] : 0.0;
    const double moved = apart * scale, fine = apart * fine_scale;
    square += moved * moved;
    fine_square += fine * fine;
    if (f < coarse_end) padded[place(coarse_at, f, width)] = to_float16((float)(-2.0 * moved));
    if (f < fine_end) {
      const float value = (float)(-2.0 * fine);
      const Float16 high = to_float16(value);
      Float16* piece = parts + (at * pieces + f / DEPTH) * (2 * DEPTH) + f % DEPTH;
      piece[0] = high;
      piece[DEPTH] = to_float16(value - to_float(high));
      if (f < d) matrix[at * d + f] = value;
    }
  }
  for (int other = 16; other > 0; other /= 2) {
    square += __shfl_xor_sync(ALL, square, other);
    fine_square += __shfl_xor_sync(ALL, fine_square, other);
  }
  if (lane == 0) {
    sums[warp][0] = square;
    sums[warp][1] = fine_square;
  }
  __syncthreads();
  if (lane != 0 || warp > 1) return;
  double total = 0.0;
  for (int i = 0; i < WARPS; ++i) total += sums[i][warp];
  if (warp == 0) {
    if (there) bias[at] = total;
    const Bound bound = {of_square, of_length, fixed, slope, least_slope, longest};
    if (j < columns) bound.write(there, total, terms + 2 * coarse_at, reach + coarse_at);
  } else {
    const Bound bound = {fine_of_square, fine_of_length, fine_fixed, fine_slope, fine_least_slope, fine_longest};
    if (j < fine_columns) bound.write(there, total, fine_terms + 2 * fine_at, fine_reach + fine_at);
  }
}

// Whether two centroids are equal; -0 equals 0. By a warp.
__device__ __forceinline__ bool equal(const Wide* one, const Wide* other, int64 d, int lane) {
  for (int64 from = 0; from < d; from += 32) {
    const int64 f = from + lane;
    if (__ballot_sync(ALL, f < d && !(one[f] == other[f]))) return false;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) repeated(
    const Wide* centroids, int64 k, int64 d, const double* bias, float* terms, float* reach, int64 columns,
    float* fine_terms, float* fine_reach, int64 fine_columns) {
  const int lane = threadIdx.x % 32;
  const int64 j = (int64)blockIdx.x * WARPS + threadIdx.x / 32, restart = blockIdx.y;
  if (j >= k) return;
  centroids += restart * k * d;
  bias += restart * k;
  const double own = bias[j];
  for (int64 from = 0; from < j; from += 32 * AHEAD) {
    bool some = false;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int64 i = from + 32 * a + lane;
      some |= i < j && bias[i] == own;
    }
    if (!__ballot_sync(ALL, some)) continue;
    for (int64 first = from; first < from + 32 * AHEAD; first += 32) {
      unsigned found = __ballot_sync(ALL, first + lane < j && bias[first + lane] == own);
      for (; found; found &= found - 1) {
        if (!equal(centroids + (first + __ffs(found) - 1) * d, centroids + j * d, d, lane)) continue;
        if (lane == 0) {
          terms[2 * (restart * columns + j)] = fine_terms[2 * (restart * fine_columns + j)] = LARGEST;
          reach[restart * columns + j] = fine_reach[restart * fine_columns + j] = 0.0f;
        }
        return;
      }
    }
  }
}
