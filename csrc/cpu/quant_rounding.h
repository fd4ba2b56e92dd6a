// Rounding groups to codes: the dither, and codes on a fixed range.
#pragma once

#include "quant_codes.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000;

// (h + 0.5) / 2^16 for 16 bits h that stand in the upper part of a mantissa, the rest zero.
MEMTL_INLINE Floats uniform(Ints mantissa) {
  const Ints one = ints(0x3f800000);  // 1 + h / 2^16
  return add(as_floats(bit_or(mantissa, one)), floats(0x1p-17f - 1));
}

// [64] uniform numbers in (0, 1): a lane's 32-bit hash gives one to it and one to the lane 32 on.
MEMTL_INLINE void dither(uint32_t key, int64_t group, Floats (&out)[kVectors]) {
  constexpr uint32_t kStride = 0x9e3779b1;
  const Ints lane = mul(iota(), ints(kStride)), upper = ints(0x007fff80);
  const uint32_t start = static_cast<uint32_t>(group * 32) * kStride;
  MEMTL_UNROLL
  for (int i = 0; i < kVectors / 2; ++i) {
    const uint32_t counter = start + static_cast<uint32_t>(i * kWidth) * kStride;
    Ints h = bit_xor(add(lane, ints(counter)), ints(key));
    h = mul(bit_xor(h, shift_right<16>(h)), ints(0x85ebca6b));
    h = mul(bit_xor(h, shift_right<13>(h)), ints(0xc2b2ae35));
    h = bit_xor(h, shift_right<16>(h));
    out[i] = uniform(bit_and(shift_left<7>(h), upper));
    out[i + kVectors / 2] = uniform(bit_and(shift_right<9>(h), upper));
  }
}

// floor((x - offset) * inverse + dither), at most top. x is nowhere below offset.
MEMTL_INLINE void quantize(const Floats (&x)[kVectors], float offset, float inverse, uint32_t top,
                           uint32_t key, int64_t group, Ints (&codes)[kVectors]) {
  Floats noise[kVectors];
  dither(key, group, noise);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const Floats level = mul(sub(x[i], floats(offset)), floats(inverse));
    codes[i] = min(truncate(add(level, noise[i])), ints(top));
  }
}

MEMTL_INLINE bool any_nan(const Floats (&v)[kVectors]) {
  Ints below = ints(0);  // negative where a magnitude is above infinity
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    below = bit_or(below, sub(ints(kInfinityBits), bit_and(as_ints(v[i]), ints(0x7fffffff))));
  }
  return any(greater(ints(0), below));
}

// In halves, so that the compiler can vectorise where a vector is one element.
template <class Op>
MEMTL_INLINE Floats over_vectors(const Floats (&v)[kVectors], const Op& op) {
  Floats part[kVectors / 2];
  for (int i = 0; i < kVectors / 2; ++i) part[i] = op(v[i], v[i + kVectors / 2]);
  for (int half = kVectors / 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] = op(part[i], part[i + half]);
  }
  return part[0];
}

// Groups are measured kWidth at a time, lane g of a vector being group g's: the sums of their bits,
// and where they are, the least and the largest.
struct Measures {
  Ints sum;
  Floats low, high;
};

// load(g, v) gives group g.
template <bool kLimits, class Load>
MEMTL_INLINE Measures measure(const Load& load, int64_t first, int count) {
  const auto add_bits = [](Floats a, Floats b) { return as_floats(add(as_ints(a), as_ints(b))); };
  const auto less = [](Floats a, Floats b) { return min(a, b); };
  const auto more = [](Floats a, Floats b) { return max(a, b); };
  Floats sum[kWidth], low[kWidth], high[kWidth];
  for (int g = 0; g < kWidth; ++g) {
    Floats v[kVectors];
    load(first + (g < count ? g : 0), v);
    if constexpr (kLimits) {
      low[g] = over_vectors(v, less);
      high[g] = over_vectors(v, more);
    } else if (any_nan(v)) {  // conversions differ in the NaN they make: here all are one
      for (Floats& each : v) each = select(is_nan(each), floats(bits_float(kNaNBits)), each);
    }
    Ints bits = as_ints(v[0]);
    MEMTL_UNROLL
    for (int i = 1; i < kVectors; ++i) bits = add(bits, as_ints(v[i]));
    sum[g] = as_floats(bits);
  }
  Measures measures;
  measures.sum = as_ints(reduce_each(sum, add_bits));
  if constexpr (kLimits) {
    measures.low = reduce_each(low, less);
    measures.high = reduce_each(high, more);
  }
  return measures;
}

// Up to kWidth groups from `first` on; the dither is that of what `source` gives.
template <int kBits, class Source, class Load>
MEMTL_INLINE void pack_range_groups(const Source& source, const Load& load, QuantRange range,
                                    uint32_t seed, int64_t first, int count, uint8_t* codes) {
  constexpr uint32_t kForNaN = (1u << kBits) - 1;
  alignas(64) uint32_t keys[kWidth];
  store(keys, add(measure<false>(source, first, count).sum, ints(seed)));
  const float inverse = 1.0f / range.step;
  for (int g = 0; g < count; ++g, codes += 8 * kBits) {
    const int64_t group = first + g;
    Floats v[kVectors], clamped[kVectors];
    load(group, v);
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      clamped[i] = min(max(v[i], floats(range.lo)), floats(range.hi));
    }
    Ints levels[kVectors];
    quantize(clamped, range.lo, inverse, kForNaN - 1, keys[g], group, levels);
    if (any_nan(v)) {
      for (int i = 0; i < kVectors; ++i) {
        levels[i] = select(is_nan(v[i]), ints(kForNaN), levels[i]);
      }
    }
    store_codes<kBits>(codes, levels);
  }
}

template <DType kType>
struct LoadTensor {
  const void* x;
  int64_t numel;
  inline __attribute__((always_inline)) void operator()(int64_t group,
                                                        Floats (&v)[kVectors]) const {
    load_group<kType>(x, numel, group, v);
  }
};

// Groups that stand in floats, from `first` on.
struct LoadFloats {
  const float* x;
  int64_t first;
  inline __attribute__((always_inline)) void operator()(int64_t group,
                                                        Floats (&v)[kVectors]) const {
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = load(x + (group - first) * kGroup + i * kWidth);
  }
};

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
