#include "topk.h"

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

// A block as floats: in place, or in `buffer`, filled up with zeros.
template <DType kType>
MEMTL_INLINE const float* load_block(const void* x, int64_t first, int64_t count, float* buffer) {
  if (count == kBlock) {
    if constexpr (kType == DType::f32) return static_cast<const float*>(x) + first;
    for (int i = 0; i < kBlock; i += kWidth) store(buffer + i, load<kType>(x, first + i));
  } else {
    for (int i = 0; i < count; ++i) buffer[i] = load_float(kType, x, first + i);
    for (int64_t i = count; i < kBlock; ++i) buffer[i] = 0;
  }
  return buffer;
}

// --------------------------------------------------------------------- selection within a block
//
// The k largest are found by counting: how many of 256 16-bit keys are above a threshold takes 8
// comparisons with AVX-512. The upper 16 bits of |x| nearly always decide; where elements tie in
// them, the lower 15 bits of those elements are searched in the same way.

constexpr int kLowBits = 15;

#if defined(__AVX512F__)

struct Keys {
  __m512i words[8];  // element order within a word: see `bits_above`
};

MEMTL_INLINE __m512i load_key(const float* block, int i) {
  return _mm512_and_si512(_mm512_loadu_si512(block + 16 * i), _mm512_set1_epi32(kMagnitude));
}

MEMTL_INLINE Keys high_keys(const float* block) {
  Keys keys;
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    keys.words[i] = _mm512_packus_epi32(_mm512_srli_epi32(load_key(block, 2 * i), kLowBits),
                                        _mm512_srli_epi32(load_key(block, 2 * i + 1), kLowBits));
  }
  return keys;
}

// 1 + the low bits where the high ones are `high`, 0 elsewhere.
MEMTL_INLINE Keys low_keys(const float* block, int high) {
  const __m512i base = _mm512_set1_epi32((high << kLowBits) - 1);
  const __m512i last = _mm512_set1_epi32(1 << kLowBits);
  Keys keys;
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512i a = _mm512_sub_epi32(load_key(block, 2 * i), base);
    const __m512i b = _mm512_sub_epi32(load_key(block, 2 * i + 1), base);
    // Below `base` the difference is negative, which as an unsigned number is above `last`.
    keys.words[i] =
        _mm512_packus_epi32(_mm512_maskz_mov_epi32(_mm512_cmple_epu32_mask(a, last), a),
                            _mm512_maskz_mov_epi32(_mm512_cmple_epu32_mask(b, last), b));
  }
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

#else

constexpr int kBias = 0x8000;  // makes an unsigned comparison of a signed one

struct Keys {
  alignas(64) int16_t key[kBlock];
};

MEMTL_INLINE Keys high_keys(const float* block) {
  Keys keys;
  for (int i = 0; i < kBlock; ++i) {
    keys.key[i] = static_cast<int16_t>((key_of(block[i]) >> kLowBits) ^ kBias);
  }
  return keys;
}

MEMTL_INLINE Keys low_keys(const float* block, int high) {
  const uint32_t base = (static_cast<uint32_t>(high) << kLowBits) - 1;
  Keys keys;
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t low = key_of(block[i]) - base;
    keys.key[i] = static_cast<int16_t>((low <= 1u << kLowBits ? low : 0) ^ kBias);
  }
  return keys;
}

MEMTL_INLINE int count_above(const Keys& keys, int threshold) {
  const auto t = static_cast<int16_t>(threshold ^ kBias);
#if defined(__AVX2__)
  const __m256i t16 = _mm256_set1_epi16(t);
  __m256i even = _mm256_setzero_si256(), odd = even;
  MEMTL_UNROLL
  for (int i = 0; i < kBlock; i += 32) {
    const auto* words = reinterpret_cast<const __m256i*>(keys.key + i);
    even = _mm256_sub_epi16(even, _mm256_cmpgt_epi16(_mm256_load_si256(words), t16));
    odd = _mm256_sub_epi16(odd, _mm256_cmpgt_epi16(_mm256_load_si256(words + 1), t16));
  }
  // Every word is at most 16: as bytes they can be summed by one instruction.
  const __m256i sums = _mm256_sad_epu8(_mm256_add_epi16(even, odd), _mm256_setzero_si256());
  const __m128i half =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2);
#else
  int16_t count = 0;
  for (int i = 0; i < kBlock; ++i) count = static_cast<int16_t>(count + (keys.key[i] > t));
  return count;
#endif
}

MEMTL_INLINE Bits bits_above(const Keys& keys, int threshold) {
  const auto t = static_cast<int16_t>(threshold ^ kBias);
  alignas(64) uint8_t above[kBlock];
  for (int i = 0; i < kBlock; ++i) above[i] = keys.key[i] > t;
  return bits_of_bytes(above);
}

#endif

