#include "quant_fused.h"

#include <optional>
#include <string>
#include <vector>

#include "quant_checks.h"

namespace memtl {
namespace {

Tensor quant_unpack_affine_cpu(const Tensor& codes, const Tensor& params, int64_t bits,
                               const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                               int64_t inner, std::vector<int64_t> size, ScalarType dtype,
                               double lo, std::optional<double> hi) {
  const char* op = "quant_unpack_affine";
  const Ends ends = ends_of(op, lo, hi);
  const DType out_dtype = floating(op, "a result", dtype);
  check_bits(op, bits);
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  const int64_t numel = numel_of(size);
  const Tensor packed = checked_codes(op, codes, bits, numel);
  const Tensor flat_params = checked_params(op, params, packed);
  Tensor result = torch::stable::new_empty(packed, size, dtype);
  if (numel == 0) return result;
  const std::vector<float> weights = channel_table(op, "weight", weight);
  const std::vector<float> biases = channel_table(op, "bias", bias);
  STD_TORCH_CHECK(!weight || !bias || weights.size() == biases.size(), op,
                  ": expected weight and bias of one size, got ", weights.size() - kGroup, " and ",
                  biases.size() - kGroup);
  std::optional<Tensor> bytes;
  if (mask) {
    check_bits_of(op, result, *mask);
    bytes = torch::stable::contiguous(*mask);
  }
  const size_t table = weight ? weights.size() : bias ? biases.size() : kGroup + 1;
  const Channels channels{weight ? weights.data() : nullptr, bias ? biases.data() : nullptr,
                          static_cast<int64_t>(table) - kGroup, inner};
  check_channels(op, channels.channels, inner, numel);
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  const auto* in_mask = bytes ? static_cast<const uint8_t*>(bytes->const_data_ptr()) : nullptr;
  void* out = result.mutable_data_ptr();
  const QuantFusedKernels& kernels = quant_fused_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.unpack_affine(out_dtype, in_codes, in_params, static_cast<int>(bits), channels, in_mask,
                          ends, out, numel, first, last);
  });
  return result;
}

Tensor quant_unpack_activation_cpu(const Tensor& codes, const Tensor& params, int64_t bits,
                                   std::string activation, std::vector<int64_t> size,
                                   ScalarType dtype) {
  const char* op = "quant_unpack_activation";
  const DType out_dtype = floating(op, "a result", dtype);
  check_bits(op, bits);
  const Act act = act_named(op, activation);
  const int64_t numel = numel_of(size);
  const Tensor packed = checked_codes(op, codes, bits, numel);
  const Tensor flat_params = checked_params(op, params, packed);
  Tensor result = torch::stable::new_empty(packed, size, dtype);
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const QuantFusedKernels& kernels = quant_fused_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.unpack_activation(out_dtype, in_codes, in_params, static_cast<int>(bits), act, out,
                              numel, first, last);
  });
  return result;
}

Tensor quant_activation_grad_cpu(const Tensor& grad_out, const Tensor& codes, const Tensor& params,
                                 int64_t bits, std::string activation) {
  const char* op = "quant_activation_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  check_bits(op, bits);
  const Act act = act_named(op, activation);
  const Tensor flat = torch::stable::contiguous(grad_out);
  const int64_t numel = flat.numel();
  const Tensor packed = checked_codes(op, codes, bits, numel);
  const Tensor flat_params = checked_params(op, params, packed);
  Tensor result = torch::stable::new_empty(flat, flat.sizes());
  const void* in = flat.const_data_ptr();
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const QuantFusedKernels& kernels = quant_fused_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.activation_grad(dtype, in, in_codes, in_params, static_cast<int>(bits), act, out, numel,
                            first, last);
  });
  return result;
}

Tensor quant_pack_derivative_cpu(const Tensor& x, int64_t bits, std::string activation, double lo,
                                 double hi, int64_t seed) {
  const char* op = "quant_pack_derivative";
  const DType dtype = floating(op, "x", x.scalar_type());
  check_bits(op, bits);
  const Act act = act_named(op, activation);
  const QuantRange range = range_of(op, bits, lo, hi);
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, kGroup), 8 * bits};
  Tensor codes = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const QuantFusedKernels& kernels = quant_fused_kernels();
  torch::stable::parallel_for(0, size[0], kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.pack_derivative(dtype, in, numel, static_cast<int>(bits), act, range, fold(seed), out,
                            first, last);
  });
  return codes;
}

Tensor quant_apply_range_cpu(const Tensor& grad_out, const Tensor& codes, int64_t bits, double lo,
                             double hi) {
  const char* op = "quant_apply_range";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  check_bits(op, bits);
  const QuantRange range = range_of(op, bits, lo, hi);
  const Tensor flat = torch::stable::contiguous(grad_out);
  const int64_t numel = flat.numel();
  const Tensor packed = checked_codes(op, codes, bits, numel);
  Tensor result = torch::stable::new_empty(flat, flat.sizes());
  const void* in = flat.const_data_ptr();
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const QuantFusedKernels& kernels = quant_fused_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.apply_range(dtype, in, in_codes, static_cast<int>(bits), range, out, numel, first,
                        last);
  });
  return result;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("quant_unpack_affine", TORCH_BOX(&memtl::quant_unpack_affine_cpu));
  m.impl("quant_unpack_activation", TORCH_BOX(&memtl::quant_unpack_activation_cpu));
  m.impl("quant_activation_grad", TORCH_BOX(&memtl::quant_activation_grad_cpu));
  m.impl("quant_pack_derivative", TORCH_BOX(&memtl::quant_pack_derivative_cpu));
  m.impl("quant_apply_range", TORCH_BOX(&memtl::quant_apply_range_cpu));
}
