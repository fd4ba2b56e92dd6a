#include "cuda/quant_norm.cuh"

#include <optional>
#include <tuple>

#include "cuda/quant_sums.h"

namespace memtl::cuda {
namespace {

// Calls run.template operator()<kQuads>() with how many times four features a thread holds; 0 where
// a block cannot hold a row.
template <class Run>
void with_quads(int64_t quads, const Run& run) {
  if (quads <= kManyRows / 2) return run.template operator()<1>();
  if (quads <= 2 * kNormThreads) return run.template operator()<2>();
  return run.template operator()<0>();
}

std::tuple<Tensor, Tensor, Tensor> quant_norm_grad_cuda(const Tensor& grad_out, const Tensor& codes,
                                                        const Tensor& params, int64_t bits,
                                                        const Tensor& rstd,
                                                        const std::optional<Tensor>& weight,
                                                        int64_t features, bool centered) {
  const char* op = "quant_norm_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  STD_TORCH_CHECK(features > 0, op, ": expected features > 0, got ", features);
  check_device(op, grad_out, "codes", codes);
  const int64_t numel = grad_out.numel(), rows = numel / features;
  STD_TORCH_CHECK(rows * features == numel, op, ": grad_out ", describe(grad_out),
                  " is no rows of ", features);
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(grad_out);
  const Tensor flat = as_contiguous(grad_out);
  const Tensor scales = numbers_of(op, "rstd", rstd, rows, flat);
  std::optional<Tensor> factors;
  if (weight) factors = numbers_of(op, "weight", *weight, features, flat);
  Tensor grad_x = empty_beside(flat, flat.sizes());
  ChannelGrads grads = new_grads(flat, features, rows == 0);
  if (rows == 0) return {grad_x, grads.weight, grads.bias};

  const NormRows norm{floats_of(scales), factors ? floats_of(*factors) : nullptr, rows,
                      features,          1 / static_cast<float>(features),        centered};
  const int64_t quads = ceil_div(features, 4);
  with_quads(quads, [&]<int kQuads>() {
    if constexpr (kQuads > 0) {
      const auto wide = static_cast<unsigned>(kWarp * ceil_div(quads, kWarp * kQuads));
      const dim3 threads(wide, std::max(1u, kManyRows / wide));
      const unsigned blocks = blocks_of(rows, 4 * threads.y, kSumBlocks);
      Tensor partial = new_partial(flat, blocks * features);
      with_bits(dtype, bits, [&]<class T, int kBits>() {
        quant_norm_grad_kernel<T, kBits, kQuads><<<blocks, threads, 0, on.stream()>>>(
            static_cast<const T*>(flat.const_data_ptr()), packed.of_codes(), packed.of_params(),
            norm, static_cast<T*>(grad_x.mutable_data_ptr()), sums_of(partial));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
      sum_partial(on, partial, blocks, features, 1, grads);
    } else {
      with_bits(dtype, bits, [&]<class T, int kBits>() {
        quant_norm_rows_kernel<T, kBits><<<blocks_of(rows, 1), kRowThreads, 0, on.stream()>>>(
            static_cast<const T*>(flat.const_data_ptr()), packed.of_codes(), packed.of_params(),
            norm, static_cast<T*>(grad_x.mutable_data_ptr()));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
      const ColumnSums columns = sum_columns(on, dtype, flat, packed, bits, rows, features);
      sum_partial(on, columns.partial, columns.slices, features, 1, grads);
    }
  });
  return {grad_x, grads.weight, grads.bias};
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("quant_norm_grad", TORCH_BOX(&memtl::cuda::quant_norm_grad_cuda));
}
