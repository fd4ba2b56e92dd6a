// What the top-k kernels share: the bits of a block, and where the set ones are.
#pragma once

#include "common/simd.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;

MEMTL_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MEMTL_INLINE int popcount(uint64_t x) { return __builtin_popcountll(x); }
MEMTL_INLINE int first_bit(uint64_t x) { return __builtin_ctzll(x); }
MEMTL_INLINE uint32_t key_of(float x) { return float_bits(x) & kMagnitude; }

// One bit an element of a block.
struct Bits {
  uint64_t word[4];
};

constexpr Bits kAllBits = {{~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}}};

MEMTL_INLINE int popcount(const Bits& bits) {
  return popcount(bits.word[0]) + popcount(bits.word[1]) + popcount(bits.word[2]) +
         popcount(bits.word[3]);
}

// The lowest `count` set bits of x.
MEMTL_INLINE uint64_t lowest_bits(uint64_t x, int count) {
#if defined(__AVX512F__)  // not with AVX2 alone: pdep is slow on the first Zen processors
  return _pdep_u64(count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}, x);
#else
  uint64_t left = x;
  for (; count > 0 && left; --count) left &= left - 1;
  return x ^ left;
#endif
}

MEMTL_INLINE Bits lowest_bits(const Bits& bits, int64_t count) {
  Bits kept;
  for (int i = 0; i < 4; ++i) {
    const int64_t set = popcount(bits.word[i]);
    kept.word[i] = set <= count ? bits.word[i] : lowest_bits(bits.word[i], static_cast<int>(count));
    count -= min_of(set, count);
  }
  return kept;
}

MEMTL_INLINE Bits unite(const Bits& a, const Bits& b) {
  Bits both;
  for (int i = 0; i < 4; ++i) both.word[i] = a.word[i] | b.word[i];
  return both;
}

#if !defined(__AVX512F__)
// Bytes that are 0 or 1.
MEMTL_INLINE Bits bits_of_bytes(const uint8_t* bytes) {
  Bits bits = {};
#if defined(__AVX2__)
  for (int i = 0; i < 8; ++i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * i));
    const auto set = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(x, 7)));
    bits.word[i / 2] |= static_cast<uint64_t>(set) << (32 * (i % 2));
  }
#else
  for (int i = 0; i < 32; ++i) {
    uint64_t x;
    std::memcpy(&x, bytes + 8 * i, sizeof x);
    bits.word[i / 8] |= (x * 0x0102040810204080u >> 56) << (8 * (i % 8));
  }
#endif
  return bits;
}
#endif

// Short pieces of any length, or none (then either pointer may be null).
MEMTL_INLINE void copy_bytes(void* to, const void* from, int64_t count) {
#if defined(__AVX512F__)  // calling memcpy takes longer
  for (int64_t i = 0; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    _mm512_mask_storeu_epi8(static_cast<char*>(to) + i, mask,
                            _mm512_maskz_loadu_epi8(mask, static_cast<const char*>(from) + i));
  }
#else
  if (count > 0) std::memcpy(to, from, static_cast<size_t>(count));
#endif
}

constexpr int kPadded = kBlock + 64;  // room for whole vectors behind the entries

// The positions of the set bits; returns how many.
MEMTL_INLINE int list_positions(const Bits& bits, uint8_t* positions) {
  int count = 0;
#if defined(__AVX512F__)
  __m512i index = _mm512_set_epi8(63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48,
                                  47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32,
                                  31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16,
                                  15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi8(bits.word[i], index));
    index = _mm512_add_epi8(index, _mm512_set1_epi8(64));
    count += popcount(bits.word[i]);
  }
#else
  for (int i = 0; i < 4; ++i) {
    for (uint64_t left = bits.word[i]; left; left &= left - 1) {
      positions[count++] = static_cast<uint8_t>(64 * i + first_bit(left));
    }
  }
#endif
  return count;
}

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