struct Cut {
  int threshold;
  bool exact;  // just k are above it; else it is the key of the k-th
};

// lo and hi bracket the cut: k or more keys are above lo, fewer than k above hi. `guess` is tried
// first, then growing steps away from it, then the middle.
MEMTL_INLINE Cut find_cut(const Keys& keys, int k, int lo, int hi, int guess) {
  int step = 32;
  int middle = guess;
  bool below = false, over = false;
  while (hi - lo > 1) {
    if (middle <= lo || middle >= hi) middle = lo + (hi - lo) / 2;
    const int count = count_above(keys, middle);
    if (count == k) return {middle, true};
    if (count > k) {
      lo = middle;
      below = true;
      middle += step;
    } else {
      hi = middle;
      over = true;
      middle -= step;
    }
    if (below && over) {
      middle = lo + (hi - lo) / 2;
    } else if (step < 1 << 16) {
      step *= 2;
    }
  }
  return {hi, false};
}

// The largest and the first `wanted` of the chosen elements, which are more and have `high` for
// their high bits.
MEMTL_INLINE Bits largest_of_equal(const float* block, const Bits& chosen, int high, int wanted) {
  Ints upper = ints(0), lower = ints(0);
  for (int i = 0; i < kBlock; i += kWidth) {
    const Ints key = bit_and(as_ints(load(block + i)), ints(kMagnitude));
    const Mask equals = equal(shift_right<kLowBits>(key), ints(static_cast<uint32_t>(high)));
    upper = max(upper, MEMTL_ISA_NS::select(equals, key, ints(0)));
    lower = max(lower, MEMTL_ISA_NS::select(equals, bit_xor(key, ints(~0u)), ints(0)));
  }
  const uint32_t mask = (1u << kLowBits) - 1;
  const uint32_t most = highest(upper) & mask, least = ~highest(lower) & mask;
  if (least == most) return lowest_bits(chosen, wanted);  // all zero, mostly
  const Keys keys = low_keys(block, high);
  const int last = static_cast<int>(most) + 1;
  const Cut cut = find_cut(keys, wanted, static_cast<int>(least), last, last - 1);
  const Bits above = bits_above(keys, cut.threshold);
  if (cut.exact) return above;
  Bits ties = bits_above(keys, cut.threshold - 1);
  for (int i = 0; i < 4; ++i) ties.word[i] &= ~above.word[i];
  return unite(above, lowest_bits(ties, wanted - popcount(above)));
}

// The k largest of a block, 0 < k <= kBlock. `guess` is a threshold near which to start; the one
// found is left there.
MEMTL_INLINE Bits select(const float* block, int k, int* guess) {
  const Keys keys = high_keys(block);
  const Cut cut = find_cut(keys, k, -1, 0xffff, *guess);
  *guess = cut.threshold;
  const Bits above = bits_above(keys, cut.threshold);
  if (cut.exact) return above;
  Bits ties;
  if (cut.threshold > 0) {
    ties = bits_above(keys, cut.threshold - 1);
    for (int i = 0; i < 4; ++i) ties.word[i] &= ~above.word[i];
  } else {
    for (int i = 0; i < 4; ++i) ties.word[i] = ~above.word[i];
  }
  const int wanted = k - popcount(above);
  return unite(above, wanted == popcount(ties)
                          ? ties
                          : largest_of_equal(block, ties, cut.threshold, wanted));
}

// ------------------------------------------------------------------------------ writing a block

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

// The chosen elements in order, then zeros for a vector at least.
MEMTL_INLINE void gather(const float* block, const Bits& bits, const uint8_t* positions, int count,
                         float* kept) {
#if defined(__AVX512F__)
  (void)positions;
  (void)count;
  int at = 0;
  MEMTL_UNROLL
  for (int i = 0; i < 16; ++i) {
    const auto mask = static_cast<__mmask16>(bits.word[i / 4] >> (16 * (i % 4)));
    _mm512_storeu_ps(kept + at, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(block + 16 * i)));
    at += __builtin_popcount(mask);
  }
  _mm512_storeu_ps(kept + at, _mm512_setzero_ps());
#else
  (void)bits;
  for (int i = 0; i < count; ++i) kept[i] = block[positions[i]];
  for (int i = count; i < count + kWidth; ++i) kept[i] = 0;
#endif
}

// The scale of int8 codes: the largest finite magnitude over 126, rounded up to bfloat16.
MEMTL_INLINE float scale_of(const float* kept, int count) {
  Ints largest = ints(0);
  for (int i = 0; i < count; i += kWidth) {
    const Ints bits = bit_and(as_ints(load(kept + i)), ints(kMagnitude));
    const Mask unbounded = equal(bit_and(bits, ints(kInfinity)), ints(kInfinity));
    largest = max(largest, MEMTL_ISA_NS::select(unbounded, ints(0), bits));
  }
  const float scale = bfloat16_up(bits_float(highest(largest)) / 126.0f);
  const float smallest = bits_float(0x00800000);
  return scale > smallest ? scale : smallest;
}

