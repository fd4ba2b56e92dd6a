#include "cuda/quant_channel_norm.cuh"

#include <optional>
#include <tuple>

#include "cuda/quant_sums.h"

namespace memtl::cuda {
namespace {

constexpr int64_t kSmallPlane = 32;     // below which sums go by columns
constexpr int64_t kPartOfPlane = 4096;  // elements that some lanes sum up at most

// The sums of planes, or of columns, in parts [outer, channels, inner].
struct PlaneSums {
  Tensor partial;
  int64_t outer, inner;
};

PlaneSums sum_planes(const OnDevice& on, DType dtype, const Tensor& grad_out, const Packed& packed,
                     int64_t bits, int64_t channels, int64_t inner) {
  const int64_t planes = grad_out.numel() / inner, samples = planes / channels;
  if (inner < kSmallPlane) {
    const ColumnSums columns =
        sum_columns(on, dtype, grad_out, packed, bits, samples, channels * inner);
    return {columns.partial, columns.slices, inner};
  }
  const int64_t each = 4 * ceil_div(ceil_div(inner, ceil_div(inner, kPartOfPlane)), 4);
  const PlaneParts cut{planes, inner, ceil_div(inner, each), each};
  const unsigned width = each <= 128 ? 8 : kWarp;
  const int64_t parts = planes * cut.parts;
  Tensor partial = new_partial(grad_out, parts);
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_sum_planes_kernel<T, kBits>
        <<<blocks_of(parts, kQuantThreads / width), kQuantThreads, 0, on.stream()>>>(
            static_cast<const T*>(grad_out.const_data_ptr()), packed.of_codes(), packed.of_params(),
            cut, width, sums_of(partial));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {partial, samples, cut.parts};
}

std::tuple<Tensor, Tensor, Tensor> quant_channel_norm_grad_cuda(
    const Tensor& grad_out, const Tensor& codes, const Tensor& params, int64_t bits,
    const Tensor& rstd, const std::optional<Tensor>& weight, int64_t inner) {
  const char* op = "quant_channel_norm_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  check_device(op, grad_out, "codes", codes);
  const int64_t numel = grad_out.numel(), channels = rstd.numel();
  check_channels(op, channels, inner, numel);
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(grad_out);
  const Tensor flat = as_contiguous(grad_out);
  const Tensor scales = numbers_of(op, "rstd", rstd, channels, flat);
  std::optional<Tensor> factors;
  if (weight) factors = numbers_of(op, "weight", *weight, channels, flat);
  Tensor grad_x = empty_beside(flat, flat.sizes());
  ChannelGrads grads = new_grads(flat, channels, numel == 0);
  if (numel == 0) return {grad_x, grads.weight, grads.bias};

  const PlaneSums sums = sum_planes(on, dtype, flat, packed, bits, channels, inner);
  const int64_t table[] = {channels, sizeof(ChannelSlope) / sizeof(float)};
  Tensor slopes = empty_beside(flat, table, ScalarType::Float);
  auto* to_slopes = static_cast<ChannelSlope*>(slopes.mutable_data_ptr());
  sum_partial(on, sums.partial, sums.outer, channels, sums.inner, grads,
              {floats_of(scales), factors ? floats_of(*factors) : nullptr,
               static_cast<double>(numel / channels), to_slopes});
  const ChannelShape shape{Division(channels), Division(inner)};
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_channel_norm_grad_kernel<T, kBits>
        <<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
            static_cast<const T*>(flat.const_data_ptr()), packed.of_codes(), packed.of_params(),
            shape, to_slopes, numel, static_cast<T*>(grad_x.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_x, grads.weight, grads.bias};
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("quant_channel_norm_grad", TORCH_BOX(&memtl::cuda::quant_channel_norm_grad_cuda));
}
