// quant, decoded and used, or computed and packed, in one pass over memory. The definitions are in
// memtl/reference/fused.py; every instruction set gives the same results bit for bit, but for the
// sign of a NaN.
#pragma once

#include "common/isa.h"
#include "common/layout.h"
#include "quant.h"

namespace memtl {

enum class Act { gelu, gelu_tanh, silu, quick_gelu, hardswish, mish };

// What stands where a mask has no bit: lo below the middle, else hi. One end: the same twice.
struct Ends {
  float lo;
  float hi;
  float middle;
};

struct QuantFusedKernels {
  // All of them work on the groups [first, last) of a flat tensor of numel elements. bits is 8, 4,
  // 3 or 2; codes and params as in QuantKernels.
  //
  // decoded * weight + bias, and the nearer end where a bit of mask (null: none) is clear.
  void (*unpack_affine)(DType dtype, const uint8_t* codes, const uint16_t* params, int bits,
                        const Channels& channels, const uint8_t* mask, Ends ends, void* out,
                        int64_t numel, int64_t first, int64_t last);
  // f(decoded).
  void (*unpack_activation)(DType dtype, const uint8_t* codes, const uint16_t* params, int bits,
                            Act act, void* out, int64_t numel, int64_t first, int64_t last);
  // x * f'(decoded); x and out have the dtype.
  void (*activation_grad)(DType dtype, const void* x, const uint8_t* codes, const uint16_t* params,
                          int bits, Act act, void* out, int64_t numel, int64_t first, int64_t last);
  // f'(x), packed as by QuantKernels::pack_range but for the dither, which is that of x. At the
  // infinities f' is NaN, except hardswish's.
  void (*pack_derivative)(DType dtype, const void* x, int64_t numel, int bits, Act act,
                          QuantRange range, uint32_t seed, uint8_t* codes, int64_t first,
                          int64_t last);
  // x * decoded, on a fixed range.
  void (*apply_range)(DType dtype, const void* x, const uint8_t* codes, int bits, QuantRange range,
                      void* out, int64_t numel, int64_t first, int64_t last);
};

MEMTL_DECLARE_KERNELS(QuantFusedKernels, quant_fused)

}  // namespace memtl
