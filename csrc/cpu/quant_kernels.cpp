#include "common/simd.h"
#include "quant.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr int kVectors = kGroup / kWidth;  // in a group
constexpr uint16_t kNaN = 0x7fc0;          // bfloat16
constexpr uint32_t kNaNBits = 0x7fc00000;
constexpr float kSmallestScale = 0x1p-126f;
constexpr uint32_t kInfinityBits = 0x7f800000;

template <DType kType>
MEMTL_INLINE void load_group(const void* x, int64_t numel, int64_t group, Floats (&v)[kVectors]) {
  const int64_t begin = group * kGroup;
  if (begin + kGroup <= numel) {
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = load<kType>(x, begin + i * kWidth);
    return;
  }
  float padded[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const int64_t last = numel - 1;
    padded[i] = load_float(kType, x, begin + i < last ? begin + i : last);
  }
  for (int i = 0; i < kVectors; ++i) v[i] = load(padded + i * kWidth);
}

template <DType kType>
MEMTL_INLINE void store_group(void* out, int64_t numel, int64_t group,
                              const Floats (&v)[kVectors]) {
  const int64_t begin = group * kGroup;
  if (begin + kGroup <= numel) {
    MEMTL_UNROLL
    for (int i = 0; i < kVectors; ++i) store<kType>(out, begin + i * kWidth, v[i]);
    return;
  }
  float padded[kGroup];
  for (int i = 0; i < kVectors; ++i) store(padded + i * kWidth, v[i]);
  for (int64_t i = begin; i < numel; ++i) store_float(kType, out, i, padded[i - begin]);
}

// codes [64], each below 2^bits, to 8 * bits bytes: byte i holds codes i, i + 8 * bits, ...
template <int kBits>
MEMTL_INLINE void store_codes(uint8_t* out, const Ints (&codes)[kVectors]) {
  constexpr int kPart = kVectors * kBits / 8;
  MEMTL_UNROLL
  for (int i = 0; i < kPart; ++i) {
    Ints bytes = codes[i];
    if constexpr (kBits == 4) bytes = bit_or(bytes, shift_left<4>(codes[i + kPart]));
    if constexpr (kBits == 2) {
      bytes = bit_or(bytes, shift_left<2>(codes[i + kPart]));
      bytes = bit_or(bytes, shift_left<4>(codes[i + 2 * kPart]));
      bytes = bit_or(bytes, shift_left<6>(codes[i + 3 * kPart]));
    }
    store_bytes(out + i * kWidth, bytes);
  }
}

template <int kBits>
MEMTL_INLINE void load_codes(const uint8_t* in, Ints (&codes)[kVectors]) {
  constexpr int kPart = kVectors * kBits / 8;
  const Ints low = ints((1u << kBits) - 1);
  MEMTL_UNROLL
  for (int i = 0; i < kPart; ++i) {
    const Ints bytes = load_bytes(in + i * kWidth);
    codes[i] = bit_and(bytes, low);
    if constexpr (kBits == 4) codes[i + kPart] = shift_right<4>(bytes);
    if constexpr (kBits == 2) {
      codes[i + kPart] = bit_and(shift_right<2>(bytes), low);
      codes[i + 2 * kPart] = bit_and(shift_right<4>(bytes), low);
      codes[i + 3 * kPart] = shift_right<6>(bytes);
    }
  }
}

MEMTL_INLINE Floats uniform(Ints sixteen_bits) {
  return mul(add(to_floats(sixteen_bits), floats(0.5f)), floats(0x1p-16f));
}

// [64] uniform numbers in (0, 1): a lane's 32-bit hash gives one to it and one to the lane 32 on.
MEMTL_INLINE void dither(uint32_t key, int64_t group, Floats (&out)[kVectors]) {
  constexpr uint32_t kStride = 0x9e3779b1;
  const Ints lane = mul(iota(), ints(kStride));
  const uint32_t start = static_cast<uint32_t>(group * 32) * kStride;
  MEMTL_UNROLL
  for (int i = 0; i < kVectors / 2; ++i) {
    const uint32_t counter = start + static_cast<uint32_t>(i * kWidth) * kStride;
    Ints h = bit_xor(add(lane, ints(counter)), ints(key));
    h = mul(bit_xor(h, shift_right<16>(h)), ints(0x85ebca6b));
    h = mul(bit_xor(h, shift_right<13>(h)), ints(0xc2b2ae35));
    h = bit_xor(h, shift_right<16>(h));
    out[i] = uniform(bit_and(h, ints(0xffff)));
    out[i + kVectors / 2] = uniform(shift_right<16>(h));
  }
}

// Conversions differ in the NaN they make: here all are one.
MEMTL_INLINE uint32_t sum_of_bits(const Floats (&x)[kVectors]) {
  Ints total = ints(0);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    total = add(total, select(is_nan(x[i]), ints(0x7fc00000), as_ints(x[i])));
  }
  return sum(total);
}

// floor((x - offset) / scale + dither), at most top. x is nowhere below offset.
MEMTL_INLINE void quantize(const Floats (&x)[kVectors], float offset, float scale, uint32_t top,
                           uint32_t key, int64_t group, Ints (&codes)[kVectors]) {
  Floats noise[kVectors];
  dither(key, group, noise);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const Floats level = div(sub(x[i], floats(offset)), floats(scale));
    codes[i] = min(truncate(add(level, noise[i])), ints(top));
  }
}

