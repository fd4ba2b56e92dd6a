// How the kernels read packed rows: the entries of a block, decoded.
#pragma once

#include "topk_block.h"
#include "topk_read.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

MEMTL_INLINE Bits load_bits(const uint8_t* bits, int64_t count) {
  Bits loaded = {};
  std::memcpy(loaded.word, bits, static_cast<size_t>(ceil_div(count, 8)));
  return loaded;
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
#if defined(__AVX512F__)
  uint64_t wrong = 0;
  for (int i = 1; i < count; i += 64) {
    const __mmask64 mask = first_bytes(count - i);
    wrong |= _mm512_mask_cmple_epu8_mask(mask, _mm512_maskz_loadu_epi8(mask, positions + i),
                                         _mm512_maskz_loadu_epi8(mask, positions + i - 1));
  }
#else
  unsigned wrong = 0;
  for (int i = 1; i < count; ++i) wrong |= positions[i] <= positions[i - 1];
#endif
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
  copy_bytes(raw, static_cast<const char*>(packed.values) + place * size, count * size);
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

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