MEMTL_INLINE void encode(const float* kept, int count, float scale, uint8_t* codes) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: its sum with a small number is rounded to whole
  for (int i = 0; i < count; i += kWidth) {
    const Floats x = load(kept + i);
    const Ints bits = as_ints(x);
    const Floats code = min(max(div(x, floats(scale)), floats(-126)), floats(126));
    Ints byte = as_ints(add(code, floats(rounder)));
    byte = MEMTL_ISA_NS::select(equal(bits, ints(kInfinity)), ints(127), byte);
    byte = MEMTL_ISA_NS::select(equal(bits, ints(kInfinity | ~kMagnitude)), ints(0x81), byte);
    byte = MEMTL_ISA_NS::select(is_nan(x), ints(0x80), byte);
    store_bytes(codes + i, bit_and(byte, ints(0xff)));
  }
}

MEMTL_INLINE void copy(void* to, int64_t place, const void* from, int count, int64_t size) {
  if (count == 0) return;  // then `to` may be null
  std::memcpy(static_cast<char*>(to) + place * size, from, static_cast<size_t>(count * size));
}

// Writes the chosen elements of block `index` of row `row` from place `start` of the row on.
MEMTL_INLINE int64_t write_block(const float* block, const Bits& bits, int64_t row, int64_t index,
                                 int64_t n, int64_t start, const TopkOutput& out) {
  alignas(64) uint8_t positions[kPadded];
  alignas(64) float kept[kPadded];
  const int count = list_positions(bits, positions);
  gather(block, bits, positions, count, kept);
  const int64_t place = row * out.kept + start;
  const int64_t blocks = ceil_div(n, kBlock);
  if (out.bitmap) {
    const int64_t bytes = min_of(ceil_div(n - index * kBlock, 8), kBlock / 8);
    std::memcpy(out.positions + row * ceil_div(n, 8) + index * (kBlock / 8), bits.word,
                static_cast<size_t>(bytes));
  } else {
    copy(out.positions, place, positions, count, 1);
  }
  if (out.counts) out.counts[row * blocks + index] = static_cast<int16_t>(count);
  alignas(64) uint16_t narrow[kPadded];
  switch (out.value) {
    case DType::i8: {
      alignas(64) uint8_t codes[kPadded];
      const float scale = scale_of(kept, count);
      encode(kept, count, scale, codes);
      copy(out.values, place, codes, count, 1);
      out.scale[row * blocks + index] = static_cast<uint16_t>(float_bits(scale) >> 16);
      break;
    }
    case DType::bf16:
      for (int i = 0; i < count; i += kWidth) store_bfloat16(narrow + i, load(kept + i));
      copy(out.values, place, narrow, count, 2);
      break;
    case DType::f16:
      for (int i = 0; i < count; i += kWidth) store_half(narrow + i, load(kept + i));
      copy(out.values, place, narrow, count, 2);
      break;
    default:
      copy(out.values, place, kept, count, 4);
  }
  return count;
}

template <DType kType>
void pack_typed(const void* x, int64_t n, int64_t k, int64_t k_tail, const TopkOutput& out,
                int64_t first, int64_t last) {
  alignas(64) float buffer[kBlock];
  int guess = 0x7f00;  // about 1
  for (int64_t row = first; row < last; ++row) {
    int64_t start = 0;
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = min_of(n - at, kBlock);
      const float* block = load_block<kType>(x, row * n + at, count, buffer);
      const int64_t wanted = count == kBlock ? k : k_tail;
      const Bits bits = wanted ? select(block, static_cast<int>(wanted), &guess) : Bits{};
      start += write_block(block, bits, row, at / kBlock, n, start, out);
    }
  }
}

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

void pack(DType dtype, const void* x, int64_t n, int64_t k, int64_t k_tail, const TopkOutput& out,
          int64_t first, int64_t last) {
  MEMTL_FOR_DTYPE(dtype, pack_typed<kType>(x, n, k, k_tail, out, first, last))
}

// ------------------------------------------------------------------------ selection within a row

template <DType kType>
void keys_typed(const void* x, int64_t count, uint32_t* keys) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Ints key = bit_and(as_ints(load<kType>(x, i)), ints(kMagnitude));
    std::memcpy(keys + i, &key, sizeof key);
  }
  for (; i < count; ++i) keys[i] = key_of(load_float(kType, x, i));
}

void keys(DType dtype, const void* x, int64_t count, uint32_t* keys) {
  MEMTL_FOR_DTYPE(dtype, keys_typed<kType>(x, count, keys))
}

