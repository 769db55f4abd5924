// Nearest centroid of each row, certified or left open: product and argmin in one kernel; no score is ever stored.
//
// The tile: a block takes BLOCK_ROWS rows, rounded to float16 on their way into shared memory, and keeps them there (d up
// to about 1000). Past them go the centroids of all restarts, COLUMNS at a time, DEPTH features of each in a ring of
// STAGES pieces. A warp multiplies WARP_ROWS rows with 8 TILES centroids, and where the features end keeps of each row
// the two least lower ends of scores and the index of the least (best.cuh). At the end of a restart warps put theirs
// together: a label that is certain is written, any other row goes to the list of open rows.
// -DSTREAMED_ROWS, for wider rows: they come as float16 (`convert` of select.cu), DEPTH features of them beside those of
// the centroids in the ring; a block has a span of the centroids of one restart, and `merge` puts the spans together.
// -DBLOCK_ROWS=64 or 128 (96 or 192 streamed), -DWARPS=1 or 2 (side by side), -DTILES=4 or 8.
#include "best.cuh"
#include "rows.cuh"

#ifdef STREAMED_ROWS
constexpr bool STREAMED = true;
#else
constexpr bool STREAMED = false;
#endif
// Streamed: the sums and totals of 192 rows by 128 centroids are 3/4 of a multiprocessor's registers, and are read from
// the second-level cache less often than any smaller tile. Else BLOCK_ROWS rows share each reading of the centroids.
constexpr int COLUMNS = WARPS * TILES * 8, ROW_TILES = STREAMED ? 3 : 2, WARP_ROWS = ROW_TILES * 16;
// Two resident blocks fit a multiprocessor up to d = 256: one multiplies while the other loads or compares.
constexpr int THREADS = BLOCK_ROWS / WARP_ROWS * WARPS * 32, BLOCKS = STREAMED ? 1 : 512 / THREADS;
// Lines of shared memory are 16 bytes longer than a multiple of 64: ldmatrix then meets no bank twice.
constexpr int DEPTH = 32, STAGES = 4, PITCH = DEPTH + 8, SLICE = 1024;
constexpr int LINES = COLUMNS + (STREAMED ? BLOCK_ROWS : 0);  // of a piece
constexpr int AT_ONCE = THREADS / (DEPTH / 8);                // lines of which the threads copy 16 bytes each
static_assert(COLUMNS % AT_ONCE == 0 && LINES % AT_ONCE == 0, "each thread copies the same number of pieces");

// The pieces on their way through the ring: all pieces of the first COLUMNS centroids, then of the next.
struct Stream {
  // What this thread copies next: of (tiles * COLUMNS, width), zero beyond d and k; of streamed rows (n, width).
  const Float16 *columns, *rows;
  Float16* to;  // where in the ring
  int64 width;
  int pieces, piece, steps;  // of a tile of centroids; the next one's place among them; all

  __device__ __forceinline__ Stream(
      const Float16* columns, const Float16* rows, Float16* ring, int64 width, int pieces, int tiles)
      : width(width), pieces(pieces), piece(0), steps(tiles * pieces) {
    const int line = threadIdx.x / (DEPTH / 8), part = threadIdx.x % (DEPTH / 8) * 8;
    this->columns = columns + line * width + part;
    this->rows = rows ? rows + line * width + part : nullptr;
    to = ring + line * PITCH + part;
  }

  __device__ __forceinline__ void fetch(int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < LINES; i += AT_ONCE) {
        const Float16* from = i < COLUMNS ? columns + i * width : rows + (i - COLUMNS) * width;
        copy_16_bytes(to + (step % STAGES * LINES + i) * PITCH, from);
      }
      columns += DEPTH;
      rows += DEPTH;
      if (++piece == pieces) {
        piece = 0;
        columns += (COLUMNS - 1) * width;
        rows -= width;
      }
    }
    copies_end();  // of an empty group, too: `copies_wait` counts groups
  }
};

typedef float Sums[ROW_TILES][TILES][4];

