// What the operators of `bits` check of their arguments, and make of them, on every device.
#pragma once

#include <limits>
#include <optional>

#include "cpu/tensor.h"

namespace memtl {

inline void check_bool(const char* op, const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": expected mask of bool, got ",
                  describe(mask));
}

inline void check_values(const char* op, const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 1, op, ": expected values [count], got ", describe(values));
}

// A bound as a number of dtype, as torch compares a tensor with it; NaN for none.
inline double bound(std::optional<double> value, DType dtype) {
  if (!value) return std::numeric_limits<double>::quiet_NaN();
  if (dtype == DType::f64) return *value;
  const auto narrow = static_cast<float>(*value);
  if (dtype == DType::bf16) return bfloat16_to_float(float_to_bfloat16(narrow));
  if (dtype == DType::f16) return half_to_float(float_to_half(narrow));
  return narrow;
}

}  // namespace memtl
