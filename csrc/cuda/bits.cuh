// Device code of bits_pack, bits_pack_between and bits_apply. Written so that a C++ compiler takes
// it too, behind csrc/tests/host_shim.h. A block has a tile (cuda/tile.cuh); all is bound by
// memory.
#pragma once

#include <cstdint>

#include "cuda/scalar.cuh"
#include "cuda/tile.cuh"

namespace memtl::cuda {

struct IsSet {
  __device__ bool operator()(uint8_t x) const { return x != 0; }
};

// Set unless x <= lo or x >= hi; a bound that is NaN is none.
template <class T, class Math>
struct IsBetween {
  Math lo, hi;
  __device__ bool operator()(T x) const {
    const Math value = to_math(x);
    return !(value <= lo) & !(value >= hi);
  }
};

// Bit i of bits = test(x[i]); those beyond numel in the last byte are 0.
template <class T, class Test>
__global__ void bits_pack_kernel(const T* __restrict__ x, Test test, int64_t numel,
                                 uint8_t* __restrict__ bits) {
  const int64_t start = tile_of_block<T>();
  const Tile<T> tile = load_tile(x, start, numel);
  TileBits<T> packed = tile_bits_up_to<T>(start, numel);
  for (int j = 0; j < kTileVectors; ++j) {
    unsigned set = 0;
    for (int e = 0; e < kVector<T>; ++e) set |= unsigned{test(tile.vector[j].at[e])} << e;
    packed.vector[j] &= set;
  }
  store_tile_bits(bits, start, numel, packed);
}

// out[i] = bit i ? x[i] * scale : 0.
template <class T, class Math>
__global__ void bits_apply_kernel(const T* __restrict__ x, const uint8_t* __restrict__ bits,
                                  Math scale, int64_t numel, T* __restrict__ out) {
  const int64_t start = tile_of_block<T>();
  Tile<T> tile = load_tile(x, start, numel);
  const TileBits<T> kept = load_tile_bits<T>(bits, start, numel);
  for (int j = 0; j < kTileVectors; ++j) {
    for (int e = 0; e < kVector<T>; ++e) {
      T& each = tile.vector[j].at[e];
      each = kept.vector[j] >> e & 1 ? from_math<T>(to_math(each) * scale) : T{};
    }
  }
  store_tile(out, start, numel, tile);
}

}  // namespace memtl::cuda
