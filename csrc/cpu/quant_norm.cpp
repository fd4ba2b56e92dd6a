#include "quant_norm.h"

#include <optional>
#include <tuple>
#include <vector>

#include "quant_checks.h"

namespace memtl {
namespace {

// The sums over rows are taken by so many tasks at most, whatever the number of threads, so that
// they are the same for any.
constexpr int64_t kTasks = 64, kLeastRows = 16;

std::tuple<Tensor, Tensor, Tensor> quant_norm_grad_cpu(const Tensor& grad_out, const Tensor& codes,
                                                       const Tensor& params, int64_t bits,
                                                       const Tensor& rstd,
                                                       const std::optional<Tensor>& weight,
                                                       int64_t features, bool centered) {
  const char* op = "quant_norm_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  check_bits(op, bits);
  STD_TORCH_CHECK(features > 0, op, ": expected features > 0, got ", features);
  const Tensor flat = torch::stable::contiguous(grad_out);
  const int64_t numel = flat.numel(), rows = numel / features;
  STD_TORCH_CHECK(rows * features == numel, op, ": grad_out ", describe(grad_out),
                  " is no rows of ", features);
  const Tensor packed = checked_codes(op, codes, bits, numel);
  const Tensor flat_params = checked_params(op, params, packed);
  const std::vector<float> scales = as_floats(op, "rstd", rstd, rows, 0);
  const std::vector<float> factors =
      weight ? as_floats(op, "weight", *weight, features, kNormLanes)
             : std::vector<float>(static_cast<size_t>(features + kNormLanes), 1.0f);
  Tensor grad_x = torch::stable::new_empty(flat, flat.sizes());
  const int64_t size[] = {features};
  Tensor sums[] = {torch::stable::new_empty(flat, size, ScalarType::Float),
                   torch::stable::new_empty(flat, size, ScalarType::Float)};

  const int64_t each = std::max(kLeastRows, ceil_div(rows, kTasks)), tasks = ceil_div(rows, each);
  const int64_t stride = features + kNormLanes;
  std::vector<float> partial(static_cast<size_t>(2 * tasks * stride));
  const Norm norm{features, factors.data(), centered};
  const void* in = flat.const_data_ptr();
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  void* out = grad_x.mutable_data_ptr();
  const QuantNormKernels& kernels = quant_norm_kernels();
  for_tasks(tasks, [&](int64_t task) {
    std::vector<float> room(static_cast<size_t>(features + 2 * kGroup));
    float* own = partial.data() + 2 * task * stride;
    kernels.grad(dtype, in, in_codes, in_params, static_cast<int>(bits), scales.data(), norm, out,
                 room.data(), own, own + stride, task * each, std::min(rows, (task + 1) * each));
  });
  for (int which = 0; which < 2; ++which) {
    auto* total = static_cast<float*>(sums[which].mutable_data_ptr());
    std::fill_n(total, features, 0.0f);
    for (int64_t task = 0; task < tasks; ++task) {
      const float* own = partial.data() + (2 * task + which) * stride;
      for (int64_t i = 0; i < features; ++i) total[i] += own[i];
    }
  }
  return {grad_x, sums[0], sums[1]};
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("quant_norm_grad", TORCH_BOX(&memtl::quant_norm_grad_cpu));
}