template <DType kType>
void count_typed(const void* x, int64_t count, uint32_t lo, uint32_t hi, int64_t* above,
                 int64_t* inside, uint32_t* keys, int64_t room) {
  int64_t over = 0, between = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi32(static_cast<int>(lo));
  const __m512i high = _mm512_set1_epi32(static_cast<int>(hi));
  for (; i + 16 <= count; i += 16) {
    const __m512i key = bit_and(as_ints(load<kType>(x, i)), ints(kMagnitude));
    const __mmask16 gt = _mm512_cmpgt_epi32_mask(key, high);
    const __mmask16 in = _mm512_mask_cmpge_epi32_mask(static_cast<__mmask16>(~gt), key, low);
    _mm512_storeu_si512(keys + min_of(between, room), _mm512_maskz_compress_epi32(in, key));
    over += __builtin_popcount(gt);
    between += __builtin_popcount(in);
  }
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(static_cast<int>(lo));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(hi));
  for (; i + 8 <= count; i += 8) {
    const __m256i key = bit_and(as_ints(load<kType>(x, i)), ints(kMagnitude));
    const __m256i gt = _mm256_cmpgt_epi32(key, high);
    const __m256i out = _mm256_or_si256(gt, _mm256_cmpgt_epi32(low, key));
    over += popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(gt))));
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), key);
    unsigned in = 0xff & ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(out)));
    for (; in; in &= in - 1) keys[min_of(between++, room)] = lanes[first_bit(in)];
  }
#endif
  for (; i < count; ++i) {
    const uint32_t key = key_of(load_float(kType, x, i));
    keys[min_of(between, room)] = key;
    over += key > hi;
    between += key >= lo && key <= hi;
  }
  *above = over;
  *inside = between;
}

void count(DType dtype, const void* x, int64_t count, uint32_t lo, uint32_t hi, int64_t* above,
           int64_t* inside, uint32_t* keys, int64_t room){
    MEMTL_FOR_DTYPE(dtype, count_typed<kType>(x, count, lo, hi, above, inside, keys, room))}

int64_t keys_above(const uint32_t* keys, int64_t count, uint32_t threshold) {
  const auto t = static_cast<int32_t>(threshold);
  int64_t above = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t end = min_of(count, i + (1 << 20));
    int32_t part = 0;
    for (; i < end; ++i) part += static_cast<int32_t>(keys[i]) > t;
    above += part;
  }
  return above;
}

uint32_t threshold(const uint32_t* keys, int64_t count, int64_t k, uint32_t lo, uint32_t hi,
                   int64_t* above) {
  // Fewer than k are above hi; k or more are above low - 1.
  int64_t low = lo, high = hi;
  *above = 0;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t over = keys_above(keys, count, static_cast<uint32_t>(middle));
    if (over <= k) {
      *above = over;
      high = middle;
      if (over == k) break;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<uint32_t>(high);
}

// The elements above the threshold, and those equal to it.
MEMTL_INLINE void compare(const float* block, uint32_t threshold, Bits* above, Bits* equal) {
#if defined(__AVX512F__)
  *above = *equal = Bits{};
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  MEMTL_UNROLL
  for (int i = 0; i < 16; ++i) {
    const __m512i key = load_key(block, i);
    const int shift = 16 * (i % 4);
    above->word[i / 4] |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(key, t)) << shift;
    equal->word[i / 4] |= static_cast<uint64_t>(_mm512_cmpeq_epi32_mask(key, t)) << shift;
  }
#else
  alignas(64) uint8_t over[kBlock], same[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    over[i] = key_of(block[i]) > threshold;
    same[i] = key_of(block[i]) == threshold;
  }
  *above = bits_of_bytes(over);
  *equal = bits_of_bytes(same);
#endif
}

template <DType kType>
void pack_above_typed(const void* x, int64_t n, int64_t row, int64_t first, int64_t last,
                      uint32_t threshold, int64_t ties, int64_t start, const TopkOutput& out) {
  alignas(64) float buffer[kBlock];
  for (int64_t index = first; index < last; ++index) {
    const int64_t count = min_of(n - index * kBlock, kBlock);
    const float* block = load_block<kType>(x, row * n + index * kBlock, count, buffer);
    Bits above, equal;
    compare(block, threshold, &above, &equal);
    if (count < kBlock) {  // what fills the block up is no element
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t bits = count - 64 * i;
        if (bits < 64) equal.word[i] &= bits > 0 ? (uint64_t{1} << bits) - 1 : 0;
      }
    }
    equal = lowest_bits(equal, ties);
    ties -= popcount(equal);
    start += write_block(block, unite(above, equal), row, index, n, start, out);
  }
}

void pack_above(DType dtype, const void* x, int64_t n, int64_t row, int64_t first, int64_t last,
                uint32_t threshold, int64_t ties, int64_t start, const TopkOutput& out){
    MEMTL_FOR_DTYPE(dtype,
                    pack_above_typed<kType>(x, n, row, first, last, threshold, ties, start, out))}

