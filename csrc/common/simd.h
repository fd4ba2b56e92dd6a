// The few vector operations the kernels are written in, once for every instruction set.
//
// A kernel file is compiled once per instruction set, with MEMTL_ISA_NS naming its namespace; what
// stands here lives in that namespace, so that no two of them can be mixed up by the linker. Floats
// holds kWidth floats, Ints as many 32-bit integers, Mask one truth value each. In portable code
// the width is one and the compiler vectorises the loops over a group itself.
#pragma once

#include "common/layout.h"

#if defined(__AVX2__)
#include <immintrin.h>
#define MEMTL_UNROLL _Pragma("GCC unroll 16")
#else
#define MEMTL_UNROLL
#endif

// `call` with the dtype as the constant kType.
#define MEMTL_FOR_DTYPE(dtype, call)       \
  switch (dtype) {                         \
    case DType::f64: {                     \
      constexpr DType kType = DType::f64;  \
      return call;                         \
    }                                      \
    case DType::bf16: {                    \
      constexpr DType kType = DType::bf16; \
      return call;                         \
    }                                      \
    case DType::f16: {                     \
      constexpr DType kType = DType::f16;  \
      return call;                         \
    }                                      \
    default: {                             \
      constexpr DType kType = DType::f32;  \
      return call;                         \
    }                                      \
  }

namespace memtl::MEMTL_ISA_NS {

#if defined(__AVX512F__)

constexpr int kWidth = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

MEMTL_INLINE Floats floats(float x) { return _mm512_set1_ps(x); }
MEMTL_INLINE Ints ints(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
MEMTL_INLINE Ints iota() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

MEMTL_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
MEMTL_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
MEMTL_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MEMTL_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// Of a NaN in a and a number in b, the number.
MEMTL_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
MEMTL_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

MEMTL_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
MEMTL_INLINE Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
MEMTL_INLINE Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
MEMTL_INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
MEMTL_INLINE Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
MEMTL_INLINE Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
MEMTL_INLINE Ints max(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
MEMTL_INLINE Ints min(Ints a, Ints b) { return _mm512_min_epu32(a, b); }
template <int kBy>
MEMTL_INLINE Ints shift_left(Ints a) {
  return _mm512_slli_epi32(a, kBy);
}
template <int kBy>
MEMTL_INLINE Ints shift_right(Ints a) {
  return _mm512_srli_epi32(a, kBy);
}
MEMTL_INLINE Ints shift_right(Ints a, Ints by) { return _mm512_srlv_epi32(a, by); }

MEMTL_INLINE Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
MEMTL_INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
MEMTL_INLINE Ints truncate(Floats a) { return _mm512_cvttps_epi32(a); }
MEMTL_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }

MEMTL_INLINE Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
MEMTL_INLINE Mask greater(Ints a, Ints b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed
MEMTL_INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
MEMTL_INLINE Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
MEMTL_INLINE bool any(Mask a) { return a != 0; }
MEMTL_INLINE Mask mask_of_bits(const uint8_t* bits) {
  uint16_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  return mask;
}
MEMTL_INLINE void store_bits(uint8_t* bits, Mask mask) { std::memcpy(bits, &mask, sizeof mask); }
MEMTL_INLINE Ints select(Mask mask, Ints yes, Ints no) {
  return _mm512_mask_blend_epi32(mask, no, yes);
}
MEMTL_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}

MEMTL_INLINE uint32_t highest(Ints a) { return _mm512_reduce_max_epu32(a); }
// Lane i of the result is `op` over the lanes of a[i]; a is used up.
template <class Op>
MEMTL_INLINE Floats reduce_each(Floats (&a)[kWidth], const Op& op) {
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 2) {
    a[i] = op(_mm512_unpacklo_ps(a[i], a[i + 1]), _mm512_unpackhi_ps(a[i], a[i + 1]));
  }
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(a[i]), q = _mm512_castps_pd(a[i + 2]);
    a[i] =
        op(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  MEMTL_UNROLL
  for (int step = 4; step < 16; step *= 2) {
    MEMTL_UNROLL
    for (int i = 0; i < 16; i += 2 * step) {
      a[i] = op(_mm512_shuffle_f32x4(a[i], a[i + step], 0x88),
                _mm512_shuffle_f32x4(a[i], a[i + step], 0xdd));
    }
  }
  return a[0];
}

MEMTL_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
MEMTL_INLINE Ints load(const uint32_t* p) { return _mm512_loadu_si512(p); }
MEMTL_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
MEMTL_INLINE void store(uint32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
MEMTL_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
// The first `count` lanes, or bytes, or all. (bzhi sees 8 bits of a count.)
MEMTL_INLINE Mask first_lanes(int64_t count) {
  return static_cast<Mask>(_bzhi_u32(0xffff, static_cast<unsigned>(count < 16 ? count : 16)));
}
MEMTL_INLINE __mmask64 first_bytes(int64_t count) {
  return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count < 64 ? count : 64));
}
// The first `count` bytes, or all.
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a, int count) {
  _mm_mask_storeu_epi8(p, first_lanes(count), _mm512_cvtepi32_epi8(a));
}
MEMTL_INLINE Floats load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
MEMTL_INLINE void store_shorts(uint16_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
}
MEMTL_INLINE Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MEMTL_INLINE void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
MEMTL_INLINE Floats load_double(const double* p) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8)),
                            1);
}
MEMTL_INLINE void store_double(double* p, Floats a) {
  _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
  _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
}

