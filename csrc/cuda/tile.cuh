// How a block reads a flat tensor: a tile of vectors of 16 bytes, kTileVectors of them a thread,
// all on their way at once. Elements are in the order of (warp, vector, lane), so that each warp
// reads a run of memory. Bits go with them, kVector<T> for each vector.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace memtl::cuda {

constexpr unsigned kTileThreads = 256;
constexpr int kTileVectors = 4;

// Elements of the tile of so many threads.
template <class T>
__host__ __device__ constexpr int64_t tile_size(unsigned threads) {
  return int64_t{threads} * kTileVectors * kVector<T>;
}

// The first element of the tile of a block that has one.
template <class T>
__device__ inline int64_t tile_of_block() {
  return blockIdx.x * tile_size<T>(blockDim.x);
}

// The first element of this thread's vector j of the tile that begins at `start`.
template <class T>
__device__ inline int64_t element_of(int64_t start, int j) {
  const unsigned vector = (warp_of_thread() * kTileVectors + j) * kWarp + lane_of_thread();
  return start + int64_t{vector} * kVector<T>;
}

template <class T>
struct Tile {
  Vector<T, kVector<T>> vector[kTileVectors];
};

// Elements [i, i + kVector<T>); T{} for those at `numel` and beyond, which are not read.
template <class T>
__device__ inline Vector<T, kVector<T>> load_up_to(const T* x, int64_t i, int64_t numel) {
  Vector<T, kVector<T>> read{};
  for (int e = 0; e < kVector<T>; ++e) {
    if (i + e < numel) read.at[e] = x[i + e];
  }
  return read;
}

template <class T>
__device__ inline void store_up_to(T* x, int64_t i, int64_t numel,
                                   const Vector<T, kVector<T>>& written) {
  for (int e = 0; e < kVector<T>; ++e) {
    if (i + e < numel) x[i + e] = written.at[e];
  }
}

// Whether vectors of the tile that begins at `start` may be moved whole.
template <class T>
__device__ inline bool is_whole(const T* x, int64_t start, int64_t numel) {
  return start + tile_size<T>(blockDim.x) <= numel && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

template <class T>
__device__ inline Tile<T> load_tile(const T* x, int64_t start, int64_t numel) {
  Tile<T> tile;
  if (is_whole(x, start, numel)) {
    for (int j = 0; j < kTileVectors; ++j) tile.vector[j] = load16(x + element_of<T>(start, j));
  } else {
    for (int j = 0; j < kTileVectors; ++j) {
      tile.vector[j] = load_up_to(x, element_of<T>(start, j), numel);
    }
  }
  return tile;
}

template <class T>
__device__ inline void store_tile(T* x, int64_t start, int64_t numel, const Tile<T>& tile) {
  if (is_whole(x, start, numel)) {
    for (int j = 0; j < kTileVectors; ++j) store16(x + element_of<T>(start, j), tile.vector[j]);
  } else {
    for (int j = 0; j < kTileVectors; ++j) {
      store_up_to(x, element_of<T>(start, j), numel, tile.vector[j]);
    }
  }
}

// A bit for each of elements [i, i + kEach), set for those before `numel`.
template <int kEach>
__device__ inline unsigned bits_up_to(int64_t i, int64_t numel) {
  const int64_t left = numel - i;
  if (left >= kEach) return (1u << kEach) - 1;
  return left > 0 ? (1u << left) - 1 : 0;
}

// The bits of elements [i, i + kEach), i being a multiple of kEach; 0 at `numel` and beyond.
template <int kEach>
__device__ inline unsigned load_bits(const uint8_t* bits, int64_t i, int64_t numel) {
  static_assert(8 % kEach == 0);
  return i < numel ? bits[i / 8] >> (i % 8) & bits_up_to<kEach>(i, numel) : 0;
}

// The bits of this thread's vectors.
template <class T>
struct TileBits {
  unsigned vector[kTileVectors];
};

template <class T>
__device__ inline TileBits<T> tile_bits_up_to(int64_t start, int64_t numel) {
  TileBits<T> own;
  for (int j = 0; j < kTileVectors; ++j) {
    own.vector[j] = bits_up_to<kVector<T>>(element_of<T>(start, j), numel);
  }
  return own;
}

template <class T>
__device__ inline TileBits<T> load_tile_bits(const uint8_t* bits, int64_t start, int64_t numel) {
  TileBits<T> own;
  for (int j = 0; j < kTileVectors; ++j) {
    own.vector[j] = load_bits<kVector<T>>(bits, element_of<T>(start, j), numel);
  }
  return own;
}

// Which elements of a tile count: those whose bit is set in `mask`; where it is null, all.
template <class T>
__device__ inline TileBits<T> load_counted(const uint8_t* mask, int64_t start, int64_t numel) {
  return mask == nullptr ? tile_bits_up_to<T>(start, numel) : load_tile_bits<T>(mask, start, numel);
}

// Writes a tile's bits as words of 32, each made by as many lanes as have bits of it. `bits`
// begins at 4 bytes at least.
template <class T>
__device__ inline void store_tile_bits(uint8_t* bits, int64_t start, int64_t numel,
                                       const TileBits<T>& own) {
  constexpr int kEach = kVector<T>, kLanes = 32 / kEach;
  constexpr int kWords = (kTileVectors + kLanes - 1) / kLanes;  // a lane writes
  const int among = static_cast<int>(lane_of_thread()) % kLanes;
  uint32_t words[kWords] = {};
  for (int j = 0; j < kTileVectors; ++j) {
    uint32_t word = own.vector[j] << (kEach * among);
    for (int step = 1; step < kLanes; step *= 2) word |= __shfl_xor_sync(kAllLanes, word, step);
    if (j % kLanes == among) words[j / kLanes] = word;
  }
  for (int w = 0; w < kWords; ++w) {
    const int j = w * kLanes + among;
    if (j >= kTileVectors) continue;
    const int64_t i = element_of<T>(start, j) - among * kEach;
    if (i + 32 <= numel) {
      *reinterpret_cast<uint32_t*>(bits + i / 8) = words[w];
    } else {
      for (int b = 0; b < 4; ++b) {
        if (i + 8 * b < numel) bits[i / 8 + b] = static_cast<uint8_t>(words[w] >> (8 * b));
      }
    }
  }
}

}  // namespace memtl::cuda
