// The k largest magnitudes of blocks of 256.
//
// They are found by counting: how many of 256 16-bit keys are above a threshold takes 8 comparisons
// with AVX-512. A key is what a window shows of the bits of |x|; neighbouring blocks have
// thresholds near each other, so a window about the last ones is fine enough to tell nearly all
// elements apart. The searches of several blocks take turns, so that none waits for its own last
// count.
#pragma once

#include <cstdlib>

#include "topk_block.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// key = (bits of |x| - base) >> shift, between 0 and 0xffff
struct Window {
  int32_t base;
  int shift;
};

constexpr int kLastKey = 0xffff;
constexpr Window kWhole = {0, 15};  // every number; the lower 15 bits are not seen

// The finest window that shows eight octaves or, where the last bits of a dtype are always zero in
// float32, all others.
template <DType kType>
constexpr int kFineShift = kType == DType::bf16  ? kWhole.shift
                           : kType == DType::f16 ? 13
                                                 : 8;

#if defined(__AVX512F__)

struct Keys {
  __m512i words[8];  // element order within a word: see `bits_above`
};

MEMTL_INLINE Keys keys_of(const float* block, Window window) {
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  const __m512i base = _mm512_set1_epi32(window.base), shift = _mm512_set1_epi32(window.shift);
  const auto shown = [&](int i) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(block + 16 * i), magnitude);
    return _mm512_srav_epi32(_mm512_sub_epi32(bits, base), shift);
  };
  Keys keys;
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) keys.words[i] = _mm512_packus_epi32(shown(2 * i), shown(2 * i + 1));
  return keys;
}

MEMTL_INLINE int count_above(const Keys& keys, int threshold) {
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  int count = 0;
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    count += __builtin_popcount(_mm512_cmpgt_epu16_mask(keys.words[i], t));
  }
  return count;
}

// packus put elements 0-3, 16-19, 4-7, 20-23, ... next to each other.
MEMTL_INLINE uint64_t in_order(uint32_t packed) {
  return _pext_u32(packed, 0x0f0f0f0f) | _pext_u32(packed, 0xf0f0f0f0) << 16;
}

MEMTL_INLINE Bits bits_above(const Keys& keys, int threshold) {
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  Bits bits;
  MEMTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    bits.word[i] = in_order(_mm512_cmpgt_epu16_mask(keys.words[2 * i], t)) |
                   in_order(_mm512_cmpgt_epu16_mask(keys.words[2 * i + 1], t)) << 32;
  }
  return bits;
}

#elif defined(__AVX2__)

constexpr int kBias = 0x8000;  // makes an unsigned comparison of a signed one

struct Keys {
  __m256i words[16];  // element order within a word: see `bits_above`
};

MEMTL_INLINE Keys keys_of(const float* block, Window window) {
  const __m256i magnitude = _mm256_set1_epi32(kMagnitude);
  const __m256i base = _mm256_set1_epi32(window.base);
  const __m128i shift = _mm_cvtsi32_si128(window.shift);
  const __m256i bias = _mm256_set1_epi16(static_cast<int16_t>(kBias));
  const auto shown = [&](int i) {
    const __m256i bits = _mm256_and_si256(as_ints(load(block + 8 * i)), magnitude);
    return _mm256_sra_epi32(_mm256_sub_epi32(bits, base), shift);
  };
  Keys keys;
  MEMTL_UNROLL
  for (int i = 0; i < 16; ++i) {
    keys.words[i] = _mm256_xor_si256(_mm256_packus_epi32(shown(2 * i), shown(2 * i + 1)), bias);
  }
  return keys;
}

MEMTL_INLINE int count_above(const Keys& keys, int threshold) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold ^ kBias));
  __m256i even = _mm256_setzero_si256(), odd = even;
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 2) {
    even = _mm256_sub_epi16(even, _mm256_cmpgt_epi16(keys.words[i], t));
    odd = _mm256_sub_epi16(odd, _mm256_cmpgt_epi16(keys.words[i + 1], t));
  }
  // Every word is at most 16: as bytes they can be summed by one instruction.
  const __m256i sums = _mm256_sad_epu8(_mm256_add_epi16(even, odd), _mm256_setzero_si256());
  const __m128i half =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2);
}

MEMTL_INLINE Bits bits_above(const Keys& keys, int threshold) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold ^ kBias));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  Bits bits = {};
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    // packus and packs each put elements 0-3, 8-11, 16-19, 24-27, 4-7, ... next to each other.
    const __m256i above = _mm256_packs_epi16(_mm256_cmpgt_epi16(keys.words[2 * i], t),
                                             _mm256_cmpgt_epi16(keys.words[2 * i + 1], t));
    const auto set =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(above, order)));
    bits.word[i / 2] |= static_cast<uint64_t>(set) << (32 * (i % 2));
  }
  return bits;
}

#else

struct Keys {
  alignas(64) int16_t key[kBlock];  // less 0x8000: signed numbers are quicker to compare
};

