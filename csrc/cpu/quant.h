// quant: groups of 64 elements in 8, 4, 3 or 2 bits, rounded stochastically. The definition is
// memtl/reference/quant.py; every instruction set gives its results bit for bit.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

// What quant_pack_range and quant_unpack_range know of their levels.
struct QuantRange {
  float lo;
  float hi;
  float step;
};

// The factors and summands of channels, c = (i / inner) % channels for element i; either may be
// null. They are followed by kGroup more, as if they began again.
struct Channels {
  const float* weight;
  const float* bias;
  int64_t channels;
  int64_t inner;
};

struct QuantKernels {
  // All of them work on the groups [first, last) of a flat tensor of numel elements. bits is 8, 4,
  // 3 or 2. codes [groups, 8 * bits]; params [groups, 2] bfloat16, scale and offset; seed folded
  // to 32 bits.
  void (*pack)(DType dtype, const void* x, int64_t numel, int bits, uint32_t seed, uint8_t* codes,
               uint16_t* params, int64_t first, int64_t last);
  // Packs (x - bias) * weight of its channel.
  void (*pack_normalized)(DType dtype, const void* x, int64_t numel, const Channels& channels,
                          int bits, uint32_t seed, uint8_t* codes, uint16_t* params, int64_t first,
                          int64_t last);
  void (*unpack)(DType dtype, const uint8_t* codes, const uint16_t* params, int bits, void* out,
                 int64_t numel, int64_t first, int64_t last);
  void (*pack_range)(DType dtype, const void* x, int64_t numel, int bits, QuantRange range,
                     uint32_t seed, uint8_t* codes, int64_t first, int64_t last);
  void (*unpack_range)(DType dtype, const uint8_t* codes, int bits, QuantRange range, void* out,
                       int64_t numel, int64_t first, int64_t last);
};

MEMTL_DECLARE_KERNELS(QuantKernels, quant)

}  // namespace memtl
