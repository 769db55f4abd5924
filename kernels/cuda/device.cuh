// What the kernels need of the machine: but for device_hopper.cuh the only file with PTX. Tests give a host version of
// the same names (tests/on_host.hpp), so that every kernel runs without a GPU, too.
//
// The kernels are compiled for one type of rows: -DROW=Float16, BFloat16, float or double.
#pragma once

typedef long long int64;

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

#ifdef ON_HOST
#include "on_host.hpp"
#else
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]

// D = A B + C on the tensor cores: A 16 x 16 and B 16 x 8 float16, C 16 x 8 float32. Lane l has of A rows l / 4 and
// l / 4 + 8, of B column l / 4, and of C rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]), columns 2 (l % 4) and + 1.
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of float16, whose rows start where the lanes point: lanes 0 to 7 for the first, and so on.
__device__ __forceinline__ void load_tiles(unsigned (&tiles)[4], const Float16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
}

// 16 bytes to shared memory that arrive later: `copies_end` closes a group, `copies_wait<n>` leaves n groups under way.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// min and max that pass NaN on; fminf and fmaxf drop it.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

__device__ __forceinline__ Float16 to_float16(float value) {
  Float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
__device__ __forceinline__ float to_float(Float16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
}
__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }

// One rounding each, whatever the compiler's flags.
__device__ __forceinline__ double sum_of(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double product_of(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double quotient_of(double a, double b) { return __ddiv_rn(a, b); }

// Lowest lane of the warp that has the same value, and how many lanes do.
__device__ __forceinline__ int same_in_warp(unsigned lanes, int value, int* count) {
  const unsigned same = __match_any_sync(lanes, value);
  *count = __popc(same);
  return __ffs(same) - 1;
}
#endif

__device__ __forceinline__ float to_float(float value) { return value; }

template <class T>
__device__ __forceinline__ double to_double(T value) {
  return to_float(value);
}
template <>
__device__ __forceinline__ double to_double<double>(double value) {
  return value;
}
