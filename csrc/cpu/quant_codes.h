// Reading and writing groups of codes: what the kernels of quant and those fused with them share.
#pragma once

#include "common/simd.h"
#include "quant.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr int kVectors = kGroup / kWidth;  // in a group
constexpr uint32_t kNaNBits = 0x7fc00000;

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

// 3 bits, below.
MEMTL_INLINE void store_three(uint8_t* out, const Ints (&codes)[kVectors]);
MEMTL_INLINE void load_three(const uint8_t* in, Ints (&codes)[kVectors]);

// codes [64], each below 2^bits, to 8 * bits bytes: byte i holds codes i, i + 8 * bits, ...
template <int kBits>
MEMTL_INLINE void store_codes(uint8_t* out, const Ints (&codes)[kVectors]) {
  if constexpr (kBits == 3) return store_three(out, codes);
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
  if constexpr (kBits == 3) return load_three(in, codes);
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

// 3 bits: the low two as above in 16 bytes, then the third of all, one bit an element.
constexpr int kThird = 16;

#if defined(__AVX2__)
MEMTL_INLINE void store_three(uint8_t* out, const Ints (&codes)[kVectors]) {
  Ints low[kVectors];
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    low[i] = bit_and(codes[i], ints(3));
    store_bits(out + kThird + i * kWidth / 8, greater(codes[i], ints(3)));
  }
  store_codes<2>(out, low);
}

MEMTL_INLINE void load_three(const uint8_t* in, Ints (&codes)[kVectors]) {
  load_codes<2>(in, codes);
  const Ints by = add(iota(), ints(30 - kWidth));  // in a word that ends with a vector's bits
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    uint32_t word;
    std::memcpy(&word, in + kThird + (i + 1) * kWidth / 8 - 4, sizeof word);
    codes[i] = bit_or(codes[i], bit_and(shift_right(ints(word), by), ints(4)));
  }
}
#else
constexpr uint64_t kOnes = 0x0101010101010101;  // times a byte: 8 of it

// 8 codes a word, one a byte.
MEMTL_INLINE void store_three(uint8_t* out, const Ints (&codes)[kVectors]) {
  uint8_t bytes[kGroup];
  for (int i = 0; i < kGroup; ++i) bytes[i] = static_cast<uint8_t>(codes[i]);
  uint64_t word[kGroup / 8], low[2] = {};
  std::memcpy(word, bytes, sizeof word);
  for (int i = 0; i < kGroup / 8; ++i) {
    low[i % 2] |= (word[i] & 3 * kOnes) << (i / 2 * 2);
    out[kThird + i] = static_cast<uint8_t>(((word[i] >> 2 & kOnes) * 0x0102040810204080u) >> 56);
  }
  std::memcpy(out, low, sizeof low);
}

// 16 codes at a time, in vectors of the compiler's: it does not find them in a loop.
MEMTL_INLINE void load_three(const uint8_t* in, Ints (&codes)[kVectors]) {
  using Words = uint64_t __attribute__((vector_size(16)));
  using Bytes = uint8_t __attribute__((vector_size(16)));
  const Words each_bit = {0x8040201008040201, 0x8040201008040201};
  uint8_t bytes[kGroup];
  for (int i = 0; i < 4; ++i) {
    Bytes low;
    std::memcpy(&low, in, sizeof low);
    const uint8_t* third = in + kThird + 2 * i;
    const Words bits = Words{third[0] * kOnes, third[1] * kOnes} & each_bit;
    const Bytes four = reinterpret_cast<Bytes>(reinterpret_cast<Bytes>(bits) != 0) & 4;
    const Bytes code = (low >> static_cast<uint8_t>(2 * i) & 3) | four;
    std::memcpy(bytes + 16 * i, &code, sizeof code);
  }
  for (int i = 0; i < kGroup; ++i) codes[i] = bytes[i];
}
#endif

// Group g: code * scale + offset.
template <int kBits>
MEMTL_INLINE void decode(const uint8_t* codes, const uint16_t* params, int64_t g,
                         Floats (&v)[kVectors]) {
  const Floats scale = floats(bfloat16_to_float(params[2 * g]));
  const Floats offset = floats(bfloat16_to_float(params[2 * g + 1]));
  Ints levels[kVectors];
  load_codes<kBits>(codes + g * 8 * kBits, levels);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) v[i] = add(mul(to_floats(levels[i]), scale), offset);
}

// Group g on a fixed range; the last code is NaN.
template <int kBits>
MEMTL_INLINE void decode_range(const uint8_t* codes, QuantRange range, int64_t g,
                               Floats (&v)[kVectors]) {
  const Ints for_nan = ints((1u << kBits) - 1);
  Ints levels[kVectors];
  load_codes<kBits>(codes + g * 8 * kBits, levels);
  MEMTL_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const Floats x = add(mul(to_floats(levels[i]), floats(range.step)), floats(range.lo));
    v[i] = select(equal(levels[i], for_nan), floats(bits_float(kNaNBits)), x);
  }
}

// Calls f with the dtype and the bits as template arguments.
template <DType kType, class F>
MEMTL_INLINE void with_bits(int bits, const F& f) {
  if (bits == 8) return f.template operator()<kType, 8>();
  if (bits == 4) return f.template operator()<kType, 4>();
  if (bits == 3) return f.template operator()<kType, 3>();
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

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
