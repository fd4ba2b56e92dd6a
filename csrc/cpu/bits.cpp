#include "bits.h"

#include <limits>
#include <optional>

#include "tensor.h"

namespace memtl {
namespace {

Tensor bits_pack_cpu(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "bits_pack: expected mask of bool, got ",
                  describe(mask));
  const Tensor flat = torch::stable::contiguous(mask);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, 8)};
  Tensor bits = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const auto* in = static_cast<const uint8_t*>(flat.const_data_ptr());
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, size[0], kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.pack(in, numel, out, first, last);
  });
  return bits;
}

// A bound as a number of dtype, as torch compares a tensor with it; NaN for none.
double bound(std::optional<double> value, DType dtype) {
  if (!value) return std::numeric_limits<double>::quiet_NaN();
  if (dtype == DType::f64) return *value;
  const auto narrow = static_cast<float>(*value);
  if (dtype == DType::bf16) return bfloat16_to_float(float_to_bfloat16(narrow));
  if (dtype == DType::f16) return half_to_float(float_to_half(narrow));
  return narrow;
}

Tensor bits_pack_between_cpu(const Tensor& x, std::optional<double> lo, std::optional<double> hi) {
  const DType dtype = floating("bits_pack_between", "x", x.scalar_type());
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, 8)};
  Tensor bits = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const double low = bound(lo, dtype), high = bound(hi, dtype);
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, size[0], kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.pack_between(dtype, in, low, high, numel, out, first, last);
  });
  return bits;
}

Tensor bits_apply_cpu(const Tensor& x, const Tensor& bits, double scale) {
  const DType dtype = floating("bits_apply", "x", x.scalar_type());
  const int64_t numel = x.numel();
  check_bits_of("bits_apply", x, bits);
  const Tensor flat = torch::stable::contiguous(x);
  const Tensor packed = torch::stable::contiguous(bits);
  Tensor result = torch::stable::new_empty(flat, flat.sizes());
  const void* in = flat.const_data_ptr();
  const auto* in_bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, packed.numel(), kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.apply(dtype, in, in_bits, scale, numel, out, first, last);
  });
  return result;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("bits_pack", TORCH_BOX(&memtl::bits_pack_cpu));
  m.impl("bits_pack_between", TORCH_BOX(&memtl::bits_pack_between_cpu));
  m.impl("bits_apply", TORCH_BOX(&memtl::bits_apply_cpu));
}
