// Products of wide rows with few centroids: what bounds the time is reading the rows, which happens once.
//
// The tile: a block takes ROWS rows, one slice of SLICE features (blockIdx.y) and up to COLUMNS centroids, of all restarts,
// DEPTH features at a time: rows come through registers, where they wait as they are stored while the tensor cores have
// the features before, and are rounded to float16 on their way into shared memory; centroids come by asynchronous copies.
// Each slice's products are stored apart, (slices, n, columns); `select` of select.cu adds them while they are in the
// cache. A warp has 16 or 32 rows and up to 32 centroids.
// -DCOLUMNS=16, 32, 64 or 128.
#include "rows.cuh"

constexpr int ROWS = 128, DEPTH = 64, SLICE = 1024, PITCH = DEPTH + 8;
// Warps side by side, and tiles of 16 rows and of 8 centroids of each.
constexpr int SIDE = COLUMNS == 128 ? 4 : COLUMNS == 64 ? 2 : 1, ROW_TILES = SIDE == 4 ? 2 : 1;
constexpr int TILES = COLUMNS / SIDE / 8, THREADS = ROWS / 16 / ROW_TILES * SIDE * 32;
// Eighths of a line of DEPTH features, lines whose eighths the threads read at once, and how often.
constexpr int EIGHTHS = DEPTH / 8, LINES = THREADS / EIGHTHS, READS = ROWS / LINES;
static_assert(READS * LINES == ROWS && TILES % 2 == 0, "the threads read all rows, and the warps have all columns");

// Of double rows fewer blocks: what waits in registers is twice as long.
constexpr int BLOCKS = sizeof(ROW) == 8 || THREADS == 512 ? 1 : 2;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) product(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const Float16* matrix, int64 width, int64 columns, int64 column_tiles, float* out) {
  DYNAMIC_SHARED(uint4, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / SIDE * ROW_TILES * 16, warp_column = warp % SIDE * TILES * 8;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  const int64 block_row = (int64)blockIdx.x * ROWS, slice = blockIdx.y / column_tiles;
  const int64 first_column = blockIdx.y % column_tiles * COLUMNS, begin = slice * SLICE;
  const int pieces = (int)(((width - begin < SLICE ? width - begin : SLICE) + DEPTH - 1) / DEPTH);

  Float16* lines = reinterpret_cast<Float16*>(shared);  // two pieces: ROWS lines of rows, then COLUMNS of centroids
  // A thread reads the same eighth of READS lines.
  const int line = thread / EIGHTHS, part = thread % EIGHTHS * 8;
  const bool whole = x.aligned() && d % 8 == 0 && shift;
  const int left = (int)(n - block_row < ROWS ? n - block_row : ROWS) - line;  // lines from its first on
  const ROW* source = x.at(block_row + line, begin + part);
  Eight<ROW> ahead[READS];

  auto read = [&](int piece) {
    if (!whole || begin + piece * DEPTH + part >= d) return;
    const ROW* from = source + piece * DEPTH;
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      if (i * LINES < left) ahead[i].read(from + i * LINES * row_stride);
    }
  };
  // Beyond the last centroid another one: nobody looks at its products.
  auto fetch = [&](int piece) {
    Float16* to = lines + ((piece % 2 * (ROWS + COLUMNS) + ROWS + line) * PITCH + part);
    const Float16* from = matrix + begin + piece * DEPTH + part;
#pragma unroll
    for (int i = 0; i < COLUMNS; i += LINES) {
      const int64 column = first_column + i + line;
      if (i + line < COLUMNS) {
        copy_16_bytes(to + i * PITCH, from + (column < columns ? column : columns - 1) * width);
      }
    }
    copies_end();
  };
  auto store = [&](int piece) {
    Float16* to = lines + ((piece % 2 * (ROWS + COLUMNS) + line) * PITCH + part);
    const int64 column = begin + piece * DEPTH + part;
    if (!whole) {
#pragma unroll 1
      for (int i = 0; i < READS; ++i) {
        *reinterpret_cast<uint4*>(to + i * LINES * PITCH) =
            seen_8(x, frame, block_row + line + i * LINES, column, false);
      }
      return;
    }
    Eight<Wide> moved;
    if (column < d) moved.read(shift + column);
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      const bool there = i * LINES < left && column < d;
      *reinterpret_cast<uint4*>(to + i * LINES * PITCH) = there ? seen_8(ahead[i], moved, frame.scale) : uint4{0, 0, 0, 0};
    }
  };

  float sums[ROW_TILES][TILES][4] = {};
  read(0);
  fetch(0);
  store(0);
  for (int piece = 0; piece < pieces; ++piece) {
    copies_wait<0>();
    __syncthreads();
    if (piece + 1 < pieces) {
      read(piece + 1);
      fetch(piece + 1);
    }
    const Float16* rows = lines + piece % 2 * (ROWS + COLUMNS) * PITCH;
    const Float16* centroids = rows + ROWS * PITCH;
#pragma unroll 2
    for (int depth = 0; depth < DEPTH; depth += 16) {
      unsigned a[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        load_tiles(a[m], rows + (warp_row + 16 * m + lane % 16) * PITCH + depth + lane / 16 * 8);
      }
#pragma unroll
      for (int t = 0; t < TILES; t += 2) {
        unsigned b[4];
        const int at = warp_column + 8 * t + lane / 16 * 8 + lane % 8;
        load_tiles(b, centroids + at * PITCH + depth + lane / 8 % 2 * 8);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma(sums[m][t], a[m], b[0], b[1]);
          mma(sums[m][t + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (piece + 1 < pieces) store(piece + 1);
  }
#pragma unroll
  for (int i = 0; i < ROW_TILES * 2; ++i) {
    const int64 row = block_row + warp_row + lane / 4 + 8 * i;
    if (row >= n) continue;
    float* to = out + (slice * n + row) * columns;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const int64 column = first_column + warp_column + 8 * t + lane % 4 * 2;
      if (column < columns) to[column] = sums[i / 2][t][i % 2 * 2];
      if (column + 1 < columns) to[column + 1] = sums[i / 2][t][i % 2 * 2 + 1];
    }
  }
}
