// Rows as they are stored, and as a pass sees them: x^ = (x - m) s, rounded once in the type of the pass.
#pragma once
#include "device.cuh"

// What a type of rows is centred in; also the type of its centroids (gpuclust.cluster.moments.centroid_dtype).
template <class T>
struct Pass {
  typedef float type;
  static __device__ __forceinline__ float of(T value) { return to_float(value); }
};
template <>
struct Pass<double> {
  typedef double type;
  static __device__ __forceinline__ double of(double value) { return value; }
};

typedef Pass<ROW>::type Wide;

// Rows (n, d) of any strides, in elements.
struct Rows {
  const ROW* first;
  int64 n, d, row_stride, column_stride;

  __device__ __forceinline__ const ROW* at(int64 row, int64 column) const {
    return first + row * row_stride + column * column_stride;
  }
  // Whether 8 features from `column` on, a multiple of 8, can be read 16 bytes at a time.
  __device__ __forceinline__ bool aligned() const {
    return column_stride == 1 && (row_stride * (int64)sizeof(ROW)) % 16 == 0 && (unsigned long long)first % 16 == 0;
  }
};

// m s and s; where `shift` is null, rows are used as they are stored.
struct Frame {
  const Wide* shift;
  Wide scale;

  __device__ __forceinline__ float seen(ROW value, int64 column) const {
    const Wide wide = Pass<ROW>::of(value);
    return shift ? (float)(wide * scale - shift[column]) : (float)wide;
  }
};

union Packed {
  Float16 halves[8];
  uint4 words;
};

// Eight features, 16 bytes at a time.
template <class T>
union Eight {
  T values[8];
  uint4 words[sizeof(T) / 2];

  __device__ __forceinline__ void read(const T* from) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  }
};

// Features column to column + 7 of a row as a pass sees them; zero beyond the last row and feature.
__device__ __forceinline__ void see_8(
    float (&out)[8], const Rows& x, const Frame& frame, int64 row, int64 column, bool aligned) {
  if (row < x.n && aligned && column + 8 <= x.d) {
    Eight<ROW> in;
    in.read(x.at(row, column));
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = frame.seen(in.values[i], column + i);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool there = row < x.n && column + i < x.d;
      out[i] = there ? frame.seen(*x.at(row, column + i), column + i) : 0.0f;
    }
  }
}

// The same as the tensor cores take them.
__device__ __forceinline__ uint4 seen_8(const Rows& x, const Frame& frame, int64 row, int64 column, bool aligned) {
  float values[8];
  see_8(values, x, frame, row, column, aligned);
  Packed out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.halves[i] = to_float16(values[i]);
  return out.words;
}

// The same of features that were read before, with those of the shift.
__device__ __forceinline__ uint4 seen_8(const Eight<ROW>& stored, const Eight<Wide>& shift, Wide scale) {
  Packed out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    out.halves[i] = to_float16((float)(Pass<ROW>::of(stored.values[i]) * scale - shift.values[i]));
  }
  return out.words;
}

// The same in two parts, the value rounded and what that leaves (gpuclust.cluster.exact, SPLIT).
struct Split {
  uint4 high, low;
};

__device__ __forceinline__ Split split_8(const Rows& x, const Frame& frame, int64 row, int64 column, bool aligned) {
  float values[8];
  see_8(values, x, frame, row, column, aligned);
  Packed high, low;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    high.halves[i] = to_float16(values[i]);
    low.halves[i] = to_float16(values[i] - to_float(high.halves[i]));
  }
  return {high.words, low.words};
}
