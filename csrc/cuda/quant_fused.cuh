// Device code of quant, computed and packed, or decoded and used, in one pass over memory. The
// definitions are in memtl/reference/quant.py and fused.py.
#pragma once

#include "cuda/quant.cuh"
#include "cuda/quant_channels.cuh"
#include "cuda/quant_math.cuh"

namespace memtl::cuda {

// In all kernels numel, blocks and alignment are as in quant.cuh.

// Packs (x - bias) * weight of its channel.
template <class T, int kBits>
__global__ void quant_pack_normalized_kernel(const T* __restrict__ x, int64_t numel,
                                             ChannelTables all, uint32_t seed,
                                             uint8_t* __restrict__ codes,
                                             uint32_t* __restrict__ params) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    load_group(x, numel, group, lane, v);
    const int64_t begin = group * kGroup + 4 * lane;
    for (int p = 0; p < 4; ++p) {
      const FourChannels four(all, begin + 16 * p);
      four.each(all.bias, [&](int j, float mean) { v[p][j] -= mean; });
      four.each(all.weight, [&](int j, float rstd) { v[p][j] *= rstd; });
    }
    if ((group + 1) * kGroup >
        numel) {  // is padded with the last element, which is of the last one
      const int64_t last = all.channels.divisor() - 1;
      const float padding = (to_float(x[numel - 1]) - all.bias[last]) * all.weight[last];
      for_own([&](int p, int j) { v[p][j] = begin + 16 * p + j < numel ? v[p][j] : padding; });
    }
    pack_group<kBits>(v, seed, group, lane, codes, params);
  });
}

// decoded * weight + bias, and the nearer end where a bit of mask (null: none) is clear.
template <class T, int kBits>
__global__ void quant_unpack_affine_kernel(const uint8_t* __restrict__ codes,
                                           const uint32_t* __restrict__ params, ChannelTables all,
                                           const uint8_t* __restrict__ mask, Ends ends,
                                           int64_t numel, T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    decode_group<kBits>(codes, params, group, lane, v);
    for (int p = 0; p < 4; ++p) {
      const int64_t i = group * kGroup + 16 * p + 4 * lane;
      if (all.weight || all.bias) {
        const FourChannels four(all, i);
        if (all.weight) four.each(all.weight, [&](int j, float weight) { v[p][j] *= weight; });
        if (all.bias) four.each(all.bias, [&](int j, float bias) { v[p][j] += bias; });
      }
      if (mask && i < numel) {
        const int bits = mask[i / 8] >> (i % 8);
        for (int j = 0; j < 4; ++j) {
          if (!(bits >> j & 1)) v[p][j] = v[p][j] < ends.middle ? ends.lo : ends.hi;
        }
      }
    }
    store_group(out, numel, group, lane, v);
  });
}

// f, or f', of what a group holds. One of 4 bits or fewer holds 16 numbers at most: its lanes
// compute f of those, and the codes look its values up. All lanes of a warp call this.
template <int kBits, bool kDerived>
__device__ inline void decode_curve(const uint8_t* codes, const uint32_t* params, Act act,
                                    int64_t group, unsigned lane, Own& v) {
  if constexpr (kBits == 8) {
    decode_group<kBits>(codes, params, group, lane, v);
    with_curve<kDerived>(
        act, [&](const auto& curve) { for_own([&](int p, int j) { v[p][j] = curve(v[p][j]); }); });
  } else {
    // Of a warp's 8 groups, the values of one code lie beside each other: groups share no bank.
    constexpr int kEntries = 1 << kBits, kGroups = kWarp / kLanes;
    MEMTL_SHARED(float, tables, [kQuantThreads / kWarp][kEntries * kGroups]);
    float* table = tables[warp_of_thread()] + lane_of_thread() / kLanes;
    const Params of = params_of(params[group]);
    Planes levels;
    load_codes<kBits>(codes, group, lane, levels);
    __syncwarp();  // until all have read the values of the group before
    with_curve<kDerived>(act, [&](const auto& curve) {
      for (int i = 0; i < kEntries / kLanes; ++i) {
        const unsigned code = static_cast<unsigned>(i * kLanes) + lane;
        table[code * kGroups] = curve(fmaf(static_cast<float>(code), of.scale, of.offset));
      }
    });
    __syncwarp();
    for_own([&](int p, int j) { v[p][j] = table[(levels[p] >> (8 * j) & 0xff) * kGroups]; });
  }
}

// f(decoded).
template <class T, int kBits>
__global__ void quant_unpack_activation_kernel(const uint8_t* __restrict__ codes,
                                               const uint32_t* __restrict__ params, Act act,
                                               int64_t numel, T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    decode_curve<kBits, false>(codes, params, act, group, lane, v);
    store_group(out, numel, group, lane, v);
  });
}

// x * f'(decoded).
template <class T, int kBits>
__global__ void quant_activation_grad_kernel(const T* __restrict__ x,
                                             const uint8_t* __restrict__ codes,
                                             const uint32_t* __restrict__ params, Act act,
                                             int64_t numel, T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v, slope;
    load_group(x, numel, group, lane, v);
    decode_curve<kBits, true>(codes, params, act, group, lane, slope);
    for_own([&](int p, int j) { v[p][j] *= slope[p][j]; });
    store_group(out, numel, group, lane, v);
  });
}

// f'(x) on a fixed range; the dither is that of x.
template <class T, int kBits>
__global__ void quant_pack_derivative_kernel(const T* __restrict__ x, int64_t numel, Act act,
                                             QuantRange range, uint32_t seed,
                                             uint8_t* __restrict__ codes) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v;
    load_group(x, numel, group, lane, v);
    const uint32_t key = group_key(v) + seed;
    if (act != Act::hardswish) {  // as torch's, f' is NaN at the infinities
      for_own([&](int p, int j) { v[p][j] += v[p][j] - v[p][j]; });
    }
    with_curve<true>(
        act, [&](const auto& curve) { for_own([&](int p, int j) { v[p][j] = curve(v[p][j]); }); });
    pack_range_group<kBits>(v, key, range, group, lane, codes);
  });
}

// x * decoded, on a fixed range.
template <class T, int kBits>
__global__ void quant_apply_range_kernel(const T* __restrict__ x, const uint8_t* __restrict__ codes,
                                         QuantRange range, int64_t numel, T* __restrict__ out) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v, factor;
    load_group(x, numel, group, lane, v);
    decode_range_group<kBits>(codes, range, group, lane, factor);
    for_own([&](int p, int j) { v[p][j] *= factor[p][j]; });
    store_group(out, numel, group, lane, v);
  });
}

}  // namespace memtl::cuda
