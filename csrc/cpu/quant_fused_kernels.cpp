#include "quant_fused.h"

#include "quant_codes.h"
#include "quant_math.h"
#include "quant_rounding.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// ------------------------------------------------------------------------------------- affine

// v where a group's 64 bits are set, from element i * kWidth on; else the nearer end.
MEMTL_INLINE Floats masked(const uint8_t* bits, int i, Floats v, Ends ends) {
  const Floats end = select(less(v, floats(ends.middle)), floats(ends.lo), floats(ends.hi));
#if defined(__AVX2__)
  return select(mask_of_bits(bits + i * kWidth / 8), v, end);
#else
  const uint32_t set = 0u - (bits[i / 8] >> (i % 8) & 1u);  // no branch
  return as_floats((as_ints(v) & set) | (as_ints(end) & ~set));
#endif
}

// Where a group's elements are among the channels: a place in the table, where channels follow each
// other, else a copy, each channel as often as it comes.
struct Place {
  int64_t channel, within;  // of the next element

  Place(const Channels& all, int64_t element)
      : channel(element / all.inner % all.channels), within(element % all.inner) {}

  // Fills [64] of each table that there is.
  void spread(const Channels& all, float* weight, float* bias) {
    for (int64_t i = 0; i < kGroup;) {
      const int64_t left = all.inner - within;
      const int64_t run = left < kGroup - i ? left : kGroup - i;
      // A whole vector at a time: what comes beyond the run is written next.
      for (int64_t j = i; j < i + run; j += kWidth) {
        if (weight) store(weight + j, floats(all.weight[channel]));
        if (bias) store(bias + j, floats(all.bias[channel]));
      }
      i += run;
      within += run;
      if (within == all.inner) {
        within = 0;
        channel = channel + 1 < all.channels ? channel + 1 : 0;
      }
    }
  }
};

template <DType kType, int kBits>
void affine_groups(const uint8_t* codes, const uint16_t* params, const Channels& all,
                   const uint8_t* mask, Ends ends, void* out, int64_t numel, int64_t first,
                   int64_t last) {
  float weights[kGroup + kWidth], biases[kGroup + kWidth];
  Place place(all, first * kGroup);
  const int64_t step = kGroup % all.channels;
  for (int64_t g = first; g < last; ++g) {
    const float* weight = all.weight ? weights : nullptr;
    const float* bias = all.bias ? biases : nullptr;
    if (all.inner == 1) {
      if (weight) weight = all.weight + place.channel;
      if (bias) bias = all.bias + place.channel;
      place.channel += step;
      if (place.channel >= all.channels) place.channel -= all.channels;
    } else {
      place.spread(all, all.weight ? weights : nullptr, all.bias ? biases : nullptr);
    }
    Floats v[kVectors];
    decode<kBits>(codes, params, g, v);
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (weight) v[i] = mul(v[i], load(weight + i * kWidth));
      if (bias) v[i] = add(v[i], load(bias + i * kWidth));
    }
    if (mask) {
      uint8_t bits[kGroup / 8] = {};
      const int64_t left = ceil_div(numel, 8) - g * (kGroup / 8);
      std::memcpy(bits, mask + g * (kGroup / 8), static_cast<size_t>(left < 8 ? left : 8));
      MEMTL_UNROLL
      for (int i = 0; i < kVectors; ++i) v[i] = masked(bits, i, v[i], ends);
    }
    store_group<kType>(out, numel, g, v);
  }
}

void unpack_affine(DType dtype, const uint8_t* codes, const uint16_t* params, int bits,
                   const Channels& channels, const uint8_t* mask, Ends ends, void* out,
                   int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    affine_groups<kType, kBits>(codes, params, channels, mask, ends, out, numel, first, last);
  });
}

// ------------------------------------------------------------------------------- activations

// f or f' of count numbers in place, up to a whole vector.
template <Act kAct, bool kDerived>
void over(float* x, int count) {
  for (int i = 0; i < count; i += kWidth) {
    const Floats above = max(floats(-100), load(x + i));  // NaN is the second one, and stays
    const Floats y = kDerived ? derived<kAct>(min(floats(100), above)) : activated<kAct>(above);
    store(x + i, y);
  }
}

template <Act kAct>
MEMTL_INLINE void over(float* x, int count, bool derived) {
  return derived ? over<kAct, true>(x, count) : over<kAct, false>(x, count);
}

void over(Act act, bool derived, float* x, int count) {
  switch (act) {
    case Act::gelu:
      return over<Act::gelu>(x, count, derived);
    case Act::gelu_tanh:
      return over<Act::gelu_tanh>(x, count, derived);
    case Act::silu:
      return over<Act::silu>(x, count, derived);
    case Act::quick_gelu:
      return over<Act::quick_gelu>(x, count, derived);
    case Act::hardswish:
      return over<Act::hardswish>(x, count, derived);
    case Act::mish:
      return over<Act::mish>(x, count, derived);
  }
}