// -------------------------------------------------------------------------------------- reading

MEMTL_INLINE Bits load_bits(const uint8_t* bits, int64_t count) {
  Bits loaded = {};
  std::memcpy(loaded.word, bits, static_cast<size_t>(ceil_div(count, 8)));
  return loaded;
}

bool starts(const uint8_t* bits, int64_t n, int64_t* starts) {
  int64_t entries = 0, block = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    starts[block++] = entries;
    entries += popcount(load_bits(bits + at / 8, min_of(n - at, kBlock)));
  }
  starts[block] = entries;
  return n % 8 == 0 || bits[n / 8] >> (n % 8) == 0;
}

// The entries of one block.
struct Entries {
  int count;
  const uint8_t* positions;
  const float* values;
};

struct EntryBuffers {
  alignas(64) uint8_t positions[kPadded];
  alignas(64) float values[kPadded];
};

MEMTL_INLINE bool ascend(const uint8_t* positions, int count) {
  unsigned wrong = 0;
  for (int i = 1; i < count; ++i) wrong |= positions[i] <= positions[i - 1];
  return !wrong;
}

// The place of the first entry of a block, and how many it has.
MEMTL_INLINE int64_t place_of(const TopkPacked& packed, int64_t row, int64_t block, int* count) {
  int64_t start, end;
  if (packed.starts) {
    const int64_t* starts = packed.starts + row * (ceil_div(packed.n, kBlock) + 1) + block;
    start = starts[0];
    end = starts[1];
  } else {
    start = block * packed.k;
    end = (block + 1) * kBlock <= packed.n ? start + packed.k : packed.kept;
  }
  *count = static_cast<int>(end - start);
  return row * packed.kept + start;
}

MEMTL_INLINE const uint8_t* positions_of(const TopkPacked& packed, int64_t row, int64_t block,
                                         int64_t place, uint8_t* buffer) {
  if (packed.kept == 0) return buffer;
  if (!packed.bitmap) return packed.positions + place;
  const uint8_t* bits = packed.positions + row * ceil_div(packed.n, 8) + block * (kBlock / 8);
  list_positions(load_bits(bits, min_of(packed.n - block * kBlock, kBlock)), buffer);
  return buffer;
}

MEMTL_INLINE const float* values_of(const TopkPacked& packed, int64_t row, int64_t block,
                                    int64_t place, int count, float* buffer) {
  if (count == 0) return buffer;  // then packed.values may be null
  if (packed.value == DType::f32) return static_cast<const float*>(packed.values) + place;
  // A copy first, so that whole vectors may be read.
  alignas(64) uint16_t raw[kPadded];
  const int64_t size = size_of(packed.value);
  std::memcpy(raw, static_cast<const char*>(packed.values) + place * size,
              static_cast<size_t>(count * size));
  if (packed.value == DType::bf16) {
    for (int i = 0; i < count; i += kWidth) store(buffer + i, load_bfloat16(raw + i));
  } else if (packed.value == DType::f16) {
    for (int i = 0; i < count; i += kWidth) store(buffer + i, load_half(raw + i));
  } else {
    const auto* codes = reinterpret_cast<const uint8_t*>(raw);
    const float scale = bfloat16_to_float(packed.scale[row * ceil_div(packed.n, kBlock) + block]);
    const Floats infinity = floats(bits_float(kInfinity));
    for (int i = 0; i < count; i += kWidth) {
      const Ints code = load_bytes(codes + i);
      Floats x = sub(to_floats(bit_xor(code, ints(0x80))), floats(128));
      x = MEMTL_ISA_NS::select(equal(code, ints(127)), infinity, x);
      x = MEMTL_ISA_NS::select(equal(code, ints(0x81)), sub(floats(0), infinity), x);
      x = MEMTL_ISA_NS::select(equal(code, ints(0x80)), floats(bits_float(0x7fc00000)), x);
      store(buffer + i, mul(x, floats(scale)));
    }
  }
  return buffer;
}

// Calls visit(row, block, at, size) for every block that has elements of [first, last) of the flat
// tensor, `at` being the flat index of its first element; stops where it says false.
template <class Visit>
MEMTL_INLINE bool for_blocks(const TopkPacked& packed, int64_t first, int64_t last, Visit visit) {
  if (first >= last) return true;
  int64_t row = first / packed.n;
  int64_t column = (first - row * packed.n) / kBlock * kBlock;
  while (row * packed.n + column < last) {
    const int64_t size = min_of(packed.n - column, kBlock);
    if (!visit(row, column / kBlock, row * packed.n + column, size)) return false;
    column += size;
    if (column == packed.n) {
      ++row;
      column = 0;
    }
  }
  return true;
}

