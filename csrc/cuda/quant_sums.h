// The host side of quant_sums.cuh.
#pragma once

#include <optional>

#include "cuda/quant_launch.h"
#include "cuda/quant_sums.cuh"

namespace memtl::cuda {

// Blocks over which a sum is spread at most: some for each multiprocessor of a large GPU, while
// what they leave to be added up stays small beside what they read.
constexpr int64_t kSumBlocks = 528;

// What every part of a sum leaves.
inline Tensor new_partial(const Tensor& like, int64_t count) {
  const int64_t size[] = {count, 2};
  return empty_beside(like, size, ScalarType::Float);
}

inline Sums* sums_of(Tensor& partial) { return static_cast<Sums*>(partial.mutable_data_ptr()); }

// The gradients of weight and bias.
struct ChannelGrads {
  Tensor weight, bias;
};

// Zeros where there is nothing to be added up.
inline ChannelGrads new_grads(const Tensor& like, int64_t channels, bool zeros) {
  const int64_t size[] = {channels};
  const auto grads = [&] {
    return zeros ? torch::stable::new_zeros(like, size, ScalarType::Float)
                 : empty_beside(like, size, ScalarType::Float);
  };
  return {grads(), grads()};
}

inline void sum_partial(const OnDevice& on, const Tensor& partial, int64_t outer, int64_t channels,
                        int64_t inner, ChannelGrads& grads, const ChannelScales& scales = {}) {
  const dim3 threads(kWarp, kSumRows);
  const auto blocks = static_cast<unsigned>(ceil_div(channels, kWarp));
  quant_sum_partial_kernel<double><<<blocks, threads, 0, on.stream()>>>(
      static_cast<const Sums*>(partial.const_data_ptr()), outer, channels, Division(inner),
      static_cast<float*>(grads.weight.mutable_data_ptr()),
      static_cast<float*>(grads.bias.mutable_data_ptr()), scales);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Columns of rows [rows, features] in slices; how many they are is returned with their sums.
struct ColumnSums {
  Tensor partial;
  int64_t slices;
};

inline ColumnSums sum_columns(const OnDevice& on, DType dtype, const Tensor& grad_out,
                              const Packed& packed, int64_t bits, int64_t rows, int64_t features) {
  constexpr int64_t kTall = 4, kLeastRows = 32;  // threads over rows; rows of a thread
  const dim3 threads(kWarp, kTall);
  const auto across = static_cast<unsigned>(ceil_div(features, 4 * kWarp));
  const auto down =
      std::max<int64_t>(1, std::min(ceil_div(rows, kTall * kLeastRows), 4 * kSumBlocks / across));
  const int64_t slices = kTall * down;
  Tensor partial = new_partial(grad_out, slices * features);
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_sum_columns_kernel<T, kBits>
        <<<dim3(across, static_cast<unsigned>(down)), threads, 0, on.stream()>>>(
            static_cast<const T*>(grad_out.const_data_ptr()), packed.of_codes(), packed.of_params(),
            rows, features, sums_of(partial));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {partial, slices};
}

}  // namespace memtl::cuda
