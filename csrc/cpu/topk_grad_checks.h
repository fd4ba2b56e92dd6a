// What topk_weight_grad asks of its arguments, on any device, beside packed rows that were checked.
#pragma once

#include "tensor.h"

namespace memtl {

// grad_out [T, O], T being the tokens that rows of n elements hold; returns its dtype.
inline DType check_grad_out(const Tensor& grad_out, const Tensor& values, int64_t n,
                            int64_t features) {
  STD_TORCH_CHECK(grad_out.dim() == 2, "topk_weight_grad: expected grad_out [T, O], got ",
                  describe(grad_out));
  STD_TORCH_CHECK(features >= 0 && features < (int64_t{1} << 24),
                  "topk_weight_grad: expected features in [0, 2^24), got ", features);
  STD_TORCH_CHECK(grad_out.size(0) * features == values.size(0) * n,
                  "topk_weight_grad: ", values.size(0), " rows of ", n, " are not ",
                  grad_out.size(0), " tokens of ", features, " features, those of grad_out ",
                  describe(grad_out));
  return floating("topk_weight_grad", "grad_out", grad_out.scalar_type());
}

}  // namespace memtl
