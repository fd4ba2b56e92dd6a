// Sums over a packed x-hat: what the backward passes of norms share. All of them are taken in parts
// and added up in a fixed order.
#pragma once

#include "cuda/quant.cuh"
#include "cuda/quant_channels.cuh"

namespace memtl::cuda {

// Of a feature or a channel: the sums of grad_out * x_hat and of grad_out, weight's and bias's
// gradients.
using Sums = Vector<float, 2>;

// Some of the elements [i, i + 4) of grad_out and of x-hat: the first `count`, zeros behind them.
template <int kBits, class T, class Count>
__device__ inline void load_some(const T* __restrict__ grad_out, const uint8_t* __restrict__ codes,
                                 const uint32_t* __restrict__ params, int64_t i, Count count,
                                 float (&grad)[4], float (&x_hat)[4]) {
  if (count >= 4 && i % 4 == 0 && is_aligned<T>(grad_out)) {
    load_four(grad_out + i, grad);
    decode_four<kBits>(codes, params, i, x_hat);
    return;
  }
  for (int j = 0; j < 4; ++j) {
    grad[j] = j < count ? to_float(grad_out[i + j]) : 0;
    x_hat[j] = j < count ? decode_one<kBits>(codes, params, i + j) : 0;
  }
}

template <class T, class Count>
__device__ inline void store_some(T* out, int64_t i, Count count, const float (&v)[4]) {
  if (count >= 4 && i % 4 == 0 && is_aligned<T>(out)) return store_four(out + i, v);
  for (int j = 0; j < 4; ++j) {
    if (j < count) out[i + j] = from_float<T>(v[j]);
  }
}

// Of rows [rows, features), each of the gridDim.y * blockDim.y slices of rows sums up its own:
// partial [slices, features]. Four features a thread, along x.
template <class T, int kBits>
__global__ void quant_sum_columns_kernel(const T* __restrict__ grad_out,
                                         const uint8_t* __restrict__ codes,
                                         const uint32_t* __restrict__ params, int64_t rows,
                                         int64_t features, Sums* __restrict__ partial) {
  const int64_t feature = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  const int64_t slices = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t slice = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  if (feature >= features) return;
  float products[4] = {}, grads[4] = {};
  for (int64_t row = slice; row < rows; row += slices) {
    float grad[4], x_hat[4];
    load_some<kBits>(grad_out, codes, params, row * features + feature, features - feature, grad,
                     x_hat);
    for (int j = 0; j < 4; ++j) {
      products[j] += grad[j] * x_hat[j];
      grads[j] += grad[j];
    }
  }
  for (int j = 0; j < 4; ++j) {
    if (feature + j < features) partial[slice * features + feature + j] = {products[j], grads[j]};
  }
}

// What a channel's elements have in common: grad_x = (grad_out - mean - x_hat * slope) * scale.
struct alignas(16) ChannelSlope {
  float mean, slope, scale;
};

// What turns a channel's sums into that.
struct ChannelScales {
  const float* rstd;
  const float* weight;   // may be null
  double elements;       // of a channel
  ChannelSlope* slopes;  // null: not asked for
};

constexpr int kSumRows = 32;  // of threads, in a block of quant_sum_partial_kernel
constexpr unsigned kSumThreads = kSumRows * kWarp;

// Adds up partial [outer, channels, inner], as Totals. A block of kWarp channels by kSumRows.
template <class Total>
__global__ void __launch_bounds__(kSumThreads)
    quant_sum_partial_kernel(const Sums* __restrict__ partial, int64_t outer, int64_t channels,
                             Division inner, float* __restrict__ grad_weight,
                             float* __restrict__ grad_bias, ChannelScales scales) {
  MEMTL_SHARED(Total, sums, [2][kSumRows][kWarp]);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t count = channel < channels ? outer * inner.divisor() : 0;
  Total product = 0, grad = 0;
  for (int64_t i = threadIdx.y; i < count; i += kSumRows) {
    const int64_t o = inner.quotient(i), within = i - o * inner.divisor();
    const Sums each = partial[(o * channels + channel) * inner.divisor() + within];
    product += each.at[0];
    grad += each.at[1];
  }
  sums[0][threadIdx.y][threadIdx.x] = product;
  sums[1][threadIdx.y][threadIdx.x] = grad;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= channels) return;
  for (int row = 1; row < kSumRows; ++row) {
    product += sums[0][row][threadIdx.x];
    grad += sums[1][row][threadIdx.x];
  }
  grad_weight[channel] = static_cast<float>(product);
  grad_bias[channel] = static_cast<float>(grad);
  if (!scales.slopes) return;
  scales.slopes[channel] = {static_cast<float>(grad / scales.elements),
                            static_cast<float>(product / scales.elements),
                            scales.rstd[channel] * (scales.weight ? scales.weight[channel] : 1)};
}

}  // namespace memtl::cuda
