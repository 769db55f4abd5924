// The machine of kernels/cuda/device.cuh on a processor, so that tests run every kernel as it is, without a GPU.
//
// A thread is a fiber; blocks run one after the other. A fiber runs until it waits for others (a barrier, an exchange
// within the warp), then the next one runs, in rising or falling order. Copies to shared memory arrive when they are waited for, no
// earlier; shared memory is full of NaN at first; a barrier that not all threads reach ends the program. The tensor
// core adds as the coarsest one that was measured: every term cut to 24 bits of the largest.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(on_host::dynamic.data())

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Dimensions {
  unsigned x, y;
};

inline Dimensions threadIdx, blockIdx, gridDim;

namespace on_host {

struct Barrier {
  unsigned arrived = 0;
  long generation = 0;
};

struct alignas(16) Slot {
  unsigned char bytes[32];
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  int parity;
  std::vector<std::vector<Copy>> groups;
};

inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warp_barriers;
inline std::vector<Slot> slots;
inline std::vector<uint4> dynamic;
inline Barrier block_barrier;
inline ucontext_t outside;
inline unsigned current, direction;

inline void go_on() {
  const unsigned from = current, threads = fibers.size();
  do current = (current + direction) % threads;
  while (fibers[current].done && current != from);
  if (current == from) return;
  threadIdx = {current, 0};
  swapcontext(&fibers[from].context, &fibers[current].context);
}

inline void wait(Barrier& barrier, unsigned members) {
  const long generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  for (int turns = 0; barrier.generation == generation; ++turns) {
    if (turns == 100000) {
      std::fprintf(stderr, "thread %u of block %u waits for threads that never come\n", current, blockIdx.x);
      std::abort();
    }
    go_on();
  }
}

// What the other lanes of the warp put in, after all of them have.
template <class T>
const Slot* exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const unsigned warp = current / 32;
  int& parity = fibers[current].parity;
  Slot* all = &slots[(2 * warp + parity) * 32];
  parity ^= 1;
  std::memcpy(all[current % 32].bytes, &mine, sizeof(T));
  wait(warp_barriers[warp], 32);
  return all;
}

template <class T>
T of_lane(const Slot* all, int lane) {
  T value;
  std::memcpy(&value, all[lane].bytes, sizeof(T));
  return value;
}

inline void (*body)(void**);
inline void** arguments;
// What other parts of the machine do before and after each block.
inline void (*before_block)() = [] {}, (*after_block)() = [] {};

inline void run_fiber() {
  body(arguments);
  fibers[current].done = true;
  for (const Fiber& fiber : fibers) {
    if (!fiber.done) {
      go_on();
      std::abort();
    }
  }
  setcontext(&outside);
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** given, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(given[I])...);
}

template <class... A>
void launcher(void (*kernel)(A...), void** given) {
  call(kernel, given, std::index_sequence_for<A...>());
}

template <class... A>
constexpr int argument_count(void (*)(A...)) {
  return sizeof...(A);
}

// Every block of a grid, one after the other; `call_kernel` takes its arguments from pointers to them.
inline void launch(
    void (*call_kernel)(void**), unsigned blocks_x, unsigned blocks_y, unsigned threads, size_t shared_bytes,
    bool falling, void** given) {
  body = call_kernel;
  arguments = given;
  direction = falling ? threads - 1 : 1;
  gridDim = {blocks_x, blocks_y};
  fibers.resize(threads);
  slots.resize(threads / 32 * 64);
  for (Fiber& fiber : fibers) fiber.stack.resize(1 << 16);
  for (unsigned y = 0; y < blocks_y; ++y) {
    for (unsigned x = 0; x < blocks_x; ++x) {
      blockIdx = {x, y};
      dynamic.assign(shared_bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
      block_barrier = Barrier();
      before_block();
      warp_barriers.assign(threads / 32, Barrier());
      for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
        fiber.done = false;
        fiber.parity = 0;
        fiber.groups.assign(1, {});
      }
      current = falling ? threads - 1 : 0;
      threadIdx = {current, 0};
      swapcontext(&outside, &fibers[current].context);
      after_block();
    }
  }
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::block_barrier, on_host::fibers.size()); }
inline void __syncwarp() { on_host::wait(on_host::warp_barriers[on_host::current / 32], 32); }


