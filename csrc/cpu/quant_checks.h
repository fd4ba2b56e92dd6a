// What the operators of quant ask of their arguments.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "quant.h"
#include "quant_fused.h"
#include "tensor.h"

namespace memtl {

inline void check_bits(const char* op, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 3 || bits == 2, op,
                  ": expected bits 8, 4, 3 or 2, got ", bits);
}

// The same seed for every kernel: 64 bits folded to 32.
inline uint32_t fold(int64_t seed) {
  const auto wide = static_cast<uint64_t>(seed);
  return static_cast<uint32_t>(wide) ^ static_cast<uint32_t>(wide >> 32);
}

inline Act act_named(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish", "mish"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) return static_cast<Act>(i);
  }
  STD_TORCH_CHECK(false, op,
                  ": expected gelu, gelu_tanh, silu, quick_gelu, hardswish or mish, got ", name);
  return Act::gelu;
}

inline QuantRange range_of(const char* op, int64_t bits, double lo, double hi) {
  const double levels = static_cast<double>((1 << bits) - 2);
  const QuantRange range{static_cast<float>(lo), static_cast<float>(hi),
                         static_cast<float>((hi - lo) / levels)};
  STD_TORCH_CHECK(lo < hi, op, ": expected lo < hi, got ", lo, " and ", hi);
  STD_TORCH_CHECK(
      std::isfinite(range.lo) && std::isfinite(range.hi) && std::isnormal(range.step), op,
      ": expected lo and hi, and the steps between them, to be numbers of float32, got ", lo,
      " and ", hi);
  return range;
}

inline Ends ends_of(const char* op, double lo, std::optional<double> hi) {
  STD_TORCH_CHECK(!hi || lo < *hi, op, ": expected lo < hi, got lo ", lo, " and hi ", *hi);
  const double high = hi.value_or(lo);
  return {static_cast<float>(lo), static_cast<float>(high), static_cast<float>((lo + high) / 2)};
}

inline int64_t numel_of(const std::vector<int64_t>& size) {
  int64_t numel = 1;
  for (int64_t each : size) numel *= each;
  return numel;
}

// Element i is of channel (i / inner) % channels. Not by their product: that may overflow.
inline void check_channels(const char* op, int64_t channels, int64_t inner, int64_t numel) {
  STD_TORCH_CHECK(channels > 0 && numel % inner == 0 && numel / inner % channels == 0, op, ": ",
                  channels, " channels of ", inner, " do not divide ", numel, " elements");
}

inline void check_beside(const char* op, const char* what, const Tensor& x, const Tensor& codes) {
  STD_TORCH_CHECK(x.is_cpu() == codes.is_cpu() && x.get_device_index() == codes.get_device_index(),
                  op, ": expected ", what, " on the device of codes");
}

// codes as a flat contiguous tensor that holds numel elements in so many bits.
inline Tensor checked_codes(const char* op, const Tensor& codes, int64_t bits, int64_t numel) {
  const int64_t groups = ceil_div(numel, kGroup);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, op, ": expected codes of uint8, got ",
                  describe(codes));
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) == groups && codes.size(1) == 8 * bits, op,
                  ": ", numel, " elements in ", bits, " bits need codes [", groups, ", ", 8 * bits,
                  "], got ", describe(codes));
  return torch::stable::contiguous(codes);
}

inline Tensor checked_params(const char* op, const Tensor& params, const Tensor& codes) {
  STD_TORCH_CHECK(params.scalar_type() == ScalarType::BFloat16 && params.dim() == 2 &&
                      params.size(0) == codes.size(0) && params.size(1) == 2,
                  op, ": expected params of bfloat16 [", codes.size(0), ", 2], got ",
                  describe(params));
  check_beside(op, "params", params, codes);
  return torch::stable::contiguous(params);
}

// numel numbers of any floating dtype, and room for some more.
inline std::vector<float> as_floats(const char* op, const char* what, const Tensor& x,
                                    int64_t numel, int64_t room) {
  const DType dtype = floating(op, what, x.scalar_type());
  STD_TORCH_CHECK(x.is_cpu(), op, ": expected ", what, " on the CPU, as codes are");
  STD_TORCH_CHECK(x.numel() == numel, op, ": expected ", what, " of ", numel, " elements, got ",
                  describe(x));
  const Tensor flat = torch::stable::contiguous(x);
  std::vector<float> floats(static_cast<size_t>(numel + room));
  for (int64_t i = 0; i < numel; ++i) {
    floats[static_cast<size_t>(i)] = load_float(dtype, flat.const_data_ptr(), i);
  }
  return floats;
}

// As Channels wants it; empty where there is none.
inline std::vector<float> channel_table(const char* op, const char* what,
                                        const std::optional<Tensor>& given) {
  std::vector<float> table;
  if (!given) return table;
  const DType dtype = floating(op, what, given->scalar_type());
  STD_TORCH_CHECK(given->is_cpu(), op, ": expected ", what, " on the CPU, as codes are");
  const Tensor flat = torch::stable::contiguous(*given);
  const int64_t channels = flat.numel();
  STD_TORCH_CHECK(channels > 0, op, ": expected ", what, " of a channel at least, got ",
                  describe(flat));
  table.resize(static_cast<size_t>(channels + kGroup));
  for (int64_t i = 0; i < channels + kGroup; ++i) {
    table[static_cast<size_t>(i)] = load_float(dtype, flat.const_data_ptr(), i % channels);
  }
  return table;
}

constexpr int64_t kGroupGrain = kGrain / kGroup;

}  // namespace memtl
