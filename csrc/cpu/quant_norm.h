// The backward of layer and RMS norm from a quantised x-hat, in one pass over memory. The
// definition is in memtl/reference/fused.py; every instruction set gives the same results bit for
// bit.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

constexpr int kNormLanes = 16;  // sums are taken in so many parts, whatever a vector's width

// What the rows have in common. features D; weight [D], and kNormLanes more that are not used.
struct Norm {
  int64_t features;
  const float* weight;
  bool centered;  // the mean was subtracted
};

struct QuantNormKernels {
  // The rows [first, last) of grad_out and grad_x [rows, D]; codes and params hold x-hat as in
  // QuantKernels, rstd [rows]. x_hat is room for D + 2 * kGroup; grad_weight and grad_bias [D], and
  // kNormLanes more, are added to.
  void (*grad)(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params,
               int bits, const float* rstd, const Norm& norm, void* grad_x, float* x_hat,
               float* grad_weight, float* grad_bias, int64_t first, int64_t last);
};

MEMTL_DECLARE_KERNELS(QuantNormKernels, quant_norm)

}  // namespace memtl
