// The least score of a row and the second least, and when they make a label certain.
//
// A score is known within bound_j = a slope_j + margin_j (gpuclust.cluster.exact). Its lower end is score - bound_j, its
// upper end 2 bound_j above that. A label j is certain where every other lower end lies above j's upper end. Then j has
// the least lower end; so it is enough to keep the two least lower ends and where the first is, and to look at the upper
// end of that one. What is not a number makes `second` no number, for good, and certain() is false: it fails closed.
// The rounding of the lower end (three operations) and of the upper (three more) is in the 8 u of the bound.
#pragma once
#include "device.cuh"

struct Best {
  float least, second;
  int index;

  __device__ __forceinline__ void clear() {
    least = second = __int_as_float(0x7f800000);  // infinity
    index = 0;
  }

  // Take centroids in rising order: of equal ones the first stays.
  __device__ __forceinline__ void take(float lower, int centroid) {
    second = min_or_nan(second, max_or_nan(least, lower));
    const bool less = lower < least;
    least = less ? lower : least;
    index = less ? centroid : index;
  }

  __device__ __forceinline__ void merge(const Best& other) {
    second = min_or_nan(min_or_nan(second, other.second), max_or_nan(least, other.least));
    const bool less = other.least < least || (other.least == least && other.index < index);
    least = less ? other.least : least;
    index = less ? other.index : index;
  }

  // Over the lanes that differ in the bits from `first` up to below `end`.
  __device__ __forceinline__ void merge_lanes(int first, int end) {
    for (int lane = first; lane < end; lane *= 2) {
      Best other;
      other.least = __shfl_xor_sync(0xffffffffu, least, lane);
      other.second = __shfl_xor_sync(0xffffffffu, second, lane);
      other.index = __shfl_xor_sync(0xffffffffu, index, lane);
      merge(other);
    }
  }

  // The upper end of the score of `index`; `width` is high - low of that centroid.
  __device__ __forceinline__ float upper(float width, float slope, float norm) const {
    return least + fmaf(2.0f * norm, slope, width);
  }

  // For lower ends whose last 5 bits were taken for something else, and that were then taken from the least and put back:
  // each is off by less than 2^-18 of itself (31 units in the last place) and 2^-22 of the least (three roundings, of
  // numbers that are not larger than both together). What `second` goes down and `least` up by covers that, so that
  // they are not farther apart than the lower ends are. `second` keeps its order: it is still below all others. Where
  // what won is none of the k centroids, not one of these had a number for a score.
  __device__ __forceinline__ void widen(int64 k) {
    const float share = 0x1p-17f;
    least = fmaf(share, fabsf(least), least);
    second = fmaf(-share, fabsf(second), second);
    if (index >= k) {
      index = 0;
      least = __int_as_float(0x7fffffff);  // not a number
    }
  }

  // Not "<=" of the opposite: a comparison with no number must leave the row open. A score of minus infinity is that of
  // an operand that left the range of its type.
  __device__ __forceinline__ bool certain(float upper_end) const {
    return second > upper_end && least >= -3.402823466e38f;
  }
};

// The lower end of a score, from a product and the terms of its centroid.
__device__ __forceinline__ float lower_end(float product, float low, float slope, float norm) {
  return product + fmaf(-norm, slope, low);
}

// Rows that a pass leaves open, for each restart: how many, which.
struct Open {
  int* count;   // (r,)
  int* rows;    // (r, n)
  float* upper; // (r, n) or null: an upper end of the least score
  int64 n;

  __device__ __forceinline__ void add(int64 restart, int row, float upper_end) const {
    const int place = atomicAdd(count + restart, 1);
    rows[restart * n + place] = row;
    if (upper) upper[restart * n + place] = upper_end;
  }
};

// The label of a row, and the row to the list where the label is not certain; `width` and `slope` of the best centroid.
__device__ __forceinline__ void settle(
    const Best& best, float width, float slope, float norm, int* label, const Open& open, int64 restart, int64 row) {
  *label = best.index;
  const float upper = best.upper(width, slope, norm);
  if (open.count && !best.certain(upper)) open.add(restart, (int)row, upper);
}
