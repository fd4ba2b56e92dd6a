// What device code is written with. It is CUDA C++ that a C++ compiler takes too, behind
// csrc/tests/host_shim.h, which stands in for CUDA's built-in names; shared memory is declared by
// the two macros here, since a plain __shared__ variable would be neither checked nor random there.
#pragma once

#include <cstdint>

#include "cuda/scalar.cuh"

#if defined(__CUDACC__)
// MEMTL_SHARED(float, tile, [32][33]): a __shared__ array that begins at 16 bytes.
#define MEMTL_SHARED(type, name, extents) __shared__ alignas(16) type name extents
// MEMTL_DYNAMIC_SHARED(bytes): those that the launch asked for.
#define MEMTL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace memtl::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ inline unsigned lane_of_thread() { return threadIdx.x % kWarp; }
__device__ inline unsigned warp_of_thread() { return threadIdx.x / kWarp; }
__device__ inline unsigned lanes_before() { return (1u << lane_of_thread()) - 1; }

// kCount elements that lie beside each other, moved at once; at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount <= 16);
  T at[kCount];
};

// So many elements are 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline Vector<T, kVector<T>> load16(const T* from) {
  return *reinterpret_cast<const Vector<T, kVector<T>>*>(from);
}

template <class T>
__device__ inline void store16(T* to, const Vector<T, kVector<T>>& x) {
  *reinterpret_cast<Vector<T, kVector<T>>*>(to) = x;
}

// 16 bytes from one place to the other: store16(load16(from)) may become four moves of 4 bytes.
template <class T>
__device__ inline void copy16(T* to, const T* from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

// Sum over the lanes of a warp, in a fixed order; every lane has it.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int i = kWarp / 2; i > 0; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}

}  // namespace memtl::cuda
