// Device code of bits_select and bits_expand: elements whose bit is set, side by side and apart
// again. T is the unsigned integer of an element's size. A block has a tile (cuda/tile.cuh), and
// finds in shared memory what is beside each other in memory.
//
// Where a block's elements begin is counted before: bits_count_kernel, then prefix_kernel.
#pragma once

#include <cstdint>

#include "cuda/prefix.cuh"
#include "cuda/tile.cuh"

namespace memtl::cuda {

// How many bits of elements [first, first + 128) are set, first being a multiple of 128.
__device__ inline unsigned count_bits(const uint8_t* bits, int64_t first, int64_t numel) {
  const uint8_t* from = bits + first / 8;
  unsigned count = 0;
  if (first + 128 <= numel && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const auto words = load16(reinterpret_cast<const uint32_t*>(from));
    for (uint32_t word : words.at) count += static_cast<unsigned>(__popc(word));
  } else {
    for (int i = 0; i < 128; i += 8) {
      count += static_cast<unsigned>(__popc(load_bits<8>(bits, first + i, numel)));
    }
  }
  return count;
}

// counts[t] = bits set in tile t of a tensor of T, a warp for each tile.
template <class T>
__global__ void bits_count_kernel(const uint8_t* __restrict__ bits, int64_t numel, int64_t tiles,
                                  int64_t* __restrict__ counts) {
  constexpr int64_t kTile = tile_size<T>(kTileThreads);
  const int64_t t = int64_t{blockIdx.x} * (blockDim.x / kWarp) + warp_of_thread();
  if (t >= tiles) return;
  const int64_t end = (t + 1) * kTile < numel ? (t + 1) * kTile : numel;
  unsigned count = 0;
  for (int64_t i = t * kTile + 128 * lane_of_thread(); i < end; i += 128 * kWarp) {
    count += count_bits(bits, i, numel);
  }
  count = warp_sum(count);
  if (lane_of_thread() == 0) counts[t] = count;
}

// values[place] = x[element] for what is set, place < count.
template <class T>
__global__ void bits_select_kernel(const T* __restrict__ x, const uint8_t* __restrict__ bits,
                                   const int64_t* __restrict__ ends, int64_t numel, int64_t count,
                                   T* __restrict__ values) {
  MEMTL_SHARED(T, selected, [tile_size<T>(kTileThreads)]);
  const int64_t start = tile_of_block<T>(), first = start_of_tile(ends, blockIdx.x);
  const TileBits<T> kept = load_tile_bits<T>(bits, start, numel);
  const bool whole = is_whole(x, start, numel);
  Tile<T> tile = {};
  unsigned place[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) {
    const int64_t i = element_of<T>(start, j);
    place[j] = static_cast<unsigned>(__popc(kept.vector[j]));
    if (place[j] > 0) tile.vector[j] = whole ? load16(x + i) : load_up_to(x, i, numel);
  }
  const unsigned all = sum_before(place);
  for (int j = 0; j < kTileVectors; ++j) {
    for (int e = 0; e < kVector<T>; ++e) {
      if (kept.vector[j] >> e & 1) selected[place[j]++] = tile.vector[j].at[e];
    }
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < all && first + i < count; i += blockDim.x) {
    values[first + i] = selected[i];
  }
}

// x[element] = values[place] for what is set and place < count, else 0.
template <class T>
__global__ void bits_expand_kernel(const T* __restrict__ values, const uint8_t* __restrict__ bits,
                                   const int64_t* __restrict__ ends, int64_t numel, int64_t count,
                                   T* __restrict__ x) {
  MEMTL_SHARED(T, given, [tile_size<T>(kTileThreads)]);
  const int64_t start = tile_of_block<T>(), first = start_of_tile(ends, blockIdx.x);
  const TileBits<T> kept = load_tile_bits<T>(bits, start, numel);
  unsigned place[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) {
    place[j] = static_cast<unsigned>(__popc(kept.vector[j]));
  }
  const unsigned all = sum_before(place);
  for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
    given[i] = first + i < count ? values[first + i] : T{};
  }
  __syncthreads();
  Tile<T> tile = {};
  for (int j = 0; j < kTileVectors; ++j) {
    for (int e = 0; e < kVector<T>; ++e) {
      if (kept.vector[j] >> e & 1) tile.vector[j].at[e] = given[place[j]++];
    }
  }
  store_tile(x, start, numel, tile);
}

}  // namespace memtl::cuda
