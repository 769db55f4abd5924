// Nearest centroid of each row, certified or left open, as assign.cu does it, with the products of warpgroups that only
// compute capability 9.0 has: they read both operands from shared memory and run beside the threads that began them.
//
// The tile: a block stays on its multiprocessor. Each of GROUPS warpgroups takes 64 rows at a time, rounded to float16 on
// their way into shared memory, and keeps them there while the centroids of all restarts go past it, COLUMNS at a time
// in pieces of 64 features. One more warp brings the pieces, in a ring that all warpgroups read: the centroids lie in
// memory as they will in shared memory (prepare.cu), so a piece is one copy in bulk. Warpgroups go on independently, as far
// apart as the ring is long: one multiplies while another compares or reads its next rows. The centroids go round and
// round, and each warpgroup begins at another place, so that they do not all need new rows at once.
// -DCOLUMNS=32, 64 or 128; -DGROUPS=1 to 4.
#include "best.cuh"
#include "device_hopper.cuh"
#include "rows.cuh"

constexpr int GROUP_ROWS = 64, DEPTH = 64, STEP = 16, MOST_STAGES = 16;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int SCORES = COLUMNS / 4;                                // of a row and a thread
constexpr int PIECE_BYTES = COLUMNS * DEPTH * 2, ROWS_BYTES = GROUP_ROWS * DEPTH * 2, TERM_BYTES = COLUMNS * 8;
constexpr int LINE = 128 / (int)sizeof(ROW);                       // features of a line of the cache
constexpr int NUMBERS = 31;                                        // the bits that `pack` takes
static_assert(SCORES <= NUMBERS + 1, "each score of a thread has its number");

// Comparing costs as much as multiplying unless d is large, so it takes few operations of a score. What the sum of
// products begins with is the bias less the bound: the bound has g of the bias for that (exact.py), and g of the bound
// itself, with g < 2^-11 for d <= 1024, is less than the 2^-10 that all bounds are raised by. Then the lowest 5 bits of
// the sum, the lower end, give way to the number of the score among those of the thread, so that all differ and the
// least brings its number along. Of two passes over the scores of a tile the first finds the least m; the second finds
// the greatest m - score below zero, as an integer: as integers negative numbers are in falling order, and the zero of m
// itself is above them all. `widen` (best.cuh) answers for the bits and for these subtractions.

// One operation, where the compiler does not know that `others` is ~NUMBERS: it takes two for two constants.
__device__ __forceinline__ float pack(float score, int others, int number) {
  return __int_as_float((__float_as_int(score) & others) | number);
}

// The products of 16 features, so many times.
template <int steps>
__device__ __forceinline__ void multiply_piece(float (&sums)[2 * SCORES], Operand rows, Operand columns) {
#pragma unroll
  for (int step = 0; step < steps; ++step) multiply<COLUMNS>(sums, rows + 2 * step, columns + 2 * step);
  products_end();
}

// Where in the ring a thread is.
struct Ring {
  Gate *full, *empty;
  int stages, stage;
  unsigned parity;

  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void wait() { gate_wait(full + stage, parity); }
  // Not before all threads of the warp have been there: one that still waits would miss the gate's next opening.
  __device__ __forceinline__ void leave(int which) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) gate_arrive(empty + which);
  }
};

// The two least of the scores that a thread has of a row, of which it has one in each of `SCORES` columns, and in which
// tile the least was.
struct Near {
  float least, second;
  int tile;

  __device__ __forceinline__ void clear() {
    least = second = __int_as_float(0x7f800000);  // infinity
    tile = 0;
  }