template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return on_host::of_lane<T>(on_host::exchange(value), on_host::current % 32 ^ other);
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  const on_host::Slot* all = on_host::exchange(mine);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= (unsigned)on_host::of_lane<bool>(all, lane) << lane;
  return lanes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T, class U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

inline unsigned __float_as_uint(float value) {
  unsigned out;
  std::memcpy(&out, &value, 4);
  return out;
}

inline long long __double_as_longlong(double value) {
  long long out;
  std::memcpy(&out, &value, 8);
  return out;
}

inline float __int_as_float(int bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline int __float_as_int(float value) {
  int out;
  std::memcpy(&out, &value, 4);
  return out;
}

inline int same_in_warp(unsigned, int value, int* count) {
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

inline float min_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline double sum_of(double a, double b) { return a + b; }
inline double product_of(double a, double b) { return a * b; }
inline double quotient_of(double a, double b) { return a / b; }

inline Float16 to_float16(float value) {
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

inline float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31, digits = value.bits & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent ? std::ldexp(1024.0f + digits, exponent - 25)
                                : std::ldexp((float)digits, -24);
  return value.bits & 0x8000 ? -size : size;
}

inline float to_float(BFloat16 value) { return __int_as_float((int)((unsigned)value.bits << 16)); }

inline void load_tiles(unsigned (&tiles)[4], const Float16* row) {
  const on_host::Slot* all = on_host::exchange(row);
  const int lane = on_host::current % 32;
  for (int tile = 0; tile < 4; ++tile) {
    const Float16* from = on_host::of_lane<const Float16*>(all, 8 * tile + lane / 4);
    if (reinterpret_cast<size_t>(from) % 16) std::abort();
    std::memcpy(&tiles[tile], from + lane % 4 * 2, 4);
  }
}

inline float cut_sum(const float* terms, int count) {
  float largest = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) {
      float sum = 0;
      for (int j = 0; j < count; ++j) sum += terms[j];
      return sum;
    }
    largest = std::fmax(largest, std::fabs(terms[i]));
  }
  if (largest == 0) return 0;
  // In units of the last of 24 bits of the largest: what is beyond them is cut, of the terms and of their sum.
  const int last = std::ilogb(largest) - 23;
  const double units = std::ldexp(1.0, -last);
  long long sum = 0;
  for (int i = 0; i < count; ++i) sum += (long long)(terms[i] * units);
  long long size = std::llabs(sum), cut = 1;
  while (size / cut >> 24) cut *= 2;
  return (float)std::ldexp((double)(sum / cut * cut), last);
}

inline float quick_float(unsigned bits) {
  static const std::vector<float> floats = [] {
    std::vector<float> all(1 << 16);
    for (unsigned bits = 0; bits < all.size(); ++bits) all[bits] = to_float(Float16{(unsigned short)bits});
    return all;
  }();
  return floats[bits & 0xffff];
}

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Mine {
    unsigned a[4], b[2];
  };
  const on_host::Slot* all = on_host::exchange(Mine{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = on_host::current % 32;
  for (int i = 0; i < 4; ++i) {
    float terms[17] = {c[i]};
    for (int pair = 0; pair < 4; ++pair) {
      // The lanes and registers that hold A[row][depth] and B[depth][column] of four depths.
      const Mine row = on_host::of_lane<Mine>(all, lane / 4 * 4 + pair);
      const Mine column = on_host::of_lane<Mine>(all, (lane % 4 * 2 + i % 2) * 4 + pair);
      for (int upper = 0; upper < 2; ++upper) {
        const unsigned x = row.a[2 * upper + i / 2], y = column.b[upper];
        terms[8 * upper + 2 * pair + 1] = quick_float(x) * quick_float(y);
        terms[8 * upper + 2 * pair + 2] = quick_float(x >> 16) * quick_float(y >> 16);
      }
    }
    c[i] = cut_sum(terms, 17);
  }
}

inline void copy_16_bytes(void* shared, const void* global) {
  if (reinterpret_cast<size_t>(shared) % 16 || reinterpret_cast<size_t>(global) % 16) std::abort();
  on_host::fibers[on_host::current].groups.back().push_back({shared, global});
}

inline void copies_end() { on_host::fibers[on_host::current].groups.emplace_back(); }

template <int left>
void copies_wait() {
  auto& groups = on_host::fibers[on_host::current].groups;
  while (groups.size() > left + 1) {
    for (const on_host::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}