template <DType kType>
bool unpack_typed(const TopkPacked& packed, int64_t first, int64_t last, void* out) {
  EntryBuffers buffers;
  alignas(64) float dense[kBlock];
  return for_blocks(packed, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
    int count;
    const int64_t place = place_of(packed, row, block, &count);
    const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
    if (!packed.bitmap && !ascend(positions, count)) return false;
    const float* values = values_of(packed, row, block, place, count, buffers.values);
    const bool whole = size == kBlock && at >= first && at + size <= last;
    float* to = dense;
    if constexpr (kType == DType::f32) {
      if (whole) to = static_cast<float*>(out) + (at - first);
    }
    std::memset(to, 0, sizeof dense);
    for (int i = 0; i < count; ++i) to[positions[i]] = values[i];
    if (to != dense) return true;
    if (whole) {
      for (int i = 0; i < kBlock; i += kWidth) store<kType>(out, at - first + i, load(dense + i));
    } else {
      const int64_t end = min_of(size, last - at);
      for (int64_t i = at < first ? first - at : 0; i < end; ++i) {
        store_float(kType, out, at - first + i, dense[i]);
      }
    }
    return true;
  });
}

bool unpack(const TopkPacked& packed, int64_t first, int64_t last, DType dtype, void* out) {
  MEMTL_FOR_DTYPE(dtype, unpack_typed<kType>(packed, first, last, out))
}

// ---------------------------------------------------------------------- weight gradient: columns

// Calls visit(token, feature, i) for every entry i of a block that is in tokens [first, last).
template <class Visit>
MEMTL_INLINE void for_entries(const uint8_t* positions, int count, int64_t at, int64_t size,
                              int64_t features, int64_t first, int64_t last, Visit visit) {
  int64_t token = at / features;
  int64_t feature = at - token * features;
  if (feature + size <= features) {  // then the token is in range too
    for (int i = 0; i < count; ++i) visit(token, feature + positions[i], i);
    return;
  }
  int64_t before = 0;
  for (int i = 0; i < count; ++i) {
    feature += positions[i] - before;
    before = positions[i];
    for (; feature >= features; feature -= features) ++token;
    if (token >= first && token < last) visit(token, feature, i);
  }
}

// for_blocks over tokens [first, last). Where the blocks of all tokens are aligned to each other,
// those of the same features come one after the other: then what they are sorted into stays in L1.
template <class Visit>
MEMTL_INLINE bool for_token_blocks(const TopkPacked& packed, int64_t features, int64_t first,
                                   int64_t last, Visit visit) {
  if (packed.n % features != 0 || (features % kBlock != 0 && packed.n != features)) {
    return for_blocks(packed, first * features, last * features, visit);
  }
  const int64_t per_row = packed.n / features;
  for (int64_t feature = 0; feature < features; feature += kBlock) {
    const int64_t size = min_of(features - feature, kBlock);
    for (int64_t token = first; token < last; ++token) {
      const int64_t block = (token % per_row * features + feature) / kBlock;
      if (!visit(token / per_row, block, token * features + feature, size)) return false;
    }
  }
  return true;
}

bool transpose(const TopkPacked& packed, int64_t features, int64_t first, int64_t last,
               int64_t width, TopkColumns* columns, uint32_t* cursors) {
  EntryBuffers buffers;
  std::memset(cursors, 0, static_cast<size_t>(features) * sizeof *cursors);
  const bool ascending = for_token_blocks(
      packed, features, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
        int count;
        const int64_t place = place_of(packed, row, block, &count);
        const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
        if (!packed.bitmap && !ascend(positions, count)) return false;
        for_entries(positions, count, at, size, features, first, last,
                    [&](int64_t, int64_t feature, int) { ++cursors[feature]; });
        return true;
      });
  if (!ascending) return false;

  // The features of a panel by falling number of entries, and where the entries of each begin.
  uint32_t entries = 0;
  for (int64_t panel = 0; panel * width < features; ++panel) {
    TopkColumns& to = columns[panel];
    const int64_t begin = panel * width, size = min_of(width, features - begin);
    if (panel > 0) {
      const TopkColumns& from = columns[panel - 1];
      to.features = from.features + 2 * from.pairs;
      to.lengths = from.lengths + from.pairs;
      to.tokens = columns[0].tokens + entries;
      to.values = columns[0].values + entries;
    }
    uint32_t place[kTopkTokens + 1] = {};  // of the first feature with so many entries
    for (int64_t i = 0; i < size; ++i) ++place[cursors[begin + i]];
    uint32_t at = 0;
    for (int length = kTopkTokens; length >= 0; --length) {
      const uint32_t of_length = place[length];
      place[length] = at;
      at += of_length;
    }
    for (int64_t i = 0; i < size; ++i) {
      to.features[place[cursors[begin + i]]++] = static_cast<uint32_t>(i);
    }
    if (size % 2) to.features[size] = static_cast<uint32_t>(width);  // a feature that is none
    int64_t pair = 0;
    for (; 2 * pair < size; ++pair) {
      uint32_t& even = cursors[begin + to.features[2 * pair]];
      const uint32_t length = even;
      if (length == 0) break;
      uint32_t odd_length = 0;
      const uint32_t start = entries;
      even = start;
      if (2 * pair + 1 < size) {
        uint32_t& odd = cursors[begin + to.features[2 * pair + 1]];
        odd_length = odd;
        odd = start + 1;
      }
      for (uint32_t i = odd_length; i < length; ++i) {
        columns[0].tokens[start + 2 * i + 1] = kTopkTokens;
        columns[0].values[start + 2 * i + 1] = 0;
      }
      to.lengths[pair] = static_cast<uint16_t>(length);
      entries += 2 * length;
    }
    to.pairs = pair;
  }

  uint8_t* tokens = columns[0].tokens;
  float* to = columns[0].values;
  return for_token_blocks(
      packed, features, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
        int count;
        const int64_t place = place_of(packed, row, block, &count);
        const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
        const float* values = values_of(packed, row, block, place, count, buffers.values);
        for_entries(positions, count, at, size, features, first, last,
                    [&](int64_t token, int64_t feature, int i) {
                      const uint32_t entry = cursors[feature];
                      cursors[feature] = entry + 2;
                      tokens[entry] = static_cast<uint8_t>(token - first);
                      to[entry] = values[i];
                    });
        return true;
      });
}

