#include "quant.h"
#include "quant_codes.h"
#include "quant_rounding.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr uint16_t kNaN = 0x7fc0;  // bfloat16
constexpr float kSmallestScale = 0x1p-126f;
constexpr int64_t kBatch = 16;  // groups that are normalised at a time

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
      const LoadTensor<kType> load{x, numel};
      pack_range_groups<kBits>(load, load, range, seed, g, count, codes + g * 8 * kBits);
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