// A table of kEntries numbers, looked up by lane. (16 are read.)
template <int kEntries>
struct Lookup {
  Floats entries;
  inline __attribute__((always_inline)) explicit Lookup(const float* p) : entries(load(p)) {}
  inline __attribute__((always_inline)) Floats operator()(Ints i) const {
    return _mm512_permutexvar_ps(i, entries);
  }
};

#elif defined(__AVX2__)

constexpr int kWidth = 8;
using Floats = __m256;
using Ints = __m256i;
struct Mask {
  __m256i lanes;
};

MEMTL_INLINE Floats floats(float x) { return _mm256_set1_ps(x); }
MEMTL_INLINE Ints ints(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
MEMTL_INLINE Ints iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

MEMTL_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
MEMTL_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
MEMTL_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
MEMTL_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
MEMTL_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
MEMTL_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }

MEMTL_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
MEMTL_INLINE Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
MEMTL_INLINE Ints mul(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
MEMTL_INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
MEMTL_INLINE Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
MEMTL_INLINE Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
MEMTL_INLINE Ints max(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
MEMTL_INLINE Ints min(Ints a, Ints b) { return _mm256_min_epu32(a, b); }
template <int kBy>
MEMTL_INLINE Ints shift_left(Ints a) {
  return _mm256_slli_epi32(a, kBy);
}
template <int kBy>
MEMTL_INLINE Ints shift_right(Ints a) {
  return _mm256_srli_epi32(a, kBy);
}
MEMTL_INLINE Ints shift_right(Ints a, Ints by) { return _mm256_srlv_epi32(a, by); }

MEMTL_INLINE Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
MEMTL_INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
MEMTL_INLINE Ints truncate(Floats a) { return _mm256_cvttps_epi32(a); }
MEMTL_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }

MEMTL_INLINE Mask equal(Ints a, Ints b) { return {_mm256_cmpeq_epi32(a, b)}; }
MEMTL_INLINE Mask greater(Ints a, Ints b) { return {_mm256_cmpgt_epi32(a, b)}; }  // signed
MEMTL_INLINE Mask less(Floats a, Floats b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ))};
}
MEMTL_INLINE Mask is_nan(Floats a) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q))};
}
MEMTL_INLINE bool any(Mask a) { return !_mm256_testz_si256(a.lanes, a.lanes); }
MEMTL_INLINE Mask mask_of_bits(const uint8_t* bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), bit), bit)};
}
MEMTL_INLINE void store_bits(uint8_t* bits, Mask mask) {
  *bits = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask.lanes)));
}
MEMTL_INLINE Ints select(Mask mask, Ints yes, Ints no) {
  return _mm256_blendv_epi8(no, yes, mask.lanes);
}
MEMTL_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(mask.lanes));
}

