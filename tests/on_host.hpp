// The machine of kernels/cuda/device.cuh on a processor, so that tests run every kernel as it is, without a GPU.
//
// What is compiled anew with each variant of a kernel stands here, and is kept small; the machine itself, on_host.cpp, is
// compiled once.
#pragma once
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(on_host::dynamic)

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

extern Dimensions threadIdx, blockIdx, gridDim;

namespace on_host {

struct alignas(16) Slot {
  unsigned char bytes[64];
};

extern unsigned char* dynamic;  // shared memory whose size the launch says
extern unsigned current;

// What the lanes of the warp put in, after all of them have.
const Slot* exchange(const void* mine, unsigned bytes);

template <class T>
const Slot* exchange(const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot), "a slot holds it");
  return exchange(&mine, sizeof(T));
}

template <class T>
T of_lane(const Slot* all, int lane) {
  T value;
  std::memcpy(&value, all[lane].bytes, sizeof(T));
  return value;
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "all bits and no more");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

void mma(float* c, const unsigned* a, unsigned b0, unsigned b1);
void load_tiles(unsigned* tiles, const Float16* row);
void copies_wait(unsigned left);

template <unsigned... I>
struct Indices {};
template <unsigned count, unsigned... I>
struct IndicesTo : IndicesTo<count - 1, count - 1, I...> {};
template <unsigned... I>
struct IndicesTo<0, I...> {
  typedef Indices<I...> type;
};

template <class... A, unsigned... I>
void call(void (*kernel)(A...), void** given, Indices<I...>) {
  kernel(*static_cast<A*>(given[I])...);
}

template <class... A>
void launcher(void (*kernel)(A...), void** given) {
  call(kernel, given, typename IndicesTo<sizeof...(A)>::type());
}

template <class... A>
constexpr int argument_count(void (*)(A...)) {
  return sizeof...(A);
}

// Every block of a grid, one after the other; `call_kernel` takes its arguments from pointers to them. `hopper`: with
// the machine of on_host_hopper.hpp.
void launch(
    void (*call_kernel)(void**), unsigned blocks_x, unsigned blocks_y, unsigned threads, unsigned shared_bytes,
    bool falling, bool hopper, void** given);

}  // namespace on_host

void __syncthreads();
void __syncwarp();
unsigned __ballot_sync(unsigned, bool mine);
int same_in_warp(unsigned, int value, int* count);

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return on_host::of_lane<T>(on_host::exchange(value), on_host::current % 32 ^ other);
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

inline unsigned __float_as_uint(float value) { return on_host::bits_as<unsigned>(value); }
inline long long __double_as_longlong(double value) { return on_host::bits_as<long long>(value); }
inline float __int_as_float(int bits) { return on_host::bits_as<float>(bits); }
inline int __float_as_int(float value) { return on_host::bits_as<int>(value); }

inline float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }
inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
inline double sum_of(double a, double b) { return a + b; }
inline double product_of(double a, double b) { return a * b; }
inline double quotient_of(double a, double b) { return a / b; }

Float16 to_float16(float value);
float to_float(Float16 value);
inline float to_float(BFloat16 value) { return __int_as_float((int)((unsigned)value.bits << 16)); }

inline void load_tiles(unsigned (&tiles)[4], const Float16* row) { on_host::load_tiles(tiles, row); }
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { on_host::mma(c, a, b0, b1); }

void copy_16_bytes(void* shared, const void* global);
void copies_end();
template <int left>
void copies_wait() {
  on_host::copies_wait(left);
}
