// A second look at the rows that the first pass left open, on the tensor cores, too: most of them are certain here.
//
// The tile: a block takes OPEN_ROWS open rows of a restart from a list on the device, whose length only the device knows.
// Rows and centroids are two float16 numbers each, hi + lo (rows.cuh; exact.SPLIT has the bound), DEPTH hi and DEPTH lo
// of as many features a piece. The rows are split on their way into shared memory, `held` pieces at a time, all where
// they fit; the centroids pass by them, COLUMNS at a time, a piece of each in a ring of two. A warp multiplies 32 rows
// with 32 centroids, hi lo, lo hi and hi hi, and keeps of each row the two least lower ends, as assign.cu does. A row
// that is still open goes to the next list, with an upper end of its least score, above which no candidate can lie.
// -DWARPS=1, 2 or 4 (side by side).
#include "best.cuh"
#include "rows.cuh"

constexpr int OPEN_ROWS = 64, TILES = 4, COLUMNS = WARPS * TILES * 8, THREADS = OPEN_ROWS * WARPS;
// Rows of shared memory are 16 bytes longer than a multiple of 128: ldmatrix meets no bank twice.
constexpr int DEPTH = 32, PIECE = 2 * DEPTH, PITCH = PIECE + 8, SLICE_PIECES = 1024 / DEPTH;
constexpr int AT_ONCE = THREADS / (PIECE / 8);  // centroids of which the threads copy 16 bytes each

// The pieces of the centroids on their way through the ring: all pieces of the first COLUMNS centroids, then of the next.
// Beyond the last centroid comes that one again: there the lower end is infinite, whatever the product.
struct Stream {
  const Float16* source;  // of a restart
  Float16* ring;
  int k, pieces, column, piece, slot;  // centroids, pieces of each, and where the next comes from and goes to

  __device__ __forceinline__ void fetch() {
    if (column < k) {
      const int line = threadIdx.x / (PIECE / 8), part = threadIdx.x % (PIECE / 8) * 8;
      Float16* to = ring + (slot * COLUMNS + line) * PITCH + part;
#pragma unroll
      for (int i = 0; i < COLUMNS; i += AT_ONCE) {
        const int64 centroid = column + line + i < k ? column + line + i : k - 1;
        copy_16_bytes(to + i * PITCH, source + (centroid * pieces + piece) * PIECE + part);
      }
      slot ^= 1;
      if (++piece == pieces) {
        piece = 0;
        column += COLUMNS;
      }
    }
    copies_end();
  }
};

