// Device code of quant: groups of 64 elements in 8, 4, 3 or 2 bits, rounded by a dither. The
// definition is memtl/reference/quant.py.
//
// Four lanes hold a group: lane l has its elements 16 p + 4 l + j, at [p][j]. Loads and stores of 4
// elements are then coalesced; the elements that share a byte of codes, or a hash of the dither,
// are in one lane.
#pragma once

#include "cpu/quant.h"
#include "cuda/device.cuh"
#include "cuda/quant_codes.cuh"

namespace memtl::cuda {

constexpr uint32_t kNaNPair = 0x7fc07fc0;  // scale and offset of a group that is not finite
constexpr float kSmallestScale = 0x1p-126f;

// What a lane has of a group.
using Own = float[4][4];

template <class Each>
__device__ inline void for_own(const Each& each) {
  for (int p = 0; p < 4; ++p) {
    for (int j = 0; j < 4; ++j) each(p, j);
  }
}

// Calls each(group, lane) for every group of numel elements, with any grid and block of one
// dimension. Warps stay whole: lanes that have no group left do the last one again, and write what
// is there already.
template <class Each>
__device__ inline void for_groups(int64_t numel, const Each& each) {
  const int64_t groups = ceil_div(numel, kGroup);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x / kLanes;
  const unsigned within = lane_of_thread() / kLanes;
  for (int64_t first = thread / kLanes - within; first < groups; first += stride) {
    const int64_t group = first + within;
    each(group < groups ? group : groups - 1, threadIdx.x % kLanes);
  }
}

// Elements beyond the last one are as that one.
template <class T>
__device__ inline void load_group(const T* x, int64_t numel, int64_t group, unsigned lane, Own& v) {
  const int64_t begin = group * kGroup + 4 * lane;
  if ((group + 1) * kGroup <= numel && is_aligned<T>(x)) {
    for (int p = 0; p < 4; ++p) load_four(x + begin + 16 * p, v[p]);
    return;
  }
  for_own([&](int p, int j) {
    const int64_t i = begin + 16 * p + j;
    v[p][j] = to_float(x[i < numel ? i : numel - 1]);
  });
}

template <class T>
__device__ inline void store_group(T* out, int64_t numel, int64_t group, unsigned lane,
                                   const Own& v) {
  const int64_t begin = group * kGroup + 4 * lane;
  if ((group + 1) * kGroup <= numel && is_aligned<T>(out)) {
    for (int p = 0; p < 4; ++p) store_four(out + begin + 16 * p, v[p]);
    return;
  }
  for_own([&](int p, int j) {
    const int64_t i = begin + 16 * p + j;
    if (i < numel) out[i] = from_float<T>(v[p][j]);
  });
}

// Joins what the lanes of a group bring; all of them have the result.
template <class T, class Join>
__device__ inline T over_group(T x, const Join& join) {
  for (int step = 1; step < kLanes; step *= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The sum of a group's bits, every NaN being the same one.
__device__ inline uint32_t group_key(const Own& v) {
  uint32_t sum = 0;
  for_own([&](int p, int j) { sum += v[p][j] != v[p][j] ? 0x7fc00000 : bits_of(v[p][j]); });
  return over_group(sum, [](uint32_t a, uint32_t b) { return a + b; });
}

// (h + 0.5) / 2^16, exactly: the 16 bits are the lowest of a number's mantissa.
__device__ inline float uniform(uint32_t h) {
  return fmaf(bits_float(0x4b000000 | h), 0x1p-16f, 0x1p-17f - 128);
}

// floor((x - offset) * inverse + dither), at most kTop, a code a byte; x is nowhere below offset.
// What is NaN in `where` gets kTop + 1, if that is a code.
template <int kBits, uint32_t kTop>
__device__ inline void quantize(const Own& x, float offset, float inverse, uint32_t key,
                                int64_t group, unsigned lane, const Own& where, Planes& codes) {
  constexpr uint32_t kStride = 0x9e3779b1;
  constexpr bool kForNaN = kTop + 1 < 1u << kBits;
  const uint32_t start = (static_cast<uint32_t>(group * 32) + 4 * lane) * kStride;
  const auto code = [&](int p, int j, uint32_t h) {
    const float level = (x[p][j] - offset) * inverse + uniform(h);
    const auto rounded = static_cast<uint32_t>(fminf(level, kTop));
    return kForNaN && where[p][j] != where[p][j] ? kTop + 1 : rounded;
  };
  for (int p = 0; p < 2; ++p) {
    codes[p] = codes[p + 2] = 0;
    for (int j = 0; j < 4; ++j) {
      const uint32_t h = fmix32(key ^ (start + static_cast<uint32_t>(16 * p + j) * kStride));
      codes[p] += code(p, j, h & 0xffff) << (8 * j);
      codes[p + 2] += code(p + 2, j, h >> 16) << (8 * j);
    }
  }
}

template <int kBits>
__device__ inline void pack_group(const Own& v, uint32_t seed, int64_t group, unsigned lane,
                                  uint8_t* codes, uint32_t* params) {
  constexpr uint32_t kTop = (1u << kBits) - 1;
  float low = v[0][0], high = v[0][0];
  uint32_t key = 0;
  for_own([&](int p, int j) {
    low = least(low, v[p][j]);
    high = most(high, v[p][j]);
    key += bits_of(v[p][j]);
  });
  low = over_group(low, [](float a, float b) { return least(a, b); });
  high = over_group(high, [](float a, float b) { return most(a, b); });
  key = over_group(key, [](uint32_t a, uint32_t b) { return a + b; }) + seed;
  // + 0 makes one zero of the two, whichever the minimum came upon.
  const float offset = bfloat16_down(low) + 0.0f;
  const float scale = fmaxf(bfloat16_up((high - offset) / kTop), kSmallestScale);
  // NaN and infinities end up here; where the highest level is beyond float32, so is what is near
  // it.
  const float reach = offset + kTop * scale;
  const bool finite = (bits_of(reach) & 0x7fffffff) < 0x7f800000;
  Planes levels;
  quantize<kBits, kTop>(v, offset, 1.0f / scale, key, group, lane, v, levels);
  for (uint32_t& each : levels) each = finite ? each : 0;
  store_codes<kBits>(codes, group, lane, levels);
  const uint32_t pair = bits_of(scale) >> 16 | bits_of(offset);
  if (lane == 0) params[group] = finite ? pair : kNaNPair;
}

// v on a fixed range; the dither is that of a group with this key.
template <int kBits>
__device__ inline void pack_range_group(const Own& v, uint32_t key, QuantRange range, int64_t group,
                                        unsigned lane, uint8_t* codes) {
  constexpr uint32_t kTop = (1u << kBits) - 2;
  Own clamped;
  for_own([&](int p, int j) { clamped[p][j] = fminf(fmaxf(v[p][j], range.lo), range.hi); });
  Planes levels;
  quantize<kBits, kTop>(clamped, range.lo, 1.0f / range.step, key, group, lane, v, levels);
  store_codes<kBits>(codes, group, lane, levels);
}

// code * scale + offset. One operation: the product of 8 bits and 8 is exact.
template <int kBits>
__device__ inline void decode_group(const uint8_t* codes, const uint32_t* params, int64_t group,
                                    unsigned lane, Own& v) {
  const Params of = params_of(params[group]);
  Planes levels;
  load_codes<kBits>(codes, group, lane, levels);
  for_own([&](int p, int j) { v[p][j] = fmaf(code_at(levels[p], j), of.scale, of.offset); });
}

// The same on a fixed range; the last code is NaN.
template <int kBits>
__device__ inline void decode_range_group(const uint8_t* codes, QuantRange range, int64_t group,
                                          unsigned lane, Own& v) {
  constexpr float kForNaN = (1 << kBits) - 1;
  Planes levels;
  load_codes<kBits>(codes, group, lane, levels);
  for_own([&](int p, int j) {
    const float code = code_at(levels[p], j), x = code * range.step + range.lo;
    v[p][j] = code == kForNaN ? bits_float(0x7fc00000) : x;
  });
}

// In all kernels x, codes, params and out have the groups of numel elements, one at least. A block
// has kQuantThreads threads at most, in one dimension. codes and params begin at 8 bytes, x and out
// anywhere.

template <class T, int kBits>
__global__ void quant_pack_kernel(const T* __restrict__ x, int64_t numel, uint32_t seed,
                                  uint8_t* __restrict__ codes, uint32_t* __restrict__ params) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    load_group(x, numel, group, lane, v);
    pack_group<kBits>(v, seed, group, lane, codes, params);
  });
}

template <class T, int kBits>
__global__ void quant_pack_range_kernel(const T* __restrict__ x, int64_t numel, QuantRange range,
                                        uint32_t seed, uint8_t* __restrict__ codes) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    load_group(x, numel, group, lane, v);
    pack_range_group<kBits>(v, group_key(v) + seed, range, group, lane, codes);
  });
}

template <class T, int kBits>
__global__ void quant_unpack_kernel(const uint8_t* __restrict__ codes,
                                    const uint32_t* __restrict__ params, int64_t numel,
                                    T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    decode_group<kBits>(codes, params, group, lane, v);
    store_group(out, numel, group, lane, v);
  });
}

template <class T, int kBits>
__global__ void quant_unpack_range_kernel(const uint8_t* __restrict__ codes, QuantRange range,
                                          int64_t numel, T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    decode_range_group<kBits>(codes, range, group, lane, v);
    store_group(out, numel, group, lane, v);
  });
}

}  // namespace memtl::cuda