MEMTL_INLINE uint32_t highest(Ints a) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}
template <class Op>
MEMTL_INLINE Floats reduce_each(Floats (&a)[kWidth], const Op& op) {
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 2) {
    a[i] = op(_mm256_unpacklo_ps(a[i], a[i + 1]), _mm256_unpackhi_ps(a[i], a[i + 1]));
  }
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 4) {
    const __m256d p = _mm256_castps_pd(a[i]), q = _mm256_castps_pd(a[i + 2]);
    a[i] =
        op(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)), _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
  }
  return op(_mm256_permute2f128_ps(a[0], a[4], 0x20), _mm256_permute2f128_ps(a[0], a[4], 0x31));
}

MEMTL_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
MEMTL_INLINE Ints load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MEMTL_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
MEMTL_INLINE void store(uint32_t* p, Ints a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
MEMTL_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
MEMTL_INLINE __m128i narrow(Ints a) {  // 32 to 16 bits; the values fit
  return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a) {
  const __m128i shorts = narrow(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
}
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a, int count) {
  if (count >= kWidth) return store_bytes(p, a);
  uint8_t bytes[kWidth];
  store_bytes(bytes, a);
  for (int i = 0; i < count; ++i) p[i] = bytes[i];
}
MEMTL_INLINE Floats load_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
MEMTL_INLINE void store_shorts(uint16_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a));
}
MEMTL_INLINE Floats load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MEMTL_INLINE void store_half(uint16_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
MEMTL_INLINE Floats load_double(const double* p) {
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)),
                         _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
}
MEMTL_INLINE void store_double(double* p, Floats a) {
  _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
  _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}

template <int kEntries>
struct Lookup {
  Floats low, high;
  inline __attribute__((always_inline)) explicit Lookup(const float* p)
      : low(load(p)), high(load(p + 8)) {}
  inline __attribute__((always_inline)) Floats operator()(Ints i) const {
    const Floats below = _mm256_permutevar8x32_ps(low, i);
    if constexpr (kEntries <= 8) return below;
    return select(greater(i, ints(7)), _mm256_permutevar8x32_ps(high, i), below);
  }
};

#else

constexpr int kWidth = 1;
using Floats = float;
using Ints = uint32_t;
using Mask = bool;

MEMTL_INLINE Floats floats(float x) { return x; }
MEMTL_INLINE Ints ints(uint32_t x) { return x; }
MEMTL_INLINE Ints iota() { return 0; }

MEMTL_INLINE Floats add(Floats a, Floats b) { return a + b; }
MEMTL_INLINE Floats sub(Floats a, Floats b) { return a - b; }
MEMTL_INLINE Floats mul(Floats a, Floats b) { return a * b; }
MEMTL_INLINE Floats div(Floats a, Floats b) { return a / b; }
MEMTL_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
MEMTL_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

MEMTL_INLINE Ints add(Ints a, Ints b) { return a + b; }
MEMTL_INLINE Ints sub(Ints a, Ints b) { return a - b; }
MEMTL_INLINE Ints mul(Ints a, Ints b) { return a * b; }
MEMTL_INLINE Ints bit_and(Ints a, Ints b) { return a & b; }
MEMTL_INLINE Ints bit_or(Ints a, Ints b) { return a | b; }
MEMTL_INLINE Ints bit_xor(Ints a, Ints b) { return a ^ b; }
MEMTL_INLINE Ints max(Ints a, Ints b) { return a > b ? a : b; }
MEMTL_INLINE Ints min(Ints a, Ints b) { return a < b ? a : b; }
template <int kBy>
MEMTL_INLINE Ints shift_left(Ints a) {
  return a << kBy;
}
template <int kBy>
MEMTL_INLINE Ints shift_right(Ints a) {
  return a >> kBy;
}

MEMTL_INLINE Ints as_ints(Floats a) { return float_bits(a); }
MEMTL_INLINE Floats as_floats(Ints a) { return bits_float(a); }
MEMTL_INLINE Ints truncate(Floats a) { return static_cast<Ints>(static_cast<int32_t>(a)); }
MEMTL_INLINE Floats to_floats(Ints a) { return static_cast<Floats>(static_cast<int32_t>(a)); }

