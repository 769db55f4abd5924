// A second look, in float32, at the rows that the first pass left open: most of them are certain here.
//
// The lists of open rows and their lengths are on the device: a grid of fixed size walks through them, restart after
// restart. A block takes 32 open rows of a restart and passes the centroids by them, 64 at a time and 32 features at a
// time, both in shared memory; a thread has the products of 4 rows (one warp's) with 2 centroids. Products are summed over
// SLICE features before these partial sums are added, as the bound wants it. At the end the lanes of a warp hold all
// centroids of its 4 rows and put their two least together. A row that is certain gets its label; any other goes to the
// next list, with an upper end of its least score, which no candidate can lie above.
#include "best.cuh"
#include "rows.cuh"

constexpr int OPEN_ROWS = 32, COLUMNS = 64, DEPTH = 32, THREADS = 256, SLICE = 1024;

extern "C" __global__ void __launch_bounds__(THREADS, 3) rescore(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const float* matrix, const float* low, const float* slope, const float* reach, int64 k,
    int64 r, int* labels, int64 label_stride, const int* open_count, const int* open_rows, int* left_count,
    int* left_rows, float* left_upper) {
  __shared__ float some_rows[OPEN_ROWS][DEPTH + 1], some_columns[COLUMNS][DEPTH + 1];
  __shared__ int64 chosen[OPEN_ROWS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  const Open left = {left_count, left_rows, left_upper, n};

  for (int64 restart = 0; restart < r; ++restart) {
    const int open = open_count[restart];
    for (int64 from = (int64)blockIdx.x * OPEN_ROWS; from < open; from += (int64)gridDim.x * OPEN_ROWS) {
      __syncthreads();
      if (threadIdx.x < OPEN_ROWS) {
        const int64 place = from + threadIdx.x;
        chosen[threadIdx.x] = place < open ? open_rows[restart * n + place] : -1;
      }
      __syncthreads();
      Best best[4];
      float norm[4];
      for (int i = 0; i < 4; ++i) {
        best[i].clear();
        const int64 row = chosen[4 * warp + i];
        norm[i] = row < 0 ? 0.0f : norms[row];
      }
      for (int64 column = 0; column < k; column += COLUMNS) {
        float total[4][2] = {}, part[4][2] = {};
        for (int64 feature = 0; feature < d; feature += DEPTH) {
          for (int i = warp; i < OPEN_ROWS; i += THREADS / 32) {
            const bool there = chosen[i] >= 0 && feature + lane < d;
            some_rows[i][lane] = there ? frame.seen(*x.at(chosen[i], feature + lane), feature + lane) : 0.0f;
          }
          for (int i = warp; i < COLUMNS; i += THREADS / 32) {
            const bool there = column + i < k && feature + lane < d;
            some_columns[i][lane] = there ? matrix[(restart * k + column + i) * d + feature + lane] : 0.0f;
          }
          __syncthreads();
#pragma unroll 8
          for (int f = 0; f < DEPTH; ++f) {
            const float one = some_columns[lane][f], two = some_columns[lane + 32][f];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float value = some_rows[4 * warp + i][f];
              part[i][0] = fmaf(value, one, part[i][0]);
              part[i][1] = fmaf(value, two, part[i][1]);
            }
          }
          __syncthreads();
          if ((feature + DEPTH) % SLICE == 0 || feature + DEPTH >= d) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              total[i / 2][i % 2] += part[i / 2][i % 2];
              part[i / 2][i % 2] = 0.0f;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int64 centroid = column + lane + 32 * j;
          if (centroid < k) {
            const float base = low[restart * k + centroid], steep = slope[restart * k + centroid];
#pragma unroll
            for (int i = 0; i < 4; ++i) best[i].take(lower_end(total[i][j], base, steep, norm[i]), (int)centroid);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        best[i].merge_lanes(1, 32);
        const int64 row = chosen[4 * warp + i];
        if (lane == 0 && row >= 0) {
          const int64 place = restart * k + best[i].index;
          const float upper = best[i].upper(reach[place], slope[place], norm[i]);
          labels[restart * label_stride + row] = best[i].index;
          if (!best[i].certain(upper)) left.add(restart, (int)row, upper);
        }
      }
    }
  }
}
