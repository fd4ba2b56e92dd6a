// The layouts and number formats every native part shares. No torch, no CUDA.
//
// Everything here has internal linkage: a kernel file compiled for AVX-512 must not leave behind a
// shared copy of a function that portable code could be linked against.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define MEMTL_INLINE static inline __attribute__((always_inline)) __host__ __device__
#else
#define MEMTL_INLINE static inline __attribute__((always_inline))
#endif

namespace memtl {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed layouts are little-endian");

constexpr int kBlock = 256;  // elements in a top-k block
constexpr int kGroup = 64;   // elements in a quantisation group

enum class DType { f32, f64, bf16, f16, i8 };

MEMTL_INLINE constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
}

MEMTL_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

MEMTL_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MEMTL_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MEMTL_INLINE float bfloat16_to_float(uint16_t x) {
  return bits_float(static_cast<uint32_t>(x) << 16);
}

// Rounds to the nearest, ties to even; NaN becomes 0x7fc0.
MEMTL_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// The largest bfloat16 value not above x and the smallest one not below it, as float; no NaN.
MEMTL_INLINE float bfloat16_down(float x) {
  const uint32_t bits = float_bits(x);
  return bits_float((bits + (bits >> 31) * 0xffff) & 0xffff0000);
}

MEMTL_INLINE float bfloat16_up(float x) { return -bfloat16_down(-x); }

// The same results as the instructions of F16C, for machines without them.
MEMTL_INLINE float half_to_float_portable(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t shifted = (x & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000;
  uint32_t bits = shifted + ((127 - 15) << 23);
  if (exponent == 0x0f800000) {  // infinity, NaN (made quiet)
    bits += (128 - 16) << 23;
    if (shifted & 0x007fffff) bits |= 0x00400000;
  } else if (exponent == 0) {  // zero, subnormal
    bits = float_bits(bits_float(bits + (1 << 23)) - bits_float(113 << 23));
  }
  return bits_float(bits | sign);
}

MEMTL_INLINE uint16_t float_to_half_portable(float x) {
  const uint32_t sign = float_bits(x) & 0x80000000;
  const uint32_t bits = float_bits(x) ^ sign;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | ((bits >> 13) & 0x3ff);
  } else if (bits >= (143u << 23)) {
    half = 0x7c00;
  } else if (bits < (113u << 23)) {  // becomes subnormal: let the adder round at bit 2^-24
    const uint32_t magic = 126u << 23;
    half = float_bits(bits_float(bits) + bits_float(magic)) - magic;
  } else {
    half = (bits - ((127u - 15u) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(half | (sign >> 16));
}

MEMTL_INLINE float half_to_float(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  return half_to_float_portable(x);
#endif
}

MEMTL_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  return float_to_half_portable(x);
#endif
}

// Element i of an array of a floating dtype.
MEMTL_INLINE float load_float(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    case DType::bf16:
      return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::f16:
      return half_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

MEMTL_INLINE void store_float(DType dtype, void* data, int64_t i, float x) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[i] = x;
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[i] = float_to_bfloat16(x);
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[i] = float_to_half(x);
      break;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

// MurmurHash3's 32-bit finaliser.
MEMTL_INLINE uint32_t fmix32(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

}  // namespace memtl