MEMTL_INLINE Mask equal(Ints a, Ints b) { return a == b; }
MEMTL_INLINE Mask greater(Ints a, Ints b) {  // signed
  return static_cast<int32_t>(a) > static_cast<int32_t>(b);
}
MEMTL_INLINE Mask less(Floats a, Floats b) { return a < b; }
MEMTL_INLINE Mask is_nan(Floats a) { return a != a; }
MEMTL_INLINE bool any(Mask a) { return a; }
MEMTL_INLINE Ints select(Mask mask, Ints yes, Ints no) { return mask ? yes : no; }
MEMTL_INLINE Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }

MEMTL_INLINE uint32_t highest(Ints a) { return a; }
template <class Op>
MEMTL_INLINE Floats reduce_each(Floats (&a)[kWidth], const Op&) {
  return a[0];
}

MEMTL_INLINE Floats load(const float* p) { return *p; }
MEMTL_INLINE Ints load(const uint32_t* p) { return *p; }
MEMTL_INLINE void store(float* p, Floats a) { *p = a; }
MEMTL_INLINE void store(uint32_t* p, Ints a) { *p = a; }
MEMTL_INLINE Ints load_bytes(const uint8_t* p) { return *p; }
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a) { *p = static_cast<uint8_t>(a); }
MEMTL_INLINE void store_bytes(uint8_t* p, Ints a, int) { store_bytes(p, a); }
MEMTL_INLINE Floats load_bfloat16(const uint16_t* p) { return bfloat16_to_float(*p); }
MEMTL_INLINE void store_shorts(uint16_t* p, Ints a) { *p = static_cast<uint16_t>(a); }
MEMTL_INLINE Floats load_half(const uint16_t* p) { return half_to_float(*p); }
MEMTL_INLINE void store_half(uint16_t* p, Floats a) { *p = float_to_half(a); }
MEMTL_INLINE Floats load_double(const double* p) { return static_cast<float>(*p); }
MEMTL_INLINE void store_double(double* p, Floats a) { *p = a; }

template <int kEntries>
struct Lookup {
  const float* entries;
  inline __attribute__((always_inline)) explicit Lookup(const float* p) : entries(p) {}
  inline __attribute__((always_inline)) Floats operator()(Ints i) const { return entries[i]; }
};

#endif

// Rounds to the nearest, ties to even; NaN becomes 0x7fc0.
MEMTL_INLINE void store_bfloat16(uint16_t* p, Floats a) {
  const Ints bits = as_ints(a);
  const Ints odd = bit_and(shift_right<16>(bits), ints(1));
  const Ints rounded = shift_right<16>(add(bits, add(odd, ints(0x7fff))));
  store_shorts(p, select(is_nan(a), ints(0x7fc0), rounded));
}

// kWidth elements of a dtype known at compile time, from element i on.
template <DType kType>
MEMTL_INLINE Floats load(const void* data, int64_t i) {
  if constexpr (kType == DType::f64) return load_double(static_cast<const double*>(data) + i);
  if constexpr (kType == DType::bf16) return load_bfloat16(static_cast<const uint16_t*>(data) + i);
  if constexpr (kType == DType::f16) return load_half(static_cast<const uint16_t*>(data) + i);
  if constexpr (kType == DType::f32) return load(static_cast<const float*>(data) + i);
}

template <DType kType>
MEMTL_INLINE void store(void* data, int64_t i, Floats a) {
  if constexpr (kType == DType::f64) store_double(static_cast<double*>(data) + i, a);
  if constexpr (kType == DType::bf16) store_bfloat16(static_cast<uint16_t*>(data) + i, a);
  if constexpr (kType == DType::f16) store_half(static_cast<uint16_t*>(data) + i, a);
  if constexpr (kType == DType::f32) store(static_cast<float*>(data) + i, a);
}

}  // namespace memtl::MEMTL_ISA_NS
