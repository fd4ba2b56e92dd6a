// Device code of bits_apply. Written so that a C++ compiler takes it too, behind
// csrc/tests/host_shim.h.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace memtl::cuda {

// out[i] = bit i ? x[i] * scale : 0. Any grid of one dimension: its threads stride over the
// elements.
template <class T, class Math>
__global__ void bits_apply_kernel(const T* __restrict__ x, const uint8_t* __restrict__ bits,
                                  Math scale, int64_t numel, T* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < numel; i += stride) {
    const bool keep = (bits[i >> 3] >> (i & 7)) & 1;
    out[i] = keep ? from_math<T>(to_math(x[i]) * scale) : T{};
  }
}

}  // namespace memtl::cuda