template <DType kType, int kBits>
MEMTL_INLINE void pack_group(const void* x, int64_t numel, uint32_t seed, int64_t group,
                             uint8_t* codes, uint16_t* params) {
  Floats v[kVectors];
  load_group<kType>(x, numel, group, v);
  Floats low = v[0];
  Floats high = v[0];
  Ints magnitude = bit_and(as_ints(v[0]), ints(0x7fffffff));
  MEMTL_UNROLL
  for (int i = 1; i < kVectors; ++i) {
    low = min(low, v[i]);
    high = max(high, v[i]);
    magnitude = max(magnitude, bit_and(as_ints(v[i]), ints(0x7fffffff)));
  }
  constexpr uint32_t kTop = (1u << kBits) - 1;
  // + 0 makes one zero of the two, whichever the minimum came upon.
  const float offset = bfloat16_down(lowest(low)) + 0.0f;
  const float step = bfloat16_up((highest(high) - offset) / static_cast<float>(kTop));
  const float scale = step < kSmallestScale ? kSmallestScale : step;
  // Where the highest level is beyond float32, so is what is near it.
  const float reach = offset + static_cast<float>(kTop) * scale;
  if (highest(magnitude) >= kInfinityBits || (float_bits(reach) & 0x7fffffff) >= kInfinityBits) {
    std::memset(codes, 0, 8 * kBits);
    params[0] = params[1] = kNaN;
    return;
  }
  Ints levels[kVectors];
  quantize(v, offset, scale, kTop, seed + sum_of_bits(v), group, levels);
  store_codes<kBits>(codes, levels);
  params[0] = static_cast<uint16_t>(float_bits(scale) >> 16);
  params[1] = static_cast<uint16_t>(float_bits(offset) >> 16);
}

template <DType kType, int kBits>
MEMTL_INLINE void pack_range_group(const void* x, int64_t numel, QuantRange range, uint32_t seed,
                                   int64_t group, uint8_t* codes) {
  Floats v[kVectors];
  load_group<kType>(x, numel, group, v);
  Floats clamped[kVectors];
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    clamped[i] = min(max(v[i], floats(range.lo)), floats(range.hi));
  }
  constexpr uint32_t kForNaN = (1u << kBits) - 1;
  Ints levels[kVectors];
  quantize(clamped, range.lo, range.step, kForNaN - 1, seed + sum_of_bits(v), group, levels);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    levels[i] = select(is_nan(v[i]), ints(kForNaN), levels[i]);
  }
  store_codes<kBits>(codes, levels);
}

// Calls f with the dtype and the bits as template arguments.
template <DType kType, class F>
MEMTL_INLINE void with_bits(int bits, const F& f) {
  if (bits == 8) return f.template operator()<kType, 8>();
  if (bits == 4) return f.template operator()<kType, 4>();
  return f.template operator()<kType, 2>();
}

template <class F>
MEMTL_INLINE void dispatch(DType dtype, int bits, const F& f) {
  switch (dtype) {
    case DType::f64:
      return with_bits<DType::f64>(bits, f);
    case DType::bf16:
      return with_bits<DType::bf16>(bits, f);
    case DType::f16:
      return with_bits<DType::f16>(bits, f);
    default:
      return with_bits<DType::f32>(bits, f);
  }
}

void pack(DType dtype, const void* x, int64_t numel, int bits, uint32_t seed, uint8_t* codes,
          uint16_t* params, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      pack_group<kType, kBits>(x, numel, seed, g, codes + g * 8 * kBits, params + 2 * g);
    }
  });
}

void unpack(DType dtype, const uint8_t* codes, const uint16_t* params, int bits, void* out,
            int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      const Floats scale = floats(bfloat16_to_float(params[2 * g]));
      const Floats offset = floats(bfloat16_to_float(params[2 * g + 1]));
      Ints levels[kVectors];
      load_codes<kBits>(codes + g * 8 * kBits, levels);
      Floats v[kVectors];
      MEMTL_UNROLL
      for (int i = 0; i < kVectors; ++i) v[i] = add(mul(to_floats(levels[i]), scale), offset);
      store_group<kType>(out, numel, g, v);
    }
  });
}

void pack_range(DType dtype, const void* x, int64_t numel, int bits, QuantRange range,
                uint32_t seed, uint8_t* codes, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    for (int64_t g = first; g < last; ++g) {
      pack_range_group<kType, kBits>(x, numel, range, seed, g, codes + g * 8 * kBits);
    }
  });
}

void unpack_range(DType dtype, const uint8_t* codes, int bits, QuantRange range, void* out,
                  int64_t numel, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    const Ints for_nan = ints((1u << kBits) - 1);
    for (int64_t g = first; g < last; ++g) {
      Ints levels[kVectors];
      load_codes<kBits>(codes + g * 8 * kBits, levels);
      Floats v[kVectors];
      MEMTL_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const Floats x = add(mul(to_floats(levels[i]), floats(range.step)), floats(range.lo));
        v[i] = select(equal(levels[i], for_nan), floats(bits_float(kNaNBits)), x);
      }
      store_group<kType>(out, numel, g, v);
    }
  });
}

}  // namespace

const QuantKernels quant = {pack, unpack, pack_range, unpack_range};

}  // namespace memtl::MEMTL_ISA_NS