MEMTL_INLINE Keys keys_of(const float* block, Window window) {
  Keys keys;
  for (int i = 0; i < kBlock; ++i) {
    const auto bits = static_cast<int32_t>(key_of(block[i]));
    int32_t key = ((bits - window.base) >> window.shift) - 0x8000;
    key = key < -0x8000 ? -0x8000 : key;
    keys.key[i] = static_cast<int16_t>(key > 0x7fff ? 0x7fff : key);
  }
  return keys;
}

MEMTL_INLINE int count_above(const Keys& keys, int threshold) {
  const auto t = static_cast<int16_t>(threshold - 0x8000);
  int16_t count = 0;
  for (int i = 0; i < kBlock; ++i) count = static_cast<int16_t>(count + (keys.key[i] > t));
  return count;
}

MEMTL_INLINE Bits bits_above(const Keys& keys, int threshold) {
  const auto t = static_cast<int16_t>(threshold - 0x8000);
  alignas(64) uint8_t above[kBlock];
  for (int i = 0; i < kBlock; ++i) above[i] = keys.key[i] > t;
  return bits_of_bytes(above);
}

#endif

struct Cut {
  int threshold;
  bool exact;  // just k are above it; else it is the key of the k-th
};

constexpr int kTogether = 16;  // blocks

// Blocks whose cuts are searched together, with k > 0.
struct Searches {
  int count;
  const float* x[kTogether];
  int k[kTogether];
  Window window[kTogether];
  int guess[kTogether];  // where to start
  Keys keys[kTogether];
  Cut cut[kTogether];
};

// Finds keys and cuts. `spacing` is about what lies between the keys of two neighbouring elements
// at the cut, and is measured anew.
void find_cuts(Searches& searches, float* spacing) {
  constexpr int kInterpolated = 6;  // rounds, before the middle is taken
  // Of every block: above lo there are more than k keys (or all), above hi fewer, `over` above
  // `at`.
  alignas(64) uint32_t wanted[kTogether], at[kTogether], over[kTogether], missed[kTogether];
  alignas(64) uint32_t lo[kTogether], over_lo[kTogether], hi[kTogether], over_hi[kTogether];
  alignas(64) uint32_t open[kTogether];
  int blocks[kTogether];  // whose search goes on
  int left = searches.count;
  for (int i = 0; i < kTogether; ++i) {
    const bool used = i < left;
    if (used) searches.keys[i] = keys_of(searches.x[i], searches.window[i]);
    wanted[i] = over[i] = static_cast<uint32_t>(used ? searches.k[i] : 0);
    at[i] = static_cast<uint32_t>(used ? searches.guess[i] : 0);
    lo[i] = ~0u;
    over_lo[i] = kBlock;
    hi[i] = kLastKey;
    over_hi[i] = missed[i] = 0;
    blocks[i] = i;
  }
  for (int round = 0; left > 0; ++round) {
    for (int i = 0; i < left; ++i) {
      const int block = blocks[i], threshold = static_cast<int>(at[block]);
      over[block] = static_cast<uint32_t>(count_above(searches.keys[block], threshold));
    }
    const float far = (*spacing + 1) * static_cast<float>(1 << (round < 16 ? round : 16));
    const Ints step = ints(static_cast<uint32_t>(far < kLastKey ? far : kLastKey));
    const Mask halve = greater(ints(static_cast<uint32_t>(round)), ints(kInterpolated - 1));
    for (int i = 0; i < kTogether; i += kWidth) {
      const Ints extra = sub(load(over + i), load(wanted + i)), last = load(at + i);
      const Mask more = greater(extra, ints(0)), fewer = greater(ints(0), extra);
      const Ints low = select(more, last, load(lo + i)), high = select(fewer, last, load(hi + i));
      const Ints over_low = select(more, load(over + i), load(over_lo + i));
      const Ints over_high = select(fewer, load(over + i), load(over_hi + i));
      const Ints width = sub(high, low);
      const Floats share = div(add(to_floats(sub(over_low, load(wanted + i))), floats(0.5f)),
                               add(to_floats(sub(over_low, over_high)), floats(1)));
      const Ints between = add(low, truncate(mul(to_floats(width), share)));
      const Ints away = add(last, mul(extra, step));
      Ints next = select(greater(low, ints(~0u)), between, away);
      next = select(greater(ints(kLastKey), high), next, away);
      next = select(halve, add(low, shift_right<1>(width)), next);
      const Ints from = add(low, ints(1)), to = sub(high, ints(1));
      next = select(greater(from, next), from, next);
      next = select(greater(next, to), to, next);
      const Mask found = equal(extra, ints(0));
      const Ints goes_on =
          select(greater(width, ints(1)), select(found, ints(0), ints(1)), ints(0));
      store(lo + i, low);
      store(hi + i, high);
      store(over_lo + i, over_low);
      store(over_hi + i, over_high);
      store(open + i, goes_on);
      store(at + i, select(equal(goes_on, ints(1)), next, last));
      if (round == 0) store(missed + i, extra);
    }
    int still = 0;
    for (int i = 0; i < left; ++i) {
      blocks[still] = blocks[i];
      still += static_cast<int>(open[blocks[i]]);
    }
    left = still;
  }
  int distance = 0, elements = 1;
  for (int i = 0; i < searches.count; ++i) {
    const bool exact = over[i] == wanted[i];
    searches.cut[i] = {static_cast<int>(exact ? at[i] : hi[i]), exact};
    distance += std::abs(static_cast<int>(at[i]) - searches.guess[i]);
    elements += std::abs(static_cast<int>(missed[i]));
  }
  *spacing = static_cast<float>(distance) / static_cast<float>(elements);
}