// ---------------------------------------------------------------------- weight gradient: product

#if defined(__AVX2__)
constexpr int kLanes = kWidth;
using Vector = Floats;
MEMTL_INLINE Vector load_vector(const float* p) { return load(p); }
MEMTL_INLINE void store_vector(float* p, Vector a) { store(p, a); }
MEMTL_INLINE Vector spread(float x) { return floats(x); }
#if defined(__AVX512F__)
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#else
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#endif
MEMTL_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
#else
constexpr int kLanes = 4;
typedef float Vector __attribute__((vector_size(16)));
MEMTL_INLINE Vector load_vector(const float* p) {
  Vector a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
MEMTL_INLINE void store_vector(float* p, Vector a) { std::memcpy(p, &a, sizeof a); }
MEMTL_INLINE Vector spread(float x) { return Vector{x, x, x, x}; }
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
MEMTL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

// Makes the compiler compute an address once: an FMA that adds up its address is two operations.
MEMTL_INLINE void keep_in_register(const float*& p) { asm("" : "+r"(p)); }

constexpr int kTileVectors = 4;
constexpr int kTile = kTileVectors * kLanes;

// Outputs [first, first + kOutputs) of tokens [token, token + rows), as floats; zeros beyond the
// last output.
template <DType kType, int kOutputs>
void copy_tile(const void* grad_out, int64_t outputs, int64_t token, int64_t rows, int64_t first,
               float* tile) {
  const int64_t count = min_of(outputs - first, kOutputs);
  for (int64_t row = 0; row < rows; ++row, tile += kOutputs) {
    const int64_t at = (token + row) * outputs + first;
    int i = 0;
    if (count == kOutputs) {
      MEMTL_UNROLL
      for (; i < kOutputs; i += kWidth) store(tile + i, load<kType>(grad_out, at + i));
      continue;
    }
    for (; i + kWidth <= count; i += kWidth) store(tile + i, load<kType>(grad_out, at + i));
    for (; i < count; ++i) tile[i] = load_float(kType, grad_out, at + i);
    for (; i < kOutputs; ++i) tile[i] = 0;
  }
}

// sums[feature, :] += value * tile[token, :] over the entries. The sums of a pair of features stay
// in registers.
template <int kVectors>
void accumulate(const TopkColumns& columns, const float* tile, float* sums) {
  constexpr int kOutputs = kVectors * kLanes;
  const uint8_t* tokens = columns.tokens;
  const float* values = columns.values;
  for (int64_t pair = 0; pair < columns.pairs; ++pair) {
    const uint32_t* features = columns.features + 2 * pair;
    float* even = sums + int64_t{features[0]} * kOutputs;
    float* odd = sums + int64_t{features[1]} * kOutputs;
    Vector a[kVectors], b[kVectors];
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      a[v] = load_vector(even + v * kLanes);
      b[v] = load_vector(odd + v * kLanes);
    }
    if (pair + 2 < columns.pairs) {
      MEMTL_UNROLL
      for (int i = 0; i < kOutputs; i += 16) {
        prefetch(sums + int64_t{features[4]} * kOutputs + i);
        prefetch(sums + int64_t{features[5]} * kOutputs + i);
      }
    }
    for (int i = columns.lengths[pair]; i > 0; --i) {
      const float* from_even = tile + tokens[0] * kOutputs;
      const float* from_odd = tile + tokens[1] * kOutputs;
      keep_in_register(from_even);
      keep_in_register(from_odd);
      const Vector x = spread(values[0]), y = spread(values[1]);
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        a[v] = fma(x, load_vector(from_even + v * kLanes), a[v]);
      }
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        b[v] = fma(y, load_vector(from_odd + v * kLanes), b[v]);
      }
      tokens += 2;
      values += 2;
    }
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_vector(even + v * kLanes, a[v]);
      store_vector(odd + v * kLanes, b[v]);
    }
  }
}

