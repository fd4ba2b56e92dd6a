// What the top-k kernels share: a warp works on a block of 256 numbers, of which each lane has the
// eight that follow each other from 8 * lane on.
#pragma once

#include <cstring>

#include "cuda/prefix.cuh"

namespace memtl::cuda {

constexpr int kTopkWarps = 8;  // of a block of threads
constexpr int kTopkThreads = kTopkWarps * static_cast<int>(kWarp);
constexpr int kEach = kBlock / static_cast<int>(kWarp);  // numbers of a lane
constexpr int kRun = 4;                                  // blocks of a warp, one after the other

// The elements of block `index` of a row of n.
__device__ inline int block_size(int64_t n, int64_t index) {
  const int64_t left = n - index * kBlock;
  return static_cast<int>(left < kBlock ? left : kBlock);
}

// The bits that stand for a number of type T: those of half the width as they are, others in
// float32. As integers without the sign they are ordered as magnitudes are.
template <class T>
struct Number {
  using Bits = uint32_t;
  static constexpr uint32_t kOctave = 1u << 23;  // from a number to twice the number
};
template <>
struct Number<BFloat16> {
  using Bits = uint16_t;
  static constexpr uint32_t kOctave = 1u << 7;
};
template <>
struct Number<Half> {
  using Bits = uint16_t;
  static constexpr uint32_t kOctave = 1u << 10;
};
template <class T>
using BitsOf = typename Number<T>::Bits;

__device__ inline uint32_t number_bits(float x) { return bits_of(x); }
__device__ inline uint16_t number_bits(BFloat16 x) { return x.bits; }
__device__ inline uint16_t number_bits(Half x) { return x.bits; }
__device__ inline uint32_t number_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & ~(uint64_t{1} << 63)) <= uint64_t{0x7ff} << 52) {
    return bits_of(static_cast<float>(x));
  }
  // NaN, made quiet, with what float32 has room for: a GPU's own conversion would lose it all.
  return static_cast<uint32_t>(bits >> 32 & 0x80000000) | 0x7fc00000 |
         static_cast<uint32_t>(bits >> 29 & 0x003fffff);
}

template <class T>
__device__ inline float number_of(BitsOf<T> bits) {
  if constexpr (sizeof bits == 2) {
    return to_math(T{bits});
  } else {
    return __uint_as_float(bits);
  }
}

// A block while it is read. Where it can be read 16 bytes at a time, a lane has numbers that follow
// each other in every piece; else number i of a lane is that at 32 * i + lane, or zero if there is
// none.
template <class T>
struct Incoming {
  using Bits = BitsOf<T>;
  static constexpr int kPiece = kVector<Bits>;  // numbers
  Vector<Bits, kPiece> piece[kEach / kPiece];
  bool pieces;

  // Numbers [0, size) from x + first; `aligned` says that every whole block begins at 16 bytes.
  __device__ Incoming(const T* x, int64_t first, int size, bool aligned)
      : pieces(sizeof(T) == sizeof(Bits) && aligned && size == kBlock) {
    const int lane = static_cast<int>(lane_of_thread());
    if (pieces) {
      const Bits* from = reinterpret_cast<const Bits*>(x + first) + lane * kPiece;
#pragma unroll
      for (int i = 0; i < kEach / kPiece; ++i) {
        piece[i] = load16(from + i * static_cast<int>(kWarp) * kPiece);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = i * static_cast<int>(kWarp) + lane;
        piece[i / kPiece].at[i % kPiece] = at < size ? number_bits(x[first + at]) : Bits{0};
      }
    }
  }

  __device__ void store(Bits* block) const {
    const int lane = static_cast<int>(lane_of_thread());
#pragma unroll
    for (int i = 0; i < kEach / kPiece; ++i) {
      const int at = i * static_cast<int>(kWarp);
      if (pieces) {
        store16(block + (at + lane) * kPiece, piece[i]);
      } else {
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          block[(i * kPiece + j) * static_cast<int>(kWarp) + lane] = piece[i].at[j];
        }
      }
    }
  }
};

// Puts the positions of this lane's set bits to their places among those of the warp.
__device__ inline void list_positions(uint32_t bits, int before, uint8_t* positions) {
  const unsigned first = lane_of_thread() * kEach;
  positions += before;
#pragma unroll
  for (unsigned i = 0; i < kEach; ++i) {
    if (bits >> i & 1) *positions++ = static_cast<uint8_t>(first + i);
  }
}

// A value as it is in float32; scale is that of an int8 value's block.
template <class Value>
__device__ inline float decoded(Value value, float) {
  return to_math(value);
}
template <>
__device__ inline float decoded<int8_t>(int8_t code, float scale) {
  float x = static_cast<float>(code);
  if (code > 126 || code < -126) {
    x = __uint_as_float(code == 127 ? 0x7f800000 : code == -127 ? 0xff800000 : 0x7fc00000);
  }
  return x * scale;
}

}  // namespace memtl::cuda
