// bits: one bit an element of the flat tensor, least significant bit first.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

struct BitsKernels {
  // Bytes [first, last) of bits from mask [numel], a byte an element, set where it is not 0. The
  // bits beyond numel are 0.
  void (*pack)(const uint8_t* mask, int64_t numel, uint8_t* bits, int64_t first, int64_t last);
  // The same of x, set unless x[i] <= lo or x[i] >= hi; a bound that is NaN is none. Both are
  // numbers of x's dtype.
  void (*pack_between)(DType dtype, const void* x, double lo, double hi, int64_t numel,
                       uint8_t* bits, int64_t first, int64_t last);
  // out[i] = bit i ? x[i] * scale : 0 for the elements of bytes [first, last) of bits.
  void (*apply)(DType dtype, const void* x, const uint8_t* bits, double scale, int64_t numel,
                void* out, int64_t first, int64_t last);
  // How many of the first numel bits are set in bytes [first, last).
  int64_t (*count)(const uint8_t* bits, int64_t numel, int64_t first, int64_t last);
  // The elements of those bytes, of `size` bytes each, whose bit is set, to selected[0], ...: as
  // many as `count` says, and nothing is touched behind them.
  void (*select)(int64_t size, const void* x, const uint8_t* bits, int64_t numel, void* selected,
                 int64_t first, int64_t last);
  // The inverse: out where a bit is set from values[0], ..., and 0 elsewhere.
  void (*expand)(int64_t size, const void* values, const uint8_t* bits, int64_t numel, void* out,
                 int64_t first, int64_t last);
};

MEMTL_DECLARE_KERNELS(BitsKernels, bits)

}  // namespace memtl
