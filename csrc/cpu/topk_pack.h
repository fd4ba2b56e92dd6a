// topk_pack, topk_pack_sample: the largest magnitudes of every block of 256, or of a row.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

// Where the packed rows go; positions are a bitmap or one byte an entry.
struct TopkOutput {
  DType value;
  void* values;        // [rows, kept]
  uint8_t* positions;  // [rows, kept] or [rows, ceil(n / 8)]
  uint16_t* scale;     // [rows, blocks] bfloat16 of int8 values, else null
  int16_t* counts;     // [rows, blocks] entries of a block, or null
  int64_t kept;
  bool bitmap;
};

struct TopkPackKernels {
  // Rows [first, last) of x [rows, n]: the k largest of a block, k_tail of a shorter last one.
  void (*pack)(DType dtype, const void* x, int64_t n, int64_t k, int64_t k_tail,
               const TopkOutput& out, int64_t first, int64_t last);

  // The bit patterns of |x|, by which magnitudes are ordered.
  void (*keys)(DType dtype, const void* x, int64_t count, uint32_t* keys);
  // The elements with a key above hi, and those in [lo, hi], of which up to `room` keys are stored.
  // keys holds room + 16.
  void (*count)(DType dtype, const void* x, int64_t count, uint32_t lo, uint32_t hi, int64_t* above,
                int64_t* inside, uint32_t* keys, int64_t room);
  // A threshold in [lo, hi]: fewer than k (or, exactly, k) keys are above it, and with those equal
  // to it there are at least k. All keys are in [lo, hi]. 0 < k <= count.
  uint32_t (*threshold)(const uint32_t* keys, int64_t count, int64_t k, uint32_t lo, uint32_t hi,
                        int64_t* above);
  // Blocks [first, last) of row `row` of x: everything above the threshold and the first `ties` of
  // those equal to it; the first entry goes to place `start` of the row.
  void (*pack_above)(DType dtype, const void* x, int64_t n, int64_t row, int64_t first,
                     int64_t last, uint32_t threshold, int64_t ties, int64_t start,
                     const TopkOutput& out);
};

MEMTL_DECLARE_KERNELS(TopkPackKernels, topk_pack)

}  // namespace memtl
