// The machine of on_host.hpp. A thread is a fiber; blocks run one after the other. A fiber runs until it waits for others
// (a barrier, an exchange within the warp), then the next one runs, in rising or falling order. Copies to shared memory
// arrive when they are waited for, no earlier; shared memory is full of NaN at first; a barrier that not all threads
// reach ends the program. The tensor core adds as the coarsest one that was measured: every term cut to 24 bits of the
// largest.
#include "on_host_machine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

Dimensions threadIdx, blockIdx, gridDim;

namespace on_host {

unsigned char* dynamic;
size_t dynamic_size;
std::vector<Fiber> fibers;
unsigned current, direction;

static std::vector<uint4> memory;
static std::vector<Barrier> warp_barriers;
static std::vector<Slot> slots;
static Barrier block_barrier;
static unsigned running;  // fibers of the block that have not ended
static jmp_buf outside;
static void (*body)(void**);
static void** arguments;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "thread %u of block %u: %s\n", current, blockIdx.x, what);
  std::abort();
}

// `swapcontext` would do both, and ask the kernel for the signals' mask each time: most of a test's time.
[[noreturn]] static void resume(Fiber& fiber) {
  if (fiber.begun) _longjmp(fiber.kept, 1);
  fiber.begun = true;
  setcontext(&fiber.beginning);
  std::abort();
}

[[noreturn]] static void pass_on() {
  const unsigned threads = fibers.size();
  do current = current + direction < threads ? current + direction : current + direction - threads;
  while (fibers[current].done);
  threadIdx = {current, 0};
  resume(fibers[current]);
}

void go_on() {
  if (!_setjmp(fibers[current].kept)) pass_on();
}

void wait(Barrier& barrier, unsigned members) {
  const long generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  for (int turns = 0; barrier.generation == generation; ++turns) {
    if (turns == 100000) fail("waits for threads that never come");
    go_on();
  }
}

const Slot* exchange(const void* mine, unsigned bytes) {
  const unsigned warp = current / 32;
  int& parity = fibers[current].parity;
  Slot* all = &slots[(2 * warp + parity) * 32];
  parity ^= 1;
  std::memcpy(all[current % 32].bytes, mine, bytes);
  wait(warp_barriers[warp], 32);
  return all;
}

// A fiber goes on with the next block where it ended the last: beginning anew costs more than many a kernel's block.
static void run_fiber() {
  for (;;) {
    body(arguments);
    fibers[current].done = true;
    if (_setjmp(fibers[current].kept)) continue;
    if (--running == 0) _longjmp(outside, 1);
    pass_on();
  }
}

static void run_block(unsigned first) {
  current = first;
  threadIdx = {current, 0};
  if (!_setjmp(outside)) resume(fibers[current]);
}

void launch(
    void (*call_kernel)(void**), unsigned blocks_x, unsigned blocks_y, unsigned threads, unsigned shared_bytes,
    bool falling, bool hopper, void** given) {
  body = call_kernel;
  arguments = given;
  direction = falling ? threads - 1 : 1;
  gridDim = {blocks_x, blocks_y};
  slots.resize(threads / 32 * 64);
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    if (fiber.begun) continue;
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.data();
    fiber.beginning.uc_stack.ss_size = fiber.stack.size();
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, run_fiber, 0);
  }
  for (unsigned y = 0; y < blocks_y; ++y) {
    for (unsigned x = 0; x < blocks_x; ++x) {
      blockIdx = {x, y};
      memory.assign(shared_bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
      dynamic = reinterpret_cast<unsigned char*>(memory.data());
      dynamic_size = memory.size() * 16;
      block_barrier = Barrier();
      if (hopper) begin_block();
      warp_barriers.assign(threads / 32, Barrier());
      for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.parity = 0;
        fiber.groups.resize(1);
        fiber.groups[0].clear();
      }
      running = threads;
      run_block(falling ? threads - 1 : 0);
      if (hopper) end_block();
    }
  }
}

// Every float16 as float32.
static const std::vector<float> floats = [] {
  std::vector<float> all(1 << 16);
  for (unsigned bits = 0; bits < all.size(); ++bits) all[bits] = to_float(Float16{(unsigned short)bits});
  return all;
}();

float quick_float(unsigned bits) { return floats[bits & 0xffff]; }

