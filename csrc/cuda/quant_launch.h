// What the host side of the operators of quant shares.
#pragma once

#include "cpu/quant_checks.h"
#include "cuda/launch.h"
#include "cuda/quant_codes.cuh"

namespace memtl::cuda {

inline unsigned group_blocks(int64_t numel) {
  return blocks_of(ceil_div(numel, kGroup), kQuantThreads / kLanes);
}

// Contiguous, and beginning where whole words may be read.
inline Tensor whole_words(const Tensor& x) {
  const Tensor flat = as_contiguous(x);
  return aligned16(flat) ? flat : torch::stable::clone(flat);
}

struct Packed {
  Tensor codes, params;

  uint8_t* to_codes() { return static_cast<uint8_t*>(codes.mutable_data_ptr()); }
  uint32_t* to_params() { return static_cast<uint32_t*>(params.mutable_data_ptr()); }
  const uint8_t* of_codes() const { return static_cast<const uint8_t*>(codes.const_data_ptr()); }
  const uint32_t* of_params() const {
    return static_cast<const uint32_t*>(params.const_data_ptr());
  }
};

inline Tensor new_codes(const Tensor& x, int64_t bits) {
  const int64_t size[] = {ceil_div(x.numel(), kGroup), 8 * bits};
  return empty_beside(x, size, ScalarType::Byte);
}

inline Packed new_packed(const Tensor& x, int64_t bits) {
  const int64_t size[] = {ceil_div(x.numel(), kGroup), 2};
  return {new_codes(x, bits), empty_beside(x, size, ScalarType::BFloat16)};
}

// What holds numel elements, checked.
inline Packed packed_of(const char* op, const Tensor& codes, const Tensor& params, int64_t bits,
                        int64_t numel) {
  check_bits(op, bits);
  return {whole_words(checked_codes(op, codes, bits, numel)),
          whole_words(checked_params(op, params, codes))};
}

// A floating tensor's numbers in float32, where kernels read them.
inline Tensor numbers_of(const char* op, const char* what, const Tensor& x, int64_t numel,
                         const Tensor& codes) {
  floating(op, what, x.scalar_type());
  check_beside(op, what, x, codes);
  STD_TORCH_CHECK(x.numel() == numel, op, ": expected ", what, " of ", numel, " elements, got ",
                  describe(x));
  return whole_words(torch::stable::to(x, ScalarType::Float));
}

inline const float* floats_of(const Tensor& x) {
  return static_cast<const float*>(x.const_data_ptr());
}

// Calls run.template operator()<T, kBits>().
template <class Run>
void with_bits(DType dtype, int64_t bits, const Run& run) {
  with_type(dtype, [&]<class T, class Math>() {
    if (bits == 8) return run.template operator()<T, 8>();
    if (bits == 4) return run.template operator()<T, 4>();
    if (bits == 3) return run.template operator()<T, 3>();
    return run.template operator()<T, 2>();
  });
}

}  // namespace memtl::cuda
