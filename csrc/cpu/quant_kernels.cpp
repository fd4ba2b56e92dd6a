#include "quant.h"
#include "quant_codes.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr uint16_t kNaN = 0x7fc0;  // bfloat16
constexpr float kSmallestScale = 0x1p-126f;
constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr int64_t kBatch = 16;  // groups that are normalised at a time

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

MEMTL_INLINE Floats bfloat16_down(Floats x) {
  const Ints bits = as_ints(x), negative = shift_right<31>(bits);
  const Ints away = sub(shift_left<16>(negative), negative);  // 0xffff or 0
  return as_floats(bit_and(add(bits, away), ints(0xffff0000)));
}

MEMTL_INLINE Floats negated(Floats x) { return as_floats(bit_xor(as_ints(x), ints(1u << 31))); }
MEMTL_INLINE Floats bfloat16_up(Floats x) { return negated(bfloat16_down(negated(x))); }

// Up to kWidth groups from `first` on.
template <int kBits, class Load>
MEMTL_INLINE void pack_groups(const Load& load, uint32_t seed, int64_t first, int count,
                              uint8_t* codes, uint16_t* params) {
  constexpr uint32_t kTop = (1u << kBits) - 1;
  const Floats top = floats(static_cast<float>(kTop));
  const Measures measures = measure<true>(load, first, count);
  // + 0 makes one zero of the two, whichever the minimum came upon.
  const Floats offset = add(bfloat16_down(measures.low), floats(0));
  const Floats step = bfloat16_up(div(sub(measures.high, offset), top));
  const Floats scale = max(step, floats(kSmallestScale));
  // Where the highest level is beyond float32, so is what is near it.
  const Floats reach = add(offset, mul(top, scale));
  alignas(64) float offsets[kWidth], inverses[kWidth];
  alignas(64) uint32_t keys[kWidth], reaches[kWidth], pairs[kWidth];
  store(offsets, offset);
  store(inverses, div(floats(1), scale));
  store(keys, add(measures.sum, ints(seed)));
  store(reaches, bit_and(as_ints(reach), ints(0x7fffffff)));
  store(pairs, bit_or(shift_right<16>(as_ints(scale)), as_ints(offset)));
  for (int g = 0; g < count; ++g, codes += 8 * kBits) {
    const int64_t group = first + g;
    Floats v[kVectors];
    load(group, v);
    if (any_nan(v) || reaches[g] >= kInfinityBits) {
      std::memset(codes, 0, 8 * kBits);
      pairs[g] = uint32_t{kNaN} << 16 | kNaN;
      continue;
    }
    Ints levels[kVectors];
    quantize(v, offsets[g], inverses[g], kTop, keys[g], group, levels);
    store_codes<kBits>(codes, levels);
  }
  std::memcpy(params, pairs, static_cast<size_t>(count) * sizeof *pairs);
}

template <int kBits, class Load>
MEMTL_INLINE void pack_range_groups(const Load& load, QuantRange range, uint32_t seed,
                                    int64_t first, int count, uint8_t* codes) {
  constexpr uint32_t kForNaN = (1u << kBits) - 1;
  alignas(64) uint32_t keys[kWidth];
  store(keys, add(measure<false>(load, first, count).sum, ints(seed)));
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

void pack(DType dtype, const void* x, int64_t numel, int bits, uint32_t seed, uint8_t* codes,
          uint16_t* params, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; g += kWidth) {
      const auto count = static_cast<int>(last - g < kWidth ? last - g : kWidth);
      pack_groups<kBits>(LoadTensor<kType>{x, numel}, seed, g, count, codes + g * 8 * kBits,
                         params + 2 * g);
    }
  });
}

constexpr int64_t kLongRun =
    16;  // a channel's elements in a row that are worth a loop of their own

