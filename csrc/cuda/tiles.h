// The host side of tiles (cuda/tile.cuh) and of counts of tiles (cuda/prefix.cuh).
#pragma once

#include <limits>

#include "cuda/launch.h"
#include "cuda/prefix.cuh"

namespace memtl::cuda {

// Blocks of kTileThreads threads for `numel` elements.
template <class T>
unsigned tiles_of(int64_t numel) {
  return blocks_of(numel, tile_size<T>(kTileThreads), std::numeric_limits<int32_t>::max());
}

// Counts of tiles, which become the sums of all up to each.
inline void add_up(Tensor& counts, const OnDevice& on) {
  prefix_kernel<int64_t><<<1, kPrefixThreads, 0, on.stream()>>>(
      static_cast<int64_t*>(counts.mutable_data_ptr()), counts.numel());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls run.template operator()<T>() with the unsigned integer of a dtype's size.
template <class Run>
void with_integer(DType dtype, const Run& run) {
  switch (size_of(dtype)) {
    case 8:
      return run.template operator()<uint64_t>();
    case 4:
      return run.template operator()<uint32_t>();
    default:
      return run.template operator()<uint16_t>();
  }
}

}  // namespace memtl::cuda