// Goes from block to block of a tensor.
class Selection {
 public:
  explicit Selection(int fine_shift) : fine_shift_(fine_shift) {}

  // The k largest of up to kTogether blocks.
  void select(const float* const* blocks, const int* k, int count, Bits* bits) {
    Searches searches;
    Bits* results[kTogether];
    int left = 0;
    for (int i = 0; i < count; ++i) {
      bits[i] = {};
      if (k[i] == 0) continue;
      results[left] = bits + i;
      searches.x[left] = blocks[i];
      searches.k[left] = k[i];
      searches.window[left] = window_;
      searches.guess[left++] = guess_;
    }
    searches.count = left;
    if (left == 0) return;
    find_cuts(searches, &spacing_);
    const int64_t inside = threshold_inside(searches);
    int64_t last = 0;
    for (;;) {
      left = 0;
      for (int i = 0; i < searches.count; ++i) {
        last = take(searches, i, results[i]);
        if (last >= 0) continue;
        results[left] = results[i];
        refine(searches, i, left++);
      }
      searches.count = left;
      if (left == 0) break;
      float spacing = 16;
      find_cuts(searches, &spacing);
    }
    move_window(inside >= 0 ? inside : last);
  }

 private:
  // The elements chosen by a cut, and the bits of |x| there; -1 where the window is too coarse to
  // tell them, or shows them not.
  static int64_t take(const Searches& searches, int i, Bits* bits) {
    const Cut cut = searches.cut[i];
    const Window window = searches.window[i];
    if (!cut.exact && window.shift > 0) return -1;
    *bits = bits_above(searches.keys[i], cut.threshold);
    if (!cut.exact) {  // equal in every bit: the first ones
      Bits equal = kAllBits;
      if (cut.threshold > 0) equal = bits_above(searches.keys[i], cut.threshold - 1);
      for (int j = 0; j < 4; ++j) equal.word[j] &= ~bits->word[j];
      *bits = unite(*bits, lowest_bits(equal, searches.k[i] - popcount(*bits)));
    }
    return window.base + (int64_t{cut.threshold} << window.shift);
  }

  // Search i goes on as number `as` in another window.
  static void refine(Searches& searches, int i, int as) {
    const Window window = searches.window[i];
    const int threshold = searches.cut[i].threshold;
    const int32_t at = window.base + (threshold << window.shift);
    const bool below = threshold == 0 && window.base > 0;
    const bool beyond = threshold == kLastKey && window.shift < kWhole.shift;
    searches.x[as] = searches.x[i];
    searches.k[as] = searches.k[i];
    if (below || beyond) {
      searches.window[as] = kWhole;
      searches.guess[as] = at >> kWhole.shift;
    } else {
      // Among zeros and numbers of few bits, those that tie are mostly equal: their key will be 1.
      searches.window[as] = {at > 0 ? at - 1 : 0, 0};
      searches.guess[as] = 1;
    }
  }

  // The mean threshold where most are in the window, else -1.
  static int64_t threshold_inside(const Searches& searches) {
    int64_t sum = 0, count = 0;
    for (int i = 0; i < searches.count; ++i) {
      const int threshold = searches.cut[i].threshold;
      const bool inside = threshold > 0 && threshold < kLastKey;
      sum += inside ? threshold : 0;
      count += inside;
    }
    const Window window = searches.window[0];
    return 2 * count > searches.count ? window.base + (sum / count << window.shift) : -1;
  }

  // To the finest window, about a threshold.
  void move_window(int64_t threshold) {
    const int64_t half = int64_t{0x8000} << fine_shift_;
    const bool whole = fine_shift_ == kWhole.shift;
    spacing_ *= static_cast<float>(1 << window_.shift) / static_cast<float>(1 << fine_shift_);
    window_ = {static_cast<int32_t>(whole || threshold < half ? 0 : threshold - half), fine_shift_};
    guess_ = static_cast<int>((threshold - window_.base) >> fine_shift_);
  }

  int fine_shift_;
  Window window_ = kWhole;
  int guess_ = 0x7f00;  // of a 1
  float spacing_ = 4;
};

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
