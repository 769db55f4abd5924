// Nearest centroid of each row, certified or left open: product and argmin in one kernel; no score is ever stored.
//
// A block takes BLOCK_ROWS rows. It centres, scales and rounds them to float16 on their way into shared memory, once, and keeps them
// there (d up to about 1000). Past them go the centroids of all restarts, COLUMNS at a time and DEPTH features of each in
// a ring of STAGES pieces filled by cp.async, so that BLOCK_ROWS rows share each reading of the centroids. A warp multiplies 32
// rows with 8 TILES centroids (mma m16n8k16: float16 products, float32 sums); where the features end it turns its
// products into lower ends of scores and keeps, per row, the two least and the index of the least (best.cuh: 7 operations
// a score). At the end of a restart, lanes and warps put theirs together; a row whose label is certain gets it, any other
// is added to the list of open rows, whose length stays on the device. d is at most SLICE = 1024 (exact.py), so that no
// partial sums are needed. Rows of shared memory are 16 bytes longer than a multiple of 64: ldmatrix then meets no bank
// twice. Two blocks fit a multiprocessor up to d = 256, so that one multiplies while the other loads or compares.
//
// -DBLOCK_ROWS=64 or 128, -DWARPS=1 or 2 (side by side), -DTILES=4 or 8.
#include "best.cuh"
#include "rows.cuh"

constexpr int COLUMNS = WARPS * TILES * 8;
constexpr int THREADS = BLOCK_ROWS * WARPS;
constexpr int DEPTH = 32, STAGES = 4, PITCH = DEPTH + 8;
constexpr int AT_ONCE = THREADS / (DEPTH / 8);  // centroids of which the threads copy 16 bytes each
static_assert(COLUMNS % AT_ONCE == 0, "each thread copies the same number of pieces");

// The pieces of the centroids on their way through the ring: all pieces of the first COLUMNS centroids, then of the next.
struct Stream {
  const Float16* source;  // in (tiles * COLUMNS, width), zero beyond d and k
  Float16* ring;
  int64 width;
  int left, piece, slot;  // pieces still to fetch, and where the next comes from and goes to

  __device__ __forceinline__ void fetch() {
    if (left > 0) {
      const int column = threadIdx.x / (DEPTH / 8), part = threadIdx.x % (DEPTH / 8) * 8;
      Float16* to = ring + (slot * COLUMNS + column) * PITCH + part;
      const Float16* from = source + column * width + part;
#pragma unroll
      for (int i = 0; i < COLUMNS; i += AT_ONCE) copy_16_bytes(to + i * PITCH, from + i * width);
      --left;
      slot = (slot + 1) % STAGES;
      source += DEPTH;
      if (++piece == (int)width / DEPTH) {
        piece = 0;
        source += (COLUMNS - 1) * width;
      }
    }
    copies_end();  // of an empty group, too: `copies_wait` counts groups
  }
};

// Products of 32 rows and 8 TILES centroids over DEPTH features.
__device__ __forceinline__ void multiply(
    float (&product)[2][TILES][4], const Float16* rows, int pitch, const Float16* columns, int lane) {
#pragma unroll
  for (int depth = 0; depth < DEPTH; depth += 16) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_tiles(a[m], rows + (16 * m + lane % 16) * pitch + depth + lane / 16 * 8);
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      unsigned b[4];
      load_tiles(b, columns + (8 * t + lane / 16 * 8 + lane % 8) * PITCH + depth + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma(product[m][t], a[m], b[0], b[1]);
        mma(product[m][t + 1], a[m], b[2], b[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) assign(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const Float16* matrix, int64 width, const float4* terms, const float* reach, int64 k, int64 r,
    int* labels, int64 label_stride, int* open_count, int* open_rows) {
  DYNAMIC_SHARED(uint4, shared);
  __shared__ Best found[WARPS][BLOCK_ROWS];
  __shared__ float norm[BLOCK_ROWS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / WARPS * 32, warp_column = warp % WARPS * TILES * 8;
  const int64 block_row = (int64)blockIdx.x * BLOCK_ROWS;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};

  const int pitch = (int)width + 8, pieces = (int)width / DEPTH;
  Float16* tile = reinterpret_cast<Float16*>(shared);
  const int column_tiles = (int)((k + COLUMNS - 1) / COLUMNS);
  Float16* ring = tile + BLOCK_ROWS * pitch;
  Stream stream = {matrix, ring, width, (int)r * column_tiles * pieces, 0, 0};
  for (int stage = 0; stage < STAGES - 1; ++stage) stream.fetch();

  const bool aligned = x.aligned();
  const int eighths = (int)width / 8;
#pragma unroll 2
  for (int i = thread; i < BLOCK_ROWS * eighths; i += THREADS) {
    const int row = i / eighths, column = i % eighths * 8;
    *reinterpret_cast<uint4*>(tile + row * pitch + column) = seen_8(x, frame, block_row + row, column, aligned);
  }

  if (thread < BLOCK_ROWS) norm[thread] = block_row + thread < n ? norms[block_row + thread] : 0.0f;

  Best best[4];
  for (int i = 0; i < 4; ++i) best[i].clear();
  float product[2][TILES][4] = {};

  int slot = 0;
  for (int restart = 0; restart < (int)r; ++restart) {
    for (int column_tile = 0; column_tile < column_tiles; ++column_tile) {
      for (int piece = 0; piece < pieces; ++piece) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        stream.fetch();
        const Float16* columns = ring + (slot * COLUMNS + warp_column) * PITCH;
        slot = (slot + 1) % STAGES;
        multiply(product, tile + warp_row * pitch + piece * DEPTH, pitch, columns, lane);
      }
      const int column = column_tile * COLUMNS + warp_column + lane % 4 * 2;
      const float4* term = terms + ((int64)restart * column_tiles * COLUMNS + column) / 2;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const float4 pair = term[4 * t];  // low and slope of two centroids
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float far = norm[warp_row + lane / 4 + 8 * i];
          float* two = product[i / 2][t] + i % 2 * 2;
          best[i].take(lower_end(two[0], pair.x, pair.y, far), column + 8 * t);
          best[i].take(lower_end(two[1], pair.z, pair.w, far), column + 8 * t + 1);
          two[0] = two[1] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      best[i].merge_lanes(1, 4);
      if (lane % 4 == 0) found[warp % WARPS][warp_row + lane / 4 + 8 * i] = best[i];
      best[i].clear();
    }
    __syncthreads();
    const int64 row = block_row + thread;
    if (thread < BLOCK_ROWS && row < n) {
      Best all = found[0][thread];
      if (WARPS == 2) all.merge(found[WARPS - 1][thread]);
      labels[restart * label_stride + row] = all.index;
      const int64 place = (int64)restart * column_tiles * COLUMNS + all.index;
      const float4 pair = terms[place / 2];
      const float upper = all.upper(reach[place], place % 2 ? pair.w : pair.y, norm[thread]);
      if (open_count && !all.certain(upper)) Open{open_count, open_rows, nullptr, n}.add(restart, (int)row, upper);
    }
  }
}