// Products of WARP_ROWS rows and 8 TILES centroids over 16 features, from where the lane reads its first tile of each:
// mma m16n8k16, float16 products and float32 sums.
__device__ __forceinline__ void multiply(Sums& product, const Float16* rows, int pitch, const Float16* columns) {
  unsigned a[ROW_TILES][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) load_tiles(a[m], rows + 16 * m * pitch);
#pragma unroll
  for (int t = 0; t < TILES; t += 2) {
    unsigned b[4];
    load_tiles(b, columns + 8 * t * PITCH);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      mma(product[m][t], a[m], b[0], b[1]);
      mma(product[m][t + 1], a[m], b[2], b[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) assign(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const Float16* matrix, int64 width, const float4* terms, const float* reach, int64 k, int64 r,
    int* labels, int64 label_stride, int* open_count, int* open_rows, int64 span, Best* parts) {
  DYNAMIC_SHARED(uint4, shared);
  __shared__ Best found[WARPS][BLOCK_ROWS];
  __shared__ float norm[BLOCK_ROWS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / WARPS * WARP_ROWS, warp_column = warp % WARPS * TILES * 8;
  const int pitch = STREAMED ? PITCH : (int)width + 8;
  const int row_at = (warp_row + lane % 16) * pitch + lane / 16 * 8;
  const int column_at = (warp_column + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
  const int64 block_row = (int64)blockIdx.x * BLOCK_ROWS;
  const Rows x = {first, n, d, row_stride, column_stride};

  const int pieces = (int)width / DEPTH;
  const int column_tiles = (int)((k + COLUMNS - 1) / COLUMNS), spans = (column_tiles + (int)span - 1) / (int)span;
  // Resident rows meet all centroids of all restarts, streamed ones those of a span: a few blocks have all rows of a
  // chunk, so each takes `span` tiles of centroids of one restart (blockIdx.y).
  const int first_restart = STREAMED ? blockIdx.y / spans : 0, restarts = STREAMED ? first_restart + 1 : (int)r;
  const int first_tile = STREAMED ? blockIdx.y % spans * (int)span : 0;
  const int last_tile = first_tile + (int)span < column_tiles ? first_tile + (int)span : column_tiles;
  const int64 first_column = ((int64)first_restart * column_tiles + first_tile) * COLUMNS;

  Float16* tile = reinterpret_cast<Float16*>(shared);
  Float16* ring = STREAMED ? tile : tile + BLOCK_ROWS * pitch;
  const Float16* streamed = STREAMED ? reinterpret_cast<const Float16*>(first) + block_row * width : nullptr;
  const int tiles = (restarts - first_restart) * (last_tile - first_tile);
  Stream stream(matrix + first_column * width, streamed, ring, width, pieces, tiles);
  for (int step = 0; step < STAGES - 1; ++step) stream.fetch(step);

  if (!STREAMED) {
    const Frame frame = {shift, (Wide)scale};
    const bool aligned = x.aligned();
    const int eighths = (int)width / 8;
#pragma unroll 2
    for (int i = thread; i < BLOCK_ROWS * eighths; i += THREADS) {
      const int row = i / eighths, column = i % eighths * 8;
      *reinterpret_cast<uint4*>(tile + row * pitch + column) = seen_8(x, frame, block_row + row, column, aligned);
    }
  }

  for (int i = thread; i < BLOCK_ROWS; i += THREADS) norm[i] = block_row + i < n ? norms[block_row + i] : 0.0f;

  Best best[2 * ROW_TILES];
  for (int i = 0; i < 2 * ROW_TILES; ++i) best[i].clear();

  int step = 0;
  for (int restart = first_restart; restart < restarts; ++restart) {
    for (int column_tile = first_tile; column_tile < last_tile; ++column_tile) {
      Sums total = {};
      // After each SLICE features the sums are added to totals and begin anew, as the bound of exact.py wants it.
      for (int piece = 0; piece < pieces;) {
        Sums product = {};
        const int end = STREAMED && piece + SLICE / DEPTH < pieces ? piece + SLICE / DEPTH : pieces;
        for (; piece < end; ++piece, ++step) {
          copies_wait<STAGES - 2>();
          __syncthreads();
          const Float16* lines = ring + step % STAGES * LINES * PITCH;
          const Float16* rows = (STREAMED ? lines + COLUMNS * PITCH : tile + piece * DEPTH) + row_at;
          const Float16* columns = lines + column_at;
#pragma unroll
          for (int depth = 0; depth < DEPTH; depth += 16) {
            multiply(product, rows + depth, pitch, columns + depth);
            if (depth == 0) stream.fetch(step + STAGES - 1);  // the copies' addresses meanwhile
          }
        }
#pragma unroll
        for (int i = 0; i < ROW_TILES * TILES * 4; ++i) {
          float* sum = &total[i / 4 / TILES][i / 4 % TILES][i % 4];
          const float one = product[i / 4 / TILES][i / 4 % TILES][i % 4];
          *sum = STREAMED ? *sum + one : one;
        }
      }
      const int column = column_tile * COLUMNS + warp_column + lane % 4 * 2;
      const float4* term = terms + ((int64)restart * column_tiles * COLUMNS + column) / 2;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const float4 pair = term[4 * t];  // low and slope of two centroids
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {  // 7 operations a score
          const float far = norm[warp_row + lane / 4 + 8 * i];
          const float* two = total[i / 2][t] + i % 2 * 2;
          best[i].take(lower_end(two[0], pair.x, pair.y, far), column + 8 * t);
          best[i].take(lower_end(two[1], pair.z, pair.w, far), column + 8 * t + 1);
        }
      }
      // What a streamed block has found waits in shared memory: its registers are needed.
      if (STREAMED || column_tile + 1 == last_tile) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
          best[i].merge_lanes(1, 4);
          if (lane % 4 == 0) {
            Best* before = &found[warp % WARPS][warp_row + lane / 4 + 8 * i];
            if (STREAMED && column_tile > first_tile) best[i].merge(*before);
            *before = best[i];
          }
          best[i].clear();
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < BLOCK_ROWS && block_row + i < n; i += THREADS) {
      Best all = found[0][i];
      if (WARPS == 2) all.merge(found[WARPS - 1][i]);
      if (STREAMED) {
        parts[blockIdx.y * n + block_row + i] = all;  // (spans of all restarts, n)
      } else {
        const int64 row = block_row + i, place = (int64)restart * column_tiles * COLUMNS + all.index;
        const float slope = reinterpret_cast<const float*>(terms)[2 * place + 1];
        settle(all, reach[place], slope, norm[i], labels + restart * label_stride + row,
               Open{open_count, open_rows, nullptr, n}, restart, row);
      }
    }
    if (STREAMED) break;
  }
}
