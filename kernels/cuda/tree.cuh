// The reference distance: squares of differences in float64, summed by the fixed tree of gpuclust.cluster.sums.tree_sum,
// one rounding per operation, by all threads of a block or a warp together and for any d.
//
// The tree adds the upper half to the lower until one value is left: after t steps there are L_t = ceil(d / 2**t) values,
//   v_t[i] = v_(t-1)[i] + v_(t-1)[i + L_t]   where i + L_t < L_(t-1), else v_(t-1)[i].
// Of the first level p that has at most `held` values, each is the sum of a subtree of its own: up to 2**p terms, at
// i + a sum of some of L_1 .. L_p. A thread walks through it depth first, with one value per level in registers (as a
// binary counter carries), and the block adds the held values in shared memory. Nothing else is stored, whatever d is.
// Threads that are neighbours read neighbours. What is missing from a subtree counts as +0, which changes no bit of a sum
// of squares.
#pragma once
#include "device.cuh"

// Below 2**31 features, of which 1024 are held; -DTREE_LEVELS=2 for up to 4096, which leaves registers to the rest.
#ifdef TREE_LEVELS
constexpr int LEVELS = TREE_LEVELS;
#else
constexpr int LEVELS = 22;
#endif

__device__ __forceinline__ int64 level_length(int64 d, int level) { return (d + ((int64)1 << level) - 1) >> level; }

__device__ __forceinline__ int held_level(int64 d, int held) {
  int level = 0;
  while (level_length(d, level) > held) ++level;
  return level;
}

// v_p[i], for p up to `levels`; term(feature) is one square.
template <int levels, class Term>
__device__ __forceinline__ double subtree(int64 d, int p, int64 i, const Term& term) {
  double waiting[levels];
  const int64 terms = (int64)1 << p;
  for (int64 q = 0;; ++q) {
    int64 feature = i;
    bool there = true;
    for (int level = p; level > 0; --level) {
      if ((q >> (level - 1)) & 1) {
        feature += level_length(d, level);
        there = there && feature < level_length(d, level - 1);
      }
    }
    double value = there ? term(feature) : 0.0;
    const bool last = q + 1 == terms;
    bool carried = true;
#pragma unroll
    for (int level = 0; level < levels; ++level) {
      if (carried && level < p) {
        if ((q >> level) & 1) {
          value = sum_of(waiting[level], value);
        } else {
          waiting[level] = value;
          carried = false;
        }
      }
    }
    if (last) return value;
  }
}

// The threads that sum together wait for each other: those of a warp, or of a block.
template <int threads>
__device__ __forceinline__ void together() {
  if (threads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The sum of all terms, in every thread. `held` values of shared memory; thread of `threads` that all call it: a warp's,
// or the block's. At most 2**levels times `held` terms.
template <int threads, int levels = LEVELS, class Term>
__device__ __forceinline__ double tree_sum(int64 d, double* values, int held, int thread, const Term& term) {
  const int p = held_level(d, held);
  int length = (int)level_length(d, p);
  for (int i = thread; i < length; i += threads) values[i] = p == 0 ? term(i) : subtree<levels>(d, p, i, term);
  together<threads>();
  while (length > 1) {
    const int half = (length + 1) / 2;
    for (int i = thread; i < length - half; i += threads) values[i] = sum_of(values[i], values[half + i]);
    together<threads>();
    length = half;
  }
  const double total = values[0];
  together<threads>();
  return total;
}