// A group of 4 bits or fewer holds 16 numbers at most: f is taken of those, and the codes look its
// values up. Groups are taken some at a time; `entries` are what f is taken of.
constexpr int kBatch = 16;
template <int kBits>
constexpr int kEntries = kBits == 8 ? kGroup : 1 << kBits;

template <int kBits>
MEMTL_INLINE void fill(const uint8_t* codes, const uint16_t* params, int64_t g, float* entries) {
  if constexpr (kBits == 8) {
    Floats v[kVectors];
    decode<kBits>(codes, params, g, v);
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) store(entries + i * kWidth, v[i]);
  } else {
    const Floats scale = floats(bfloat16_to_float(params[2 * g]));
    const Floats offset = floats(bfloat16_to_float(params[2 * g + 1]));
    MEMTL_UNROLL
    for (int i = 0; i < kEntries<kBits>; i += kWidth) {
      const Floats level = to_floats(add(iota(), ints(static_cast<uint32_t>(i))));
      store(entries + i, add(mul(level, scale), offset));
    }
  }
}

template <int kBits>
MEMTL_INLINE void read(const uint8_t* codes, int64_t g, const float* entries,
                       Floats (&v)[kVectors]) {
  if constexpr (kBits == 8) {
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = load(entries + i * kWidth);
  } else {
    Ints levels[kVectors];
    load_codes<kBits>(codes + g * 8 * kBits, levels);
    const Lookup<kEntries<kBits>> table(entries);
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = table(levels[i]);
  }
}

// Calls use(g, v) with f or f' of every group.
template <int kBits, class Use>
MEMTL_INLINE void for_groups(const uint8_t* codes, const uint16_t* params, Act act, bool derived,
                             int64_t first, int64_t last, const Use& use) {
  constexpr int kStride = kEntries<kBits>;
  float entries[kBatch * kStride + 16] = {};  // a whole vector is written and read
  for (int64_t g = first; g < last; g += kBatch) {
    const int count = static_cast<int>(last - g < kBatch ? last - g : kBatch);
    for (int i = 0; i < count; ++i) fill<kBits>(codes, params, g + i, entries + i * kStride);
    over(act, derived, entries, count * kStride);
    for (int i = 0; i < count; ++i) {
      Floats v[kVectors];
      read<kBits>(codes, g + i, entries + i * kStride, v);
      use(g + i, v);
    }
  }
}

void unpack_activation(DType dtype, const uint8_t* codes, const uint16_t* params, int bits, Act act,
                       void* out, int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    const auto use = [&](int64_t g, const Floats(&v)[kVectors]) {
      store_group<kType>(out, numel, g, v);
    };
    for_groups<kBits>(codes, params, act, false, first, last, use);
  });
}

// out = x * v on group g.
template <DType kType>
MEMTL_INLINE void apply_group(const void* x, void* out, int64_t numel, int64_t g,
                              Floats (&v)[kVectors]) {
  Floats factor[kVectors];
  load_group<kType>(x, numel, g, factor);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) v[i] = mul(factor[i], v[i]);
  store_group<kType>(out, numel, g, v);
}

void activation_grad(DType dtype, const void* x, const uint8_t* codes, const uint16_t* params,
                     int bits, Act act, void* out, int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    const auto use = [&](int64_t g, Floats(&v)[kVectors]) {
      apply_group<kType>(x, out, numel, g, v);
    };
    for_groups<kBits>(codes, params, act, true, first, last, use);
  });
}

void pack_derivative(DType dtype, const void* x, int64_t numel, int bits, Act act, QuantRange range,
                     uint32_t seed, uint8_t* codes, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    const LoadTensor<kType> load{x, numel};
    alignas(64) float slopes[kBatch * kGroup];
    for (int64_t g = first; g < last; g += kBatch) {
      const int count = static_cast<int>(last - g < kBatch ? last - g : kBatch);
      for (int i = 0; i < count; ++i) {
        Floats v[kVectors];
        load(g + i, v);
        MEMTL_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          // As torch's, f' is NaN at the infinities: x + (x - x).
          if (act != Act::hardswish) v[j] = add(v[j], sub(v[j], v[j]));
          store(slopes + i * kGroup + j * kWidth, v[j]);
        }
      }
      over(act, true, slopes, count * kGroup);
      for (int i = 0; i < count; i += kWidth) {
        pack_range_groups<kBits>(load, LoadFloats{slopes, g}, range, seed, g + i,
                                 count - i < kWidth ? count - i : kWidth,
                                 codes + (g + i) * 8 * kBits);
      }
    }
  });
}

void apply_range(DType dtype, const void* x, const uint8_t* codes, int bits, QuantRange range,
                 void* out, int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      Floats v[kVectors];
      decode_range<kBits>(codes, range, g, v);
      apply_group<kType>(x, out, numel, g, v);
    }
  });
}

}  // namespace

const QuantFusedKernels quant_fused = {unpack_affine, unpack_activation, activation_grad,
                                       pack_derivative, apply_range};

}  // namespace memtl::MEMTL_ISA_NS
