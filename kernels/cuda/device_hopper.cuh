// What the kernels need of a machine of compute capability 9.0, beside device.cuh: products of warpgroups, copies in bulk,
// and barriers that wait for both. As there, tests have a host version of the same names (tests/on_host_hopper.hpp).
//
// Threads and copies write shared memory in two ways (proxies): what threads wrote, products see after `publish`.
#pragma once
#include "device.cuh"

// A matrix in shared memory as the tensor cores read it: lines of 64 float16 (128 bytes), in groups of 8 lines that begin
// at multiples of 1024 bytes; of a line the 16-byte parts lie at their number xor the number of the line in its group.
// Adding 2 to it goes on by 16 features within the lines, adding 64 by a group.
typedef unsigned long long Operand;

#ifdef ON_HOST
#include "on_host_hopper.hpp"
#else
// Counts arrivals, and bytes of copies that were announced; it opens when none is missing, and is closed again at once.
// Who waits names the parity of the opening: 0 for the first, then 1, 0, ...; 1 before the first does not wait.
struct Gate {
  unsigned long long state;
};

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return (unsigned)__cvta_generic_to_shared(shared);
}

__device__ __forceinline__ void gate_make(Gate* gate, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(gate)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void gate_arrive(Gate* gate) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(gate)) : "memory");
}
// Arrive, and announce bytes that `copy_bulk` brings.
__device__ __forceinline__ void gate_expect(Gate* gate, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(gate)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void gate_wait(Gate* gate, unsigned parity) {
  unsigned open;
  do {
    asm volatile(
        "{\n.reg .pred open;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 open, [%1], %2;\n"
        "selp.u32 %0, 1, 0, open;\n}"
        : "=r"(open)
        : "r"(shared_address(gate)), "r"(parity)
        : "memory");
  } while (!open);
}

// A multiple of 16 bytes, at multiples of 16, to shared memory; the gate counts what has arrived.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes, Gate* gate) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(gate))
               : "memory");
}

// The line of memory around an address to the second-level cache, some time.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// What this thread wrote to shared memory is there for products of warpgroups and for copies, too.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The 128 threads of a warpgroup meet; `place` is 1 to 15.
__device__ __forceinline__ void warpgroup_meet(int place) {
  asm volatile("bar.sync %0, 128;" ::"r"(place) : "memory");
}

__device__ __forceinline__ Operand operand_at(const void* shared) {
  return (Operand)1 << 62 | (Operand)(1024 >> 4) << 32 | (Operand)1 << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}

// Products of a warpgroup run beside it. `products_begin` before the first, where threads changed the sums; `multiply`,
// then `products_end` closes a group; `products_wait<n>` leaves n groups under way. Sums are not to be touched before
// all products are done.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// All of them, after which the sums are there.
template <int count>
__device__ __forceinline__ void products_wait(float (&sums)[count]) {
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A warpgroup has so many registers a thread from here on: fewer, or more of what others gave back.
template <int count>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// What all threads of a warp have alike, as the compiler then knows, too.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// C += A B: A 64 lines and B `columns` lines of 16 float16, C float32. Thread t of the warpgroup has of C the rows
// t / 32 16 + t % 32 / 4 (c[4 j] and c[4 j + 1]) and 8 more (c[4 j + 2], c[4 j + 3]), columns 8 j + 2 (t % 4) and + 1.
template <int columns>
__device__ void multiply(float (&c)[columns / 2], Operand a, Operand b);

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
template <>
__device__ __forceinline__ void multiply<32>(float (&c)[16], Operand a, Operand b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "%16, %17, 1, 1, 1, 0, 0;"
      : SIXTEEN(0)
      : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void multiply<64>(float (&c)[32], Operand a, Operand b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "%32, %33, 1, 1, 1, 0, 0;"
      : SIXTEEN(0), SIXTEEN(16)
      : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void multiply<128>(float (&c)[64], Operand a, Operand b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, 1, 1, 1, 0, 0;"
      : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
      : "l"(a), "l"(b));
}
#undef SIXTEEN
#undef FOUR
#endif