// (x - bias) * weight on the elements [begin, end), one channel's run after the other; a vector
// more is written. `inner` is kLongRun at least.
template <DType kType>
MEMTL_INLINE void normalize_runs(const void* x, int64_t numel, const Channels& all, int64_t begin,
                                 int64_t end, float* out) {
  int64_t channel = begin / all.inner % all.channels, stop = (begin / all.inner + 1) * all.inner;
  for (int64_t i = begin; i < end; stop += all.inner) {
    if (stop > end) stop = end;
    const Floats mean = floats(all.bias[channel]), scale = floats(all.weight[channel]);
    // A whole vector at a time: what comes beyond the run is written next.
    const int64_t whole = stop + kWidth <= numel ? stop : stop - kWidth + 1;
    for (; i < whole; i += kWidth) {
      store(out + (i - begin), mul(sub(load<kType>(x, i), mean), scale));
    }
    for (; i < stop; ++i) {
      out[i - begin] = (load_float(kType, x, i) - all.bias[channel]) * all.weight[channel];
    }
    i = stop;
    channel = channel + 1 < all.channels ? channel + 1 : 0;
  }
}

// The same where `inner` is 1, on the groups [first, last).
template <DType kType>
MEMTL_INLINE void normalize_rows(const void* x, int64_t numel, const Channels& all, int64_t first,
                                 int64_t last, float* out) {
  int64_t channel = first * kGroup % all.channels;
  const int64_t step = kGroup % all.channels;
  for (int64_t g = first; g < last; ++g, out += kGroup) {
    const float *mean = all.bias + channel, *scale = all.weight + channel;
    Floats v[kVectors];
    load_group<kType>(x, numel, g, v);
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      v[i] = mul(sub(v[i], load(mean + i * kWidth)), load(scale + i * kWidth));
      store(out + i * kWidth, v[i]);
    }
    channel += step;
    if (channel >= all.channels) channel -= all.channels;
  }
}

void pack_normalized(DType dtype, const void* x, int64_t numel, const Channels& all, int bits,
                     uint32_t seed, uint8_t* codes, uint16_t* params, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    alignas(64) float x_hat[kBatch * kGroup + kWidth];
    for (int64_t g = first; g < last; g += kBatch) {
      const int64_t stop = g + kBatch < last ? g + kBatch : last, begin = g * kGroup;
      const int64_t end = stop * kGroup < numel ? stop * kGroup : numel;
      if (all.inner == 1) {
        normalize_rows<kType>(x, numel, all, g, stop, x_hat);
      } else {
        normalize_runs<kType>(x, numel, all, begin, end, x_hat);
      }
      // The last group is padded with its last element.
      for (int64_t i = end; i < stop * kGroup; ++i) x_hat[i - begin] = x_hat[end - 1 - begin];
      for (int64_t h = g; h < stop; h += kWidth) {
        const auto count = static_cast<int>(stop - h < kWidth ? stop - h : kWidth);
        pack_groups<kBits>(LoadFloats{x_hat, g}, seed, h, count, codes + h * 8 * kBits,
                           params + 2 * h);
      }
    }
  });
}

void unpack(DType dtype, const uint8_t* codes, const uint16_t* params, int bits, void* out,
            int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      Floats v[kVectors];
      decode<kBits>(codes, params, g, v);
      store_group<kType>(out, numel, g, v);
    }
  });
}

void pack_range(DType dtype, const void* x, int64_t numel, int bits, QuantRange range,
                uint32_t seed, uint8_t* codes, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; g += kWidth) {
      const auto count = static_cast<int>(last - g < kWidth ? last - g : kWidth);
      pack_range_groups<kBits>(LoadTensor<kType>{x, numel}, range, seed, g, count,
                               codes + g * 8 * kBits);
    }
  });
}

void unpack_range(DType dtype, const uint8_t* codes, int bits, QuantRange range, void* out,
                  int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      Floats v[kVectors];
      decode_range<kBits>(codes, range, g, v);
      store_group<kType>(out, numel, g, v);
    }
  });
}

}  // namespace

const QuantKernels quant = {pack, pack_normalized, unpack, pack_range, unpack_range};

}  // namespace memtl::MEMTL_ISA_NS
