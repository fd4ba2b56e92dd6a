// What a lane reads and writes of a group: four elements at a time, and their codes.
#pragma once

#include "cuda/device.cuh"

namespace memtl::cuda {

constexpr int kLanes = 4;           // that hold a group
constexpr int kQuantThreads = 128;  // of a block

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline float to_float(BFloat16 x) { return to_math(x); }
__device__ inline float to_float(Half x) { return to_math(x); }

template <class T>
__device__ inline T from_float(float x) {
  return from_math<T>(x);
}
template <>
__device__ inline double from_float<double>(float x) {
  return x;
}

// Two numbers of half the width, rounded together.
template <class T>
__device__ inline uint32_t two_halves(float a, float b) {
  return from_float<T>(a).bits | static_cast<uint32_t>(from_float<T>(b).bits) << 16;
}

#if defined(__CUDACC__)
template <>
__device__ inline uint32_t two_halves<BFloat16>(float a, float b) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}
template <>
__device__ inline uint32_t two_halves<Half>(float a, float b) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}
// NaN if either is; fminf and fmaxf pass over it.
__device__ inline float least(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ inline float most(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#else
inline float least(float a, float b) {
  return a != a || b != b ? bits_float(0x7fffffff) : a < b ? a : b;
}
inline float most(float a, float b) {
  return a != a || b != b ? bits_float(0x7fffffff) : a > b ? a : b;
}
#endif

// Whether load_four and store_four may be used on every fourth element from x on.
template <class T>
__device__ inline bool is_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % (sizeof(T) == 2 ? 8 : 16) == 0;
}

template <class T>
__device__ inline void load_four(const T* from, float (&v)[4]) {
  constexpr int kCount = sizeof(T) == 8 ? 2 : 4;
  for (int i = 0; i < 4; i += kCount) {
    const auto part = *reinterpret_cast<const Vector<T, kCount>*>(from + i);
    for (int j = 0; j < kCount; ++j) v[i + j] = to_float(part.at[j]);
  }
}

template <class T>
__device__ inline void store_four(T* to, const float (&v)[4]) {
  if constexpr (sizeof(T) == 2) {
    const Vector<uint32_t, 2> part{two_halves<T>(v[0], v[1]), two_halves<T>(v[2], v[3])};
    *reinterpret_cast<Vector<uint32_t, 2>*>(to) = part;
  } else {
    constexpr int kCount = sizeof(T) == 8 ? 2 : 4;
    for (int i = 0; i < 4; i += kCount) {
      Vector<T, kCount> part;
      for (int j = 0; j < kCount; ++j) part.at[j] = from_float<T>(v[i + j]);
      *reinterpret_cast<Vector<T, kCount>*>(to + i) = part;
    }
  }
}

// The codes of a lane's elements, [p] having those of four elements, one a byte.
using Planes = uint32_t[4];

__device__ inline uint32_t* words_of(uint8_t* codes) { return reinterpret_cast<uint32_t*>(codes); }
__device__ inline const uint32_t* words_of(const uint8_t* codes) {
  return reinterpret_cast<const uint32_t*>(codes);
}

// The lowest bit of every byte, as four bits; and back.
__device__ inline uint32_t gather_bits(uint32_t bytes) {
  return (bytes & 0x01010101) * 0x01020408 >> 24;
}
__device__ inline uint32_t spread_bits(uint32_t four) { return four * 0x00204081 & 0x01010101; }

// Byte i of a group holds elements i, i + 8 * kBits, ...; of 3 bits, the low two are stored so, and
// then the third of all elements, one bit each. All lanes of a warp call this.
template <int kBits>
__device__ inline void store_codes(uint8_t* codes, int64_t group, unsigned lane,
                                   const Planes& plane) {
  uint32_t* to = words_of(codes) + group * (2 * kBits);
  if constexpr (kBits == 8) {
    for (int p = 0; p < 4; ++p) to[4 * p + lane] = plane[p];
  }
  if constexpr (kBits == 4) {
    for (int p = 0; p < 2; ++p) to[4 * p + lane] = plane[p] + (plane[p + 2] << 4);
  }
  if constexpr (kBits == 2) {
    to[lane] = plane[0] + (plane[1] << 2) + (plane[2] << 4) + (plane[3] << 6);
  }
  if constexpr (kBits == 3) {
    Planes low;
    uint32_t third = 0;  // byte p is for byte 2 p + lane / 2; two lanes have a half of it each
    for (int p = 0; p < 4; ++p) {
      low[p] = plane[p] & 0x03030303;
      third |= gather_bits(plane[p] >> 2) << (8 * p + lane % 2 * 4);
    }
    to[lane] = low[0] + (low[1] << 2) + (low[2] << 4) + (low[3] << 6);
    third |= __shfl_xor_sync(kAllLanes, third, 1);
    const uint32_t other = __shfl_xor_sync(kAllLanes, third, 2);
    const uint32_t even = (lane < 2 ? third : other) >> (16 * (lane % 2));
    const uint32_t odd = (lane < 2 ? other : third) >> (16 * (lane % 2));
    if (lane >= 2) return;
    to[4 + lane] = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
  }
}

template <int kBits>
__device__ inline void load_codes(const uint8_t* codes, int64_t group, unsigned lane,
                                  Planes& plane) {
  const uint32_t* from = words_of(codes) + group * (2 * kBits);
  constexpr uint32_t kLow = kBits == 4 ? 0x0f0f0f0f : 0x03030303;
  if constexpr (kBits == 8) {
    for (int p = 0; p < 4; ++p) plane[p] = from[4 * p + lane];
  } else if constexpr (kBits == 4) {
    for (int p = 0; p < 2; ++p) {
      const uint32_t word = from[4 * p + lane];
      plane[p] = word & kLow;
      plane[p + 2] = word >> 4 & kLow;
    }
  } else {
    const uint32_t word = from[lane];
    for (int p = 0; p < 4; ++p) plane[p] = word >> (2 * p) & kLow;
  }
  if constexpr (kBits == 3) {
    const auto third = *reinterpret_cast<const Vector<uint32_t, 2>*>(from + 4);
    for (int p = 0; p < 4; ++p) {
      const uint32_t four = third.at[p / 2] >> (p % 2 * 16 + 4 * lane) & 15;
      plane[p] |= spread_bits(four) << 2;
    }
  }
}

__device__ inline float code_at(uint32_t plane, int j) {
  return static_cast<float>(plane >> (8 * j) & 0xff);
}

struct Params {
  float scale, offset;
};

__device__ inline Params params_of(uint32_t pair) {
  return {bits_float(pair << 16), bits_float(pair & 0xffff0000)};
}

// The elements of x-hat, or of whatever is packed, four from element i on, a multiple of 4.
template <int kBits>
__device__ inline void decode_four(const uint8_t* codes, const uint32_t* params, int64_t i,
                                   float (&v)[4]) {
  const int64_t group = i / kGroup;
  const auto quad = static_cast<unsigned>(i % kGroup) / 4;
  constexpr unsigned kWords = kBits == 3 ? 4 : 2 * kBits;  // that hold the low two bits, or all
  constexpr uint32_t kLow = kBits == 8 ? 0xffffffff : kBits == 4 ? 0x0f0f0f0f : 0x03030303;
  const uint32_t word = words_of(codes)[group * (2 * kBits) + quad % kWords];
  uint32_t plane = word >> (quad / kWords * (kBits == 3 ? 2 : kBits)) & kLow;
  if constexpr (kBits == 3) {
    const unsigned third = codes[group * 24 + 16 + quad / 2];
    plane |= spread_bits(third >> (quad % 2 * 4) & 15) << 2;
  }
  const Params of = params_of(params[group]);
  for (int j = 0; j < 4; ++j) v[j] = fmaf(code_at(plane, j), of.scale, of.offset);
}

// Element i alone.
template <int kBits>
__device__ inline float decode_one(const uint8_t* codes, const uint32_t* params, int64_t i) {
  const int64_t group = i / kGroup;
  const auto within = static_cast<unsigned>(i % kGroup);
  constexpr unsigned kBytes = kBits == 3 ? 16 : 8 * kBits, kEach = kBits == 3 ? 2 : kBits;
  const unsigned byte = codes[group * (8 * kBits) + within % kBytes];
  unsigned code = byte >> (within / kBytes * kEach) & ((1u << kEach) - 1);
  if constexpr (kBits == 3) code |= (codes[group * 24 + 16 + within / 8] >> within % 8 & 1) << 2;
  const Params of = params_of(params[group]);
  return fmaf(static_cast<float>(code), of.scale, of.offset);
}

}  // namespace memtl::cuda