#if defined(__AVX512F__)
// to[i * stride + j] = from[j * from_stride + i], i < rows, j < 16; rows <= 16.
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  __m512 a[16], b[16];
  MEMTL_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]);
    const __m512d r = _mm512_castps_pd(b[i + 2]), s = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
  MEMTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
  }
  // What fills whole lines goes past the caches: the result is larger than they are.
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && stride % 16 == 0;
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) break;
    if (aligned) {
      _mm512_stream_ps(to + i * stride, a[i]);
    } else {
      _mm512_storeu_ps(to + i * stride, a[i]);
    }
  }
}
#elif defined(__AVX2__)
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  __m256 a[8], b[8];
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) {
    if (i < rows) _mm256_storeu_ps(to + i * stride, b[i]);
  }
}
#else
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kLanes; ++j) to[i * stride + j] = from[j * from_stride + i];
  }
}
#endif

// sums [width, kOutputs] -> out [count, width], rows `stride` apart.
template <int kOutputs>
void write_sums(const float* sums, int64_t width, int64_t count, float* out, int64_t stride) {
  const int64_t squares = width / kLanes * kLanes;
  for (int64_t o = 0; o < count; o += kLanes) {
    for (int64_t feature = 0; feature < squares; feature += kLanes) {
      transpose_square(sums + feature * kOutputs + o, kOutputs, out + o * stride + feature, stride,
                       min_of(count - o, kLanes));
    }
  }
  for (int64_t feature = squares; feature < width; ++feature) {
    for (int64_t o = 0; o < count; ++o) out[o * stride + feature] = sums[feature * kOutputs + o];
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <DType kType, int kVectors>
void product_typed(const void* grad_out, int64_t tokens, int64_t outputs,
                   const TopkColumns* columns, int64_t stride, int64_t first_output,
                   int64_t first_feature, int64_t width, int64_t features, float* workspace,
                   float* out) {
  constexpr int kOutputs = kVectors * kLanes;
  float* tile = workspace;
  float* zeros = tile + kTopkTokens * kOutputs;  // the row of token kTopkTokens
  float* sums = zeros + kOutputs;
  std::memset(zeros, 0, static_cast<size_t>(width + 2) * kOutputs * sizeof *sums);
  for (int64_t token = 0; token < tokens; token += kTopkTokens, columns += stride) {
    copy_tile<kType, kOutputs>(grad_out, outputs, token, min_of(tokens - token, kTopkTokens),
                               first_output, tile);
    accumulate<kVectors>(*columns, tile, sums);
  }
  write_sums<kOutputs>(sums, width, min_of(outputs - first_output, kOutputs),
                       out + first_output * features + first_feature, features);
}

template <DType kType>
void product_of(const void* grad_out, int64_t tokens, int64_t outputs, const TopkColumns* columns,
                int64_t stride, int64_t first_output, int64_t first_feature, int64_t width,
                int64_t features, float* workspace, float* out) {
  const int64_t vectors = ceil_div(outputs - first_output, kLanes);
  const auto run = vectors >= 4   ? product_typed<kType, 4>
                   : vectors == 3 ? product_typed<kType, 3>
                   : vectors == 2 ? product_typed<kType, 2>
                                  : product_typed<kType, 1>;
  run(grad_out, tokens, outputs, columns, stride, first_output, first_feature, width, features,
      workspace, out);
}

void product(DType dtype, const void* grad_out, int64_t tokens, int64_t outputs,
             const TopkColumns* columns, int64_t stride, int64_t first_output,
             int64_t first_feature, int64_t width, int64_t features, float* workspace, float* out) {
  MEMTL_FOR_DTYPE(dtype, product_of<kType>(grad_out, tokens, outputs, columns, stride, first_output,
                                           first_feature, width, features, workspace, out))
}

// Against torch's dense product with AVX-512 of 1576 tokens, 768 to 3072 features and back.
#if defined(__AVX512F__)
constexpr double kDenseFrom = 0.4;
#elif defined(__AVX2__)
constexpr double kDenseFrom = 0.3;
#else
constexpr double kDenseFrom = 0.12;
#endif

}  // namespace

extern const TopkKernels topk = {pack,   keys,      count,      threshold, pack_above, starts,
                                 unpack, transpose, kDenseFrom, kTile,     product};

}  // namespace memtl::MEMTL_ISA_NS
