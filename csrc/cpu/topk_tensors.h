// The tensors of the top-k operators, on any device: what is asked of them, and those that packing
// makes. Nothing here reads what they hold.
#pragma once

#include "tensor.h"
#include "topk_pack.h"

namespace memtl {

inline DType value_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Char:
      return DType::i8;
    default:
      STD_TORCH_CHECK(false, op, ": expected values in float32, bfloat16, float16 or int8, got ",
                      torch::headeronly::toString(dtype));
  }
  return DType::f32;
}

// x [R, n] of topk_pack and topk_pack_sample; returns its dtype.
inline DType check_rows(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected x [R, n], got ", describe(x));
  return floating(op, "x", x.scalar_type());
}

inline void check_quota(const Tensor& x, int64_t k, int64_t k_tail) {
  const int64_t tail = x.size(1) % kBlock;
  STD_TORCH_CHECK(k >= 0 && k <= kBlock, "topk_pack: expected k in [0, 256], got ", k);
  STD_TORCH_CHECK(tail == 0 || (k_tail >= 0 && k_tail <= tail), "topk_pack: x ", describe(x),
                  " has a last block of ", tail, " elements: expected k_tail in [0, ", tail,
                  "], got ", k_tail);
}

inline void check_sample_quota(const Tensor& x, int64_t k) {
  STD_TORCH_CHECK(k >= 0 && k <= x.size(1), "topk_pack_sample: expected k in [0, ", x.size(1),
                  "] for x ", describe(x), ", got ", k);
}

// Entries of a row of n elements.
inline int64_t kept_of(int64_t n, int64_t k, int64_t k_tail) {
  return n / kBlock * k + (n % kBlock ? k_tail : 0);
}

struct Packing {
  Tensor values, positions, scale;
  TopkOutput out;
};

inline Packing allocate_packing(const Tensor& x, int64_t kept, ScalarType value_dtype, DType value,
                                bool bitmap) {
  const int64_t rows = x.size(0), n = x.size(1);
  const int64_t values_size[] = {rows, kept};
  const int64_t positions_size[] = {rows, bitmap ? ceil_div(n, 8) : kept};
  const int64_t scale_size[] = {rows, ceil_div(n, kBlock)};
  const int64_t empty[] = {0};
  using Size = torch::headeronly::IntHeaderOnlyArrayRef;
  const Size scale_shape = value == DType::i8 ? Size(scale_size, 2) : Size(empty, 1);
  Packing packing;
  packing.values = torch::stable::new_empty(x, values_size, value_dtype);
  packing.positions = torch::stable::new_empty(x, positions_size, ScalarType::Byte);
  packing.scale = torch::stable::new_empty(x, scale_shape, ScalarType::BFloat16);
  packing.out = {value,
                 packing.values.data_ptr(),
                 data<uint8_t>(packing.positions),
                 value == DType::i8 ? data<uint16_t>(packing.scale) : nullptr,
                 nullptr,
                 kept,
                 bitmap};
  return packing;
}

// One of the tensors beside values [R, K].
inline void check_beside(const char* op, const Tensor& x, const char* name, ScalarType dtype,
                         const Tensor& values, int64_t columns, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.dim() == 2 && x.size(0) == values.size(0) &&
                      x.size(1) == columns,
                  op, ": expected ", name, " ", torch::headeronly::toString(dtype), " [",
                  values.size(0), ", ", columns, "] beside values ", describe(values),
                  " for n = ", n, ", got ", describe(x));
}

// Packed rows of n elements; returns the dtype of the values.
inline DType check_packed(const char* op, const Tensor& values, const Tensor& positions,
                          const Tensor& scale, const Tensor& counts, int64_t n, int64_t k,
                          int64_t k_tail, bool bitmap) {
  STD_TORCH_CHECK(values.dim() == 2, op, ": expected values [R, K], got ", describe(values));
  STD_TORCH_CHECK(n >= 0, op, ": expected n of 0 or more, got ", n);
  const DType value = value_type(op, values.scalar_type());
  const int64_t rows = values.size(0), kept = values.size(1), blocks = ceil_div(n, kBlock);
  check_beside(op, positions, "positions", ScalarType::Byte, values, bitmap ? ceil_div(n, 8) : kept,
               n);
  if (value == DType::i8) check_beside(op, scale, "scale", ScalarType::BFloat16, values, blocks, n);
  if (rows == 0) return value;
  if (counts.numel() > 0) {
    check_beside(op, counts, "counts", ScalarType::Short, values, blocks, n);
    return value;
  }
  const int64_t tail = n % kBlock, wanted = kept_of(n, k, k_tail);
  STD_TORCH_CHECK(k >= 0 && k <= kBlock && (tail == 0 || (k_tail >= 0 && k_tail <= tail)), op,
                  ": expected k in [0, 256] and k_tail in [0, ", tail, "] for n = ", n, ", got ", k,
                  " and ", k_tail);
  STD_TORCH_CHECK(kept == wanted, op, ": expected values [", rows, ", ", wanted, "] for n = ", n,
                  ", k = ", k, ", k_tail = ", k_tail, ", got ", describe(values));
  return value;
}

}  // namespace memtl
