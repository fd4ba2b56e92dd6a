#include "topk_pack.h"
#include "topk_select.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// A block as floats: in place, or in `buffer`, filled up with zeros.
template <DType kType>
MEMTL_INLINE const float* load_block(const void* x, int64_t first, int64_t count, float* buffer) {
  if (count == kBlock) {
    if constexpr (kType == DType::f32) return static_cast<const float*>(x) + first;
    for (int i = 0; i < kBlock; i += kWidth) store(buffer + i, load<kType>(x, first + i));
  } else {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(buffer + i, load<kType>(x, first + i));
    for (; i < count; ++i) buffer[i] = load_float(kType, x, first + i);
    for (; i < kBlock; ++i) buffer[i] = 0;
  }
  return buffer;
}

// What will be read after the blocks at hand, so that it is there by then.
template <DType kType>
MEMTL_INLINE void prefetch_block(const void* x, int64_t first) {
  const char* from = static_cast<const char*>(x) + first * size_of(kType);
  for (int i = 0; i < kBlock * size_of(kType); i += 64) __builtin_prefetch(from + i);
}

// ------------------------------------------------------------------------------ writing a block

// The elements at the positions, the last vector filled up with zeros.
MEMTL_INLINE void gather(const float* block, const uint8_t* positions, int count, float* kept) {
#if defined(__AVX512F__)
  for (int i = 0; i < count; i += 16) {
    store(kept + i, _mm512_mask_i32gather_ps(floats(0), first_lanes(count - i),
                                             load_bytes(positions + i), block, 4));
  }
#else
  for (int i = 0; i < count; ++i) kept[i] = block[positions[i]];
  for (int i = count; i < count + kWidth; ++i) kept[i] = 0;
#endif
}

// The scale of int8 codes: the largest finite magnitude over 126, rounded up to bfloat16. Says
// whether all are finite.
MEMTL_INLINE float scale_of(const float* kept, int count, bool* finite) {
  Ints largest = ints(0), bounded = ints(0);
  for (int i = 0; i < count; i += kWidth) {
    const Ints bits = bit_and(as_ints(load(kept + i)), ints(kMagnitude));
    largest = max(largest, bits);
    bounded = max(bounded, MEMTL_ISA_NS::select(greater(ints(kInfinity), bits), bits, ints(0)));
  }
  *finite = highest(largest) < kInfinity;
  const float scale = bfloat16_up(bits_float(highest(bounded)) / 126.0f);
  const float smallest = bits_float(0x00800000);
  return scale > smallest ? scale : smallest;
}

MEMTL_INLINE void encode(const float* kept, int count, float scale, bool finite, uint8_t* codes) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: its sum with a small number is rounded to whole
  for (int i = 0; i < count; i += kWidth) {
    const Floats x = load(kept + i);
    Ints byte = as_ints(add(div(x, floats(scale)), floats(rounder)));
    if (!finite) {
      const Ints bits = as_ints(x);
      byte = MEMTL_ISA_NS::select(equal(bits, ints(kInfinity)), ints(127), byte);
      byte = MEMTL_ISA_NS::select(equal(bits, ints(kInfinity | ~kMagnitude)), ints(0x81), byte);
      byte = MEMTL_ISA_NS::select(is_nan(x), ints(0x80), byte);
    }
    store_bytes(codes + i, bit_and(byte, ints(0xff)), count - i);
  }
}

// Writes the chosen elements of block `index` of row `row` from place `start` of the row on.
MEMTL_INLINE int64_t write_block(const float* block, const Bits& bits, int64_t row, int64_t index,
                                 int64_t n, int64_t start, const TopkOutput& out) {
  alignas(64) uint8_t positions[kPadded];
  alignas(64) float kept[kPadded];
  const int count = list_positions(bits, positions);
  gather(block, positions, count, kept);
  const int64_t place = row * out.kept + start;
  const int64_t blocks = ceil_div(n, kBlock);
  if (out.bitmap) {
    const int64_t bytes = min_of(ceil_div(n - index * kBlock, 8), kBlock / 8);
    std::memcpy(out.positions + row * ceil_div(n, 8) + index * (kBlock / 8), bits.word,
                static_cast<size_t>(bytes));
  } else {
    copy_bytes(out.positions + place, positions, count);
  }
  if (out.counts) out.counts[row * blocks + index] = static_cast<int16_t>(count);
  alignas(64) uint16_t narrow[kPadded];
  switch (out.value) {
    case DType::i8: {
      bool finite;
      const float scale = scale_of(kept, count, &finite);
      encode(kept, count, scale, finite, static_cast<uint8_t*>(out.values) + place);
      out.scale[row * blocks + index] = static_cast<uint16_t>(float_bits(scale) >> 16);
      break;
    }
    case DType::bf16:
      for (int i = 0; i < count; i += kWidth) store_bfloat16(narrow + i, load(kept + i));
      copy_bytes(static_cast<uint16_t*>(out.values) + place, narrow, 2 * count);
      break;
    case DType::f16:
      for (int i = 0; i < count; i += kWidth) store_half(narrow + i, load(kept + i));
      copy_bytes(static_cast<uint16_t*>(out.values) + place, narrow, 2 * count);
      break;
    default:
      copy_bytes(static_cast<float*>(out.values) + place, kept, 4 * count);
  }
  return count;
}

// A block of x [rows, n], one after the other.
struct Place {
  int64_t row, index;

  int64_t size(int64_t n) const { return min_of(n - index * kBlock, kBlock); }
  void advance(int64_t n) {
    const bool last = (index + 1) * kBlock >= n;
    row += last;
    index = last ? 0 : index + 1;
  }
};

template <DType kType>
void pack_typed(const void* x, int64_t n, int64_t k, int64_t k_tail, const TopkOutput& out,
                int64_t first, int64_t last) {
  if (n == 0) return;
  alignas(64) float buffers[kTogether][kBlock];
  const float* blocks[kTogether];
  Place places[kTogether];
  int wanted[kTogether];
  Bits bits[kTogether];
  Selection selection(kFineShift<kType>);
  for (Place place{first, 0}; place.row < last;) {
    int count = 0;
    for (; count < kTogether && place.row < last; ++count, place.advance(n)) {
      const int64_t size = place.size(n);
      blocks[count] =
          load_block<kType>(x, place.row * n + place.index * kBlock, size, buffers[count]);
      places[count] = place;
      wanted[count] = static_cast<int>(size == kBlock ? k : k_tail);
    }
    selection.select(blocks, wanted, count, bits);
    for (int i = 0; i < count; ++i) {
      const auto [row, index] = places[i];
      prefetch_block<kType>(x, min_of(row * n + (index + kTogether) * kBlock, last * n - 1));
      write_block(blocks[i], bits[i], row, index, n, index * k, out);
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
    const __m512i key = bit_and(_mm512_loadu_si512(block + 16 * i), ints(kMagnitude));
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
