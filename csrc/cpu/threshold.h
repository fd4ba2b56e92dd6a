// threshold: the k largest magnitudes of many tensors.
//
// The bits of |x|, read as an unsigned number, are in the order of the magnitudes: that is an
// element's key. NaN has the first key behind infinity's, whatever its own bits.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

constexpr uint64_t infinite_key(DType dtype) {
  return dtype == DType::f64    ? 0x7ff0000000000000
         : dtype == DType::f32  ? 0x7f800000
         : dtype == DType::bf16 ? 0x7f80
                                : 0x7c00;
}

// Keys from lo to hi, both included, in buckets of 1 << shift.
struct KeyRange {
  uint64_t lo, hi;
  int shift;
};

// The kernels see elements [first, last) of x, and of those the ones whose bit is set in `mask`
// (null: all of them). `first` is a multiple of 64.
struct ThresholdKernels {
  // Counts into the buckets of a range; returns how many are above it.
  int64_t (*count)(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
                   KeyRange range, uint32_t* buckets);
  // Writes the magnitudes in a range, in order, to `found`, with room for all; adds to *above how
  // many are above it, and returns how many were written.
  int64_t (*collect)(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
                     KeyRange range, void* found, int64_t* above);
  // The bits of what is above a key, and of the first `quota` that have it; those beyond `last` in
  // the last byte are 0. Returns how many have it.
  int64_t (*mark)(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
                  uint64_t key, int64_t quota, uint8_t* bits);
};

MEMTL_DECLARE_KERNELS(ThresholdKernels, threshold)

}  // namespace memtl
