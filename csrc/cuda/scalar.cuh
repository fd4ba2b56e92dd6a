// Numbers of half the width as plain bits, and the type arithmetic on them is done in. The bits
// need none of CUDA's headers, so that the host shim compiles the kernels with any C++ compiler.
#pragma once

#include <cstdint>

#include "common/layout.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace memtl::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

#if defined(__CUDACC__)
__device__ inline float to_math(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float to_math(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline uint16_t half_of(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
inline float to_math(BFloat16 x) { return bfloat16_to_float(x.bits); }
inline float to_math(Half x) { return half_to_float(x.bits); }
inline uint32_t bits_of(float x) { return float_bits(x); }
inline uint16_t half_of(float x) { return float_to_half(x); }
#endif
__device__ inline float to_math(float x) { return x; }
__device__ inline double to_math(double x) { return x; }

// The number type of storage T nearest to x, ties to even.
template <class T, class Math>
__device__ inline T from_math(Math x) {
  return x;
}
template <>
__device__ inline Half from_math<Half, float>(float x) {
  return {half_of(x)};
}
template <>
__device__ inline BFloat16 from_math<BFloat16, float>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

}  // namespace memtl::cuda
