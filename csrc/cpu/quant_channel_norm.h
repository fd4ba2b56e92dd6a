// The backward of batch norm in training from a quantised x-hat, in two passes over memory. The
// definition is in memtl/reference/fused.py; every instruction set gives the same results bit for
// bit.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

// What a channel's elements have in common: grad_x = (grad_out - mean - x_hat * slope) * scale.
struct ChannelGrad {
  float mean;
  float slope;
  float scale;
};

struct QuantChannelNormKernels {
  // Both of a flat tensor of numel elements in planes of `inner`, one a sample and channel; codes
  // and params hold x-hat as in QuantKernels.
  //
  // Adds to sums [planes, 2] those of grad_out and of grad_out * x_hat, on the planes [first,
  // last).
  void (*sums)(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params,
               int bits, int64_t numel, int64_t inner, double* sums, int64_t first, int64_t last);
  // grad_x on the groups [first, last); plane p is of channel p % count.
  void (*grad)(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params,
               int bits, int64_t numel, int64_t inner, const ChannelGrad* channels, int64_t count,
               void* grad_x, int64_t first, int64_t last);
};

MEMTL_DECLARE_KERNELS(QuantChannelNormKernels, quant_channel_norm)

}  // namespace memtl