  // The scores of rows `half` = 0 or 1 among the sums of a tile.
  __device__ __forceinline__ void take(float (&sums)[2 * SCORES], int half, int which, int others) {
    float low[2];
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      float* score = &sums[i / 2 * 4 + half * 2 + i % 2];
      *score = pack(*score, others, i);
      low[i % 2] = i < 2 ? *score : min_or_nan(low[i % 2], *score);
    }
    const float first = min_or_nan(low[0], low[1]);
    int next[2];
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      const int less = __float_as_int(first - sums[i / 2 * 4 + half * 2 + i % 2]);
      next[i % 2] = i < 2 || less < next[i % 2] ? less : next[i % 2];
    }
    const float other = first - __int_as_float(next[0] < next[1] ? next[0] : next[1]);
    second = min_or_nan(min_or_nan(second, other), max_or_nan(least, first));
    tile = first < least ? which : tile;
    least = min_or_nan(least, first);
  }

  __device__ __forceinline__ Best best(int lane) const {
    const int number = __float_as_int(least) & NUMBERS;
    return {least, second, tile * COLUMNS + number / 2 * 8 + lane % 4 * 2 + number % 2};
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) assign(
    const ROW* first, int64 n, int64 d, int64 row_stride, int64 column_stride, const Wide* shift, double scale,
    const float* norms, const Float16* image, int64 width, const float* terms, const float* reach, int64 k, int64 r,
    int* labels, int64 label_stride, int* open_count, int* open_rows, int64 stages) {
  DYNAMIC_SHARED(uint4, shared);
  __shared__ Gate full[MOST_STAGES], empty[MOST_STAGES];
  const int thread = threadIdx.x, lane = thread % 32, group = uniform(thread / 128);
  const int pieces = (int)width / DEPTH;
  // Of the last piece, features up to a multiple of 16; the rest of it is zero.
  const int last_steps = (int)((d - (pieces - 1) * DEPTH + STEP - 1) / STEP);

  char* held = reinterpret_cast<char*>(shared);
  held += (1024 - shared_address(held) % 1024) % 1024;
  char* pieces_held = held + GROUPS * pieces * ROWS_BYTES;
  char* terms_held = pieces_held + stages * PIECE_BYTES;
  if (thread == 0) {
    for (int i = 0; i < (int)stages; ++i) {
      gate_make(full + i, 1);
      gate_make(empty + i, GROUPS * 4);
    }
    publish();
  }
  __syncthreads();

  const int column_tiles = (int)((k + COLUMNS - 1) / COLUMNS), tiles = (int)r * column_tiles;
  // Warpgroup 0 of each block takes the first 64 rows, then 1 of each, and so on: few rows are spread over all blocks.
  const int64 units = (n + GROUP_ROWS - 1) / GROUP_ROWS, at_once = (int64)gridDim.x * GROUPS;
  const int passes = (int)((units - blockIdx.x + at_once - 1) / at_once);
  // Where a warpgroup begins, in tiles; where there are restarts, with a whole one.
  const int step = passes == 1 ? 0 : r > 1 ? (int)(r / GROUPS) * column_tiles : tiles / GROUPS;
  const int late = group * step, latest = (GROUPS - 1) * step;
  Ring ring = {full, empty, (int)stages, 0, 0};

  if (group == GROUPS) {
    if (GROUPS == 4) registers_down<24>();
    if (thread != GROUPS * 128) return;
    const char* source = reinterpret_cast<const char*>(image);
    int tile = 0;
    for (int64 i = (int64)passes * tiles + latest; i > 0; --i) {
      for (int piece = 0; piece < pieces; ++piece) {
        gate_wait(empty + ring.stage, ring.parity ^ 1);
        gate_expect(full + ring.stage, PIECE_BYTES + (piece == 0 ? TERM_BYTES : 0));
        copy_bulk(pieces_held + ring.stage * PIECE_BYTES, source + ((int64)tile * pieces + piece) * PIECE_BYTES,
                  PIECE_BYTES, full + ring.stage);
        if (piece == 0) {
          copy_bulk(terms_held + ring.stage * TERM_BYTES, terms + (int64)tile * COLUMNS * 2, TERM_BYTES,
                    full + ring.stage);
        }
        ring.next();
      }
      if (++tile == tiles) tile = 0;
    }
    return;
  }

  if (GROUPS == 4) registers_up<112>();  // of 640 threads' 96 each

  const Rows x = {first, n, d, row_stride, column_stride};
  const Frame frame = {shift, (Wide)scale};
  const bool aligned = x.aligned(), whole = aligned && d % 8 == 0 && shift;
  const int part = thread % 8, line = thread % 128 / 8, lines = (int)((d + LINE - 1) / LINE);
  char* own = held + group * pieces * ROWS_BYTES;
  const Operand rows = operand_at(own);

  const auto pass_by = [&](int64 count) {
    for (int64 i = 0; i < count * pieces; ++i, ring.next()) {
      ring.wait();
      ring.leave(ring.stage);
    }
  };
  pass_by(late);
  int restart = late / column_tiles, tile = late % column_tiles;
  const int others = k > 0 ? ~NUMBERS : 0;
  for (int pass = 0; pass < passes; ++pass) {
    const int64 group_row = (pass * at_once + (int64)group * gridDim.x + blockIdx.x) * GROUP_ROWS;
    if (group_row >= n) {
      pass_by(tiles);
      continue;
    }
    warpgroup_meet(1 + group);  // no product reads the rows of before
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      const int column = piece * DEPTH + part * 8;
      uint4* to = reinterpret_cast<uint4*>(own + piece * ROWS_BYTES + line * 128 + (part ^ line % 8) * 16);
      if (whole && group_row + GROUP_ROWS <= n && column < d) {
        // All reads before the first use: nothing else of this warpgroup hides how long they take.
        Eight<ROW> stored[4];
        Eight<Wide> moved;
        const ROW* from = x.at(group_row + line, column);
#pragma unroll
        for (int i = 0; i < 4; ++i) stored[i].read(from + 16 * i * row_stride);
        moved.read(shift + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[128 * i] = seen_8(stored[i], moved, frame.scale);
      } else {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) to[128 * i] = seen_8(x, frame, group_row + line + 16 * i, column, aligned);
      }
    }
    publish();
    // The next rows meanwhile, as far as the cache: then they are soon here.
    const int64 next_row = group_row + at_once * GROUP_ROWS;
    for (int i = thread % 128; aligned && i < GROUP_ROWS * lines; i += 128) {
      if (next_row + i / lines < n) prefetch(x.at(next_row + i / lines, i % lines * LINE));
    }
    warpgroup_meet(1 + group);
    const int64 row = group_row + thread % 128 / 32 * 16 + lane / 4;
    const float far[2] = {row < n ? norms[row] : 0.0f, row + 8 < n ? norms[row + 8] : 0.0f};

    Near near[2];
    near[0].clear();
    near[1].clear();
    int left = column_tiles;
    for (int i = 0; i < tiles; ++i) {
      float sums[2 * SCORES];
      ring.wait();
      // Low and slope of two centroids at a time.
      const float4* term = reinterpret_cast<const float4*>(terms_held + ring.stage * TERM_BYTES) + lane % 4;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        const float4 pair = term[4 * j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[4 * j + 2 * half] = fmaf(-far[half], pair.y, pair.x);
          sums[4 * j + 2 * half + 1] = fmaf(-far[half], pair.w, pair.z);
        }
      }
      products_begin();
      int before = ring.stage;
      for (int piece = 0; piece < pieces; ++piece) {
        if (piece > 0) ring.wait();
        const Operand a = rows + piece * (ROWS_BYTES / 16);
        const Operand b = operand_at(pieces_held + ring.stage * PIECE_BYTES);
        // Straight on from the first product of a piece to its end: the compiler begins no others in between.
        switch (piece + 1 < pieces ? DEPTH / STEP : last_steps) {
          case 1: multiply_piece<1>(sums, a, b); break;
          case 2: multiply_piece<2>(sums, a, b); break;
          case 3: multiply_piece<3>(sums, a, b); break;
          default: multiply_piece<4>(sums, a, b);
        }
        if (piece > 0) {
          products_wait<1>();
          ring.leave(before);
        }
        before = ring.stage;
        ring.next();
      }
      products_wait(sums);
      ring.leave(before);

      near[0].take(sums, 0, tile, others);
      near[1].take(sums, 1, tile, others);
      if (++tile == column_tiles) tile = 0;
      if (--left == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Best best = near[half].best(lane);
          best.merge_lanes(1, 4);
          best.widen(k);
          if (lane % 4 == 0 && row + 8 * half < n) {
            const int64 place = (int64)restart * column_tiles * COLUMNS + best.index;
            settle(best, reach[place], terms[2 * place + 1], far[half], labels + restart * label_stride + row + 8 * half,
                   Open{open_count, open_rows, nullptr, n}, restart, row + 8 * half);
          }
          near[half].clear();
        }
        left = column_tiles;
        if (++restart == (int)r) restart = 0;
      }
    }
  }
  pass_by(latest - late);
}