float cut_sum(const float (&terms)[TERMS]) {
  int largest = 0;  // its bits: those of positive numbers are in the order of the numbers
  for (float term : terms) largest = std::max(largest, bits_as<int>(term) & 0x7fffffff);
  if (largest >= 0x7f800000) {
    float sum = 0;
    for (float term : terms) sum += term;
    return sum;
  }
  if (largest == 0) return 0;
  // In units of the last of 24 bits of the largest: what is beyond them is cut, of the terms and of their sum.
  const int last = (largest >> 23 ? (largest >> 23) - 127 : std::ilogb(bits_as<float>(largest))) - 23;
  const double unit = bits_as<double>((long long)(last + 1023) << 52);
  const double units = bits_as<double>((long long)(1023 - last) << 52);
  int sum = 0;
  for (float term : terms) sum += (int)(term * units);
  const unsigned size = std::abs(sum);
  const int cut = size >> 24 ? 8 - __builtin_clz(size) : 0;
  const double kept = size >> cut << cut;
  return (float)((sum < 0 ? -kept : kept) * unit);
}

void load_tiles(unsigned* tiles, const Float16* row) {
  const Slot* all = exchange(row);
  const int lane = current % 32;
  for (int tile = 0; tile < 4; ++tile) {
    const Float16* from = of_lane<const Float16*>(all, 8 * tile + lane / 4);
    if (reinterpret_cast<size_t>(from) % 16) std::abort();
    std::memcpy(&tiles[tile], from + lane % 4 * 2, 4);
  }
}

void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  // Of two depths each: A[row] of two rows, twice, and B[column] twice.
  struct Mine {
    float a[2][2][2], b[2][2];
  } mine;
  const unsigned b[2] = {b0, b1};
  for (int upper = 0; upper < 2; ++upper) {
    for (int next = 0; next < 2; ++next) {
      for (int row = 0; row < 2; ++row) mine.a[row][upper][next] = quick_float(a[2 * upper + row] >> 16 * next);
      mine.b[upper][next] = quick_float(b[upper] >> 16 * next);
    }
  }
  const Slot* all = exchange(mine);
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    float terms[TERMS] = {c[i]};
    for (int pair = 0; pair < 4; ++pair) {
      // The lanes that hold A[row][depth] and B[depth][column] of four depths.
      const Mine& row = *reinterpret_cast<const Mine*>(all[lane / 4 * 4 + pair].bytes);
      const Mine& column = *reinterpret_cast<const Mine*>(all[(lane % 4 * 2 + i % 2) * 4 + pair].bytes);
      const float *x = row.a[i / 2][0], *y = column.b[0];
      for (int depth = 0; depth < 4; ++depth) terms[4 * pair + depth + 1] = x[depth] * y[depth];
    }
    c[i] = cut_sum(terms);
  }
}

void copies_wait(unsigned left) {
  auto& groups = fibers[current].groups;
  while (groups.size() > left + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace on_host

void __syncthreads() { on_host::wait(on_host::block_barrier, on_host::fibers.size()); }
void __syncwarp() { on_host::wait(on_host::warp_barriers[on_host::current / 32], 32); }

unsigned __ballot_sync(unsigned, bool mine) {
  const on_host::Slot* all = on_host::exchange(mine);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= (unsigned)on_host::of_lane<bool>(all, lane) << lane;
  return lanes;
}

int same_in_warp(unsigned, int value, int* count) {
  const on_host::Slot* all = on_host::exchange(value);
  int first = 32;
  *count = 0;
  for (int lane = 31; lane >= 0; --lane) {
    if (on_host::of_lane<int>(all, lane) == value) {
      first = lane;
      ++*count;
    }
  }
  return first;
}

Float16 to_float16(float value) {
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs((double)value);
  unsigned bits = 0;
  if (std::isnan(value)) {
    bits = 0x7e00;
  } else if (size >= 65520) {
    bits = 0x7c00;
  } else if (size < 0x1p-14) {
    bits = (unsigned)std::nearbyint(size * 0x1p24);
  } else {
    const int exponent = std::ilogb(size);
    bits = ((exponent + 15) << 10) + (unsigned)std::nearbyint(std::ldexp(size, 10 - exponent)) - 1024;
  }
  return {(unsigned short)(sign | bits)};
}

float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31, digits = value.bits & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent ? std::ldexp(1024.0f + digits, exponent - 25)
                                : std::ldexp((float)digits, -24);
  return value.bits & 0x8000 ? -size : size;
}

void copy_16_bytes(void* shared, const void* global) {
  if (reinterpret_cast<size_t>(shared) % 16 || reinterpret_cast<size_t>(global) % 16) std::abort();
  on_host::fibers[on_host::current].groups.back().push_back({shared, global});
}

void copies_end() { on_host::fibers[on_host::current].groups.emplace_back(); }
