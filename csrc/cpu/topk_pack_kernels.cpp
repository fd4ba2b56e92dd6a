#include "topk_block.h"
#include "topk_pack.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

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
                uint32_t threshold, int64_t ties, int64_t start, const TopkOutput& out) {
  MEMTL_FOR_DTYPE(dtype,
                  pack_above_typed<kType>(x, n, row, first, last, threshold, ties, start, out))
}

}  // namespace

extern const TopkPackKernels topk_pack = {pack, keys, count, threshold, pack_above};

}  // namespace memtl::MEMTL_ISA_NS
