#include "quant_channel_norm.h"

#include <optional>
#include <tuple>
#include <vector>

#include "quant_checks.h"

namespace memtl {
namespace {

std::tuple<Tensor, Tensor, Tensor> quant_channel_norm_grad_cpu(
    const Tensor& grad_out, const Tensor& codes, const Tensor& params, int64_t bits,
    const Tensor& rstd, const std::optional<Tensor>& weight, int64_t inner) {
  const char* op = "quant_channel_norm_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  check_bits(op, bits);
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  const Tensor flat = torch::stable::contiguous(grad_out);
  const int64_t numel = flat.numel(), count = rstd.numel(), planes = numel / inner;
  check_channels(op, count, inner, numel);
  const Tensor packed = checked_codes(op, codes, bits, numel);
  const Tensor flat_params = checked_params(op, params, packed);
  const std::vector<float> scales = as_floats(op, "rstd", rstd, count, 0);
  const std::vector<float> factors =
      weight ? as_floats(op, "weight", *weight, count, 0) : std::vector<float>(scales.size(), 1.0f);
  Tensor grad_x = torch::stable::new_empty(flat, flat.sizes());
  const int64_t size[] = {count};
  Tensor grad_weight = torch::stable::new_empty(flat, size, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(flat, size, ScalarType::Float);
  const void* in = flat.const_data_ptr();
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  void* out = grad_x.mutable_data_ptr();
  const QuantChannelNormKernels& kernels = quant_channel_norm_kernels();

  // Whole planes a task, so many whatever the number of threads: the sums are the same for any.
  std::vector<double> sums(static_cast<size_t>(2 * planes));
  const int64_t each = ceil_div(kGrain, inner);
  for_tasks(ceil_div(planes, each), [&](int64_t task) {
    kernels.sums(dtype, in, in_codes, in_params, static_cast<int>(bits), numel, inner, sums.data(),
                 task * each, std::min(planes, (task + 1) * each));
  });
  std::vector<ChannelGrad> channels(static_cast<size_t>(count));
  const auto elements = static_cast<double>(numel / count);
  for (int64_t c = 0; c < count; ++c) {
    double total = 0, product = 0;
    for (int64_t plane = c; plane < planes; plane += count) {
      total += sums[static_cast<size_t>(2 * plane)];
      product += sums[static_cast<size_t>(2 * plane + 1)];
    }
    const auto at = static_cast<size_t>(c);
    data<float>(grad_bias)[c] = static_cast<float>(total);
    data<float>(grad_weight)[c] = static_cast<float>(product);
    channels[at] = {static_cast<float>(total / elements), static_cast<float>(product / elements),
                    scales[at] * factors[at]};
  }
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.grad(dtype, in, in_codes, in_params, static_cast<int>(bits), numel, inner,
                 channels.data(), count, out, first, last);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("quant_channel_norm_grad", TORCH_BOX(&memtl::quant_channel_norm_grad_cpu));
}
