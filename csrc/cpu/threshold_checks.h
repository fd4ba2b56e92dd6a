// What the operators of `threshold` check of their arguments on every device.
#pragma once

#include <optional>
#include <vector>

#include "cpu/tensor.h"

namespace memtl {

// The dtype of xs.
inline DType check_lists(const char* op, const std::vector<Tensor>& xs,
                         const std::vector<Tensor>& masks) {
  STD_TORCH_CHECK(!xs.empty(), op, ": expected one tensor or more, got none");
  STD_TORCH_CHECK(masks.empty() || masks.size() == xs.size(), op, ": expected no masks, or ",
                  xs.size(), " as there are tensors, got ", masks.size());
  const DType dtype = floating(op, "xs", xs[0].scalar_type());
  for (size_t t = 0; t < xs.size(); ++t) {
    STD_TORCH_CHECK(xs[t].scalar_type() == xs[0].scalar_type(), op,
                    ": expected tensors of one dtype, got ", describe(xs[0]), " and ",
                    describe(xs[t]));
    if (!masks.empty()) check_bits_of(op, xs[t], masks[t]);
  }
  return dtype;
}

inline void check_k(const char* op, int64_t k, int64_t total) {
  STD_TORCH_CHECK(0 <= k && k <= total, op, ": expected k from 0 to ", total,
                  ", as there are elements, got ", k);
}

// The dtype of x.
inline DType check_threshold(const char* op, const Tensor& x, const std::optional<Tensor>& mask,
                             const Tensor& value, const Tensor& ties) {
  const DType dtype = floating(op, "x", x.scalar_type());
  if (mask) check_bits_of(op, x, *mask);
  STD_TORCH_CHECK(value.scalar_type() == x.scalar_type() && value.numel() == 1, op,
                  ": expected one value in the dtype of x, got ", describe(value), " for x ",
                  describe(x));
  STD_TORCH_CHECK(ties.scalar_type() == ScalarType::Long && ties.numel() == 1, op,
                  ": expected one number of ties of int64, got ", describe(ties));
  return dtype;
}

}  // namespace memtl
