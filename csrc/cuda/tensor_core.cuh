// Products of small matrices by a warp, and copies to shared memory that are not waited for:
// instructions that CUDA C++ has no functions for. csrc/tests/host_tensor_core.h has them for the
// host shim. All are those of compute capability 8.0.
//
// mma_16x8x16 adds A [16, 16] B [16, 8] to C [16, 8], A and B of 16 bits. Of C a lane holds rows
// lane / 4 and lane / 4 + 8 (two numbers each) at columns 2 (lane % 4) and the next one.
// load_transposed gives A and B as the product wants them from memory in which the dimension that
// is summed over comes first: A^T [16, 16] in the four matrices (k, m) = (0, 0), (0, 8), (8, 0),
// (8, 8), B [16, 8] in two, k = 0 and 8.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

#if defined(__CUDACC__)

namespace memtl::cuda {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Four matrices [8, 8] of numbers of 16 bits. Lane i says where row i % 8 of matrix i / 8 begins,
// and gets of each one the numbers at column i / 4 of rows 2 (i % 4), in the low half, and the
// next.
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void mma_16x8x16(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_16x8x16(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes, both addresses aligned; zeros and nothing read where there are none. They are there for
// this thread after await_copies.
__device__ inline void copy16_async(void* to_shared, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
               : "memory");
}

__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two numbers, each the nearest to a float; any NaN becomes some NaN.
__device__ inline uint32_t rounded_pair(BFloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline uint32_t rounded_pair(Half, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace memtl::cuda

#endif