// Adds the products of 32 rows and 32 centroids over a piece: for 16 features hi lo, lo hi and hi hi go into one sum of
// the tensor cores, which float32 additions join over SLICE_PIECES, and the kernel then over these in shared memory.
__device__ __forceinline__ void multiply(
    float (&total)[2][TILES][4], const Float16* rows, int pitch, const Float16* columns, int lane) {
#pragma unroll 1  // so that 128 registers are enough
  for (int depth = 0; depth < DEPTH; depth += 16) {
    unsigned high[2][4], low[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const Float16* row = rows + (16 * m + lane % 16) * pitch + depth + lane / 16 * 8;
      load_tiles(high[m], row);
      load_tiles(low[m], row + DEPTH);
    }
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      unsigned column_high[4], column_low[4];
      const Float16* column = columns + (8 * t + lane / 16 * 8 + lane % 8) * PITCH + depth + lane / 8 % 2 * 8;
      load_tiles(column_high, column);
      load_tiles(column_low, column + DEPTH);
      float run[2][2][4] = {};
      // Four sums at a time, so that none waits for its own last product.
#pragma unroll
      for (int i = 0; i < 4; ++i) mma(run[i / 2][i % 2], high[i / 2], column_low[i % 2 * 2], column_low[i % 2 * 2 + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma(run[i / 2][i % 2], low[i / 2], column_high[i % 2 * 2], column_high[i % 2 * 2 + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma(run[i / 2][i % 2], high[i / 2], column_high[i % 2 * 2], column_high[i % 2 * 2 + 1]);
#pragma unroll
      for (int i = 0; i < 16; ++i) total[i / 8][t + i / 4 % 2][i % 4] += run[i / 8][i / 4 % 2][i % 4];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) rescore(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const Float16* parts, int64 width, int64 room, const float4* terms, const float* reach, int64 k,
    int64 r, int* labels, int64 label_stride, const int* open_count, const int* open_rows, int* left_count,
    int* left_rows, float* left_upper) {
  DYNAMIC_SHARED(uint4, shared);
  __shared__ Best found[WARPS][OPEN_ROWS];
  __shared__ float norm[OPEN_ROWS];
  __shared__ int64 chosen[OPEN_ROWS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / WARPS * 32, warp_column = warp % WARPS * TILES * 8;
  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  const Open left = {left_count, left_rows, left_upper, n};
  const bool aligned = x.aligned();

  const int pieces = (int)width, held = (int)room;  // of a centroid, and of a row at a time
  const int pitch = held * PIECE + 8;
  Float16* tile = reinterpret_cast<Float16*>(shared);
  Float16* ring = tile + OPEN_ROWS * pitch;
  float* slices = reinterpret_cast<float*>(ring + 2 * COLUMNS * PITCH) + thread;  // a thread's own 32; where d > SLICE
  const int column_tiles = (int)((k + COLUMNS - 1) / COLUMNS);

  for (int restart = 0; restart < (int)r; ++restart) {
    const int64 place = (int64)restart * column_tiles * COLUMNS;
    const unsigned open = open_count[restart];
    for (unsigned from = blockIdx.x * OPEN_ROWS; from < open; from += gridDim.x * OPEN_ROWS) {  // of a grid of fixed size
      __syncthreads();
      if (thread < OPEN_ROWS) {
        const int64 row = from + thread < open ? open_rows[restart * n + from + thread] : n;
        chosen[thread] = row;
        norm[thread] = row < n ? norms[row] : 0.0f;
      }
      __syncthreads();
      Stream stream = {parts + restart * k * pieces * PIECE, ring, (int)k, pieces, 0, 0, 0};
      stream.fetch();
      Best best[4];
      for (int i = 0; i < 4; ++i) best[i].clear();

      int slot = 0;
      for (int column_tile = 0; column_tile < column_tiles; ++column_tile) {
        float total[2][TILES][4] = {};
        for (int begin = 0; begin < pieces; begin += held) {
          const int some = pieces - begin < held ? pieces - begin : held;
          if (column_tile == 0 || held < pieces) {
            __syncthreads();
            const int eighths = some * (DEPTH / 8);
#pragma unroll 1
            for (int i = thread; i < OPEN_ROWS * eighths; i += THREADS) {
              const int row = i / eighths, column = i % eighths * 8;
              const Split two = split_8(x, frame, chosen[row], (int64)begin * DEPTH + column, aligned);
              uint4* to = reinterpret_cast<uint4*>(tile + row * pitch + column / DEPTH * PIECE + column % DEPTH);
              to[0] = two.high;
              to[DEPTH / 8] = two.low;
            }
          }
          for (int piece = 0; piece < some; ++piece) {
            copies_wait<0>();
            __syncthreads();
            stream.fetch();
            const Float16* columns = ring + (slot * COLUMNS + warp_column) * PITCH;
            slot ^= 1;
            multiply(total, tile + warp_row * pitch + piece * PIECE, pitch, columns, lane);
            const int done = begin + piece + 1;
            if (done % SLICE_PIECES == 0 || (done > SLICE_PIECES && done == pieces)) {
#pragma unroll
              for (int i = 0; i < 8 * TILES; ++i) {
                float& sum = total[i / (4 * TILES)][i / 4 % TILES][i % 4];
                if (done > SLICE_PIECES) sum += slices[i * THREADS];
                if (done < pieces) {
                  slices[i * THREADS] = sum;
                  sum = 0.0f;
                }
              }
            }
          }
        }
        const int column = column_tile * COLUMNS + warp_column + lane % 4 * 2;
        const float4* term = terms + (place + column) / 2;
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          const float4 pair = term[4 * t];  // low and slope of two centroids
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float far = norm[warp_row + lane / 4 + 8 * i];
            const float* two = total[i / 2][t] + i % 2 * 2;
            best[i].take(lower_end(two[0], pair.x, pair.y, far), column + 8 * t);
            best[i].take(lower_end(two[1], pair.z, pair.w, far), column + 8 * t + 1);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        best[i].merge_lanes(1, 4);
        if (lane % 4 == 0) found[warp % WARPS][warp_row + lane / 4 + 8 * i] = best[i];
      }
      __syncthreads();
      if (thread < OPEN_ROWS && chosen[thread] < n) {
        Best all = found[0][thread];
        for (int other = 1; other < WARPS; ++other) all.merge(found[other][thread]);
        const float4 pair = terms[(place + all.index) / 2];
        const float upper = all.upper(reach[place + all.index], all.index % 2 ? pair.w : pair.y, norm[thread]);
        labels[restart * label_stride + chosen[thread]] = all.index;
        if (!all.certain(upper)) left.add(restart, (int)chosen[thread], upper);
      }
    }
  }
}
