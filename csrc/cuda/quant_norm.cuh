// Device code of quant_norm_grad, the backward of layer and RMS norm from a packed x-hat:
// grad_x = (grad_out * weight - mean - x_hat * slope) * rstd, row by row, where mean and slope are
// the row's means of grad_out * weight (0 if not centered) and of grad_out * weight * x_hat. The
// definition is in memtl/reference/fused.py.
#pragma once

#include "cuda/quant_sums.cuh"

namespace memtl::cuda {

// What the rows have in common.
struct NormRows {
  const float* rstd;    // [rows]
  const float* weight;  // [features], from 16 bytes on, or null
  int64_t rows, features;
  float share;  // 1 / features
  bool centered;
};

constexpr unsigned kNormThreads = 1024;  // of a block, at most
constexpr unsigned kManyRows = 256;      // of a block of several rows
constexpr unsigned kRowThreads = 512;    // of quant_norm_rows_kernel's

// The means of two numbers' sums over the threads of a row, blockDim.x, a multiple of a warp. All
// threads of a block call this; `turn` is 0 and 1 in turns, so that one barrier is enough.
__device__ inline Sums row_means(float slope, float mean, const NormRows& norm, unsigned turn) {
  MEMTL_SHARED(Sums, parts, [2][kNormThreads / kWarp]);
  slope = warp_sum(slope);
  mean = warp_sum(mean);
  const unsigned warps = blockDim.x / kWarp;
  if (warps > 1) {
    Sums* own = parts[turn] + threadIdx.y * warps;
    if (lane_of_thread() == 0) own[warp_of_thread()] = {slope, mean};
    __syncthreads();
    slope = mean = 0;
    for (unsigned i = 0; i < warps; ++i) {
      slope += own[i].at[0];
      mean += own[i].at[1];
    }
  }
  return {slope * norm.share, norm.centered ? mean * norm.share : 0};
}

// The weights of four features from a multiple of 4 on.
template <class Index>
__device__ inline void load_weights(const NormRows& norm, Index feature, float (&weight)[4]) {
  if (norm.weight && feature + 4 <= norm.features) return load_four(norm.weight + feature, weight);
  for (int j = 0; j < 4; ++j) {
    weight[j] = norm.weight && feature + j < norm.features ? norm.weight[feature + j] : 1;
  }
}

// One pass over memory: a row is held by blockDim.x threads, each of which has kQuads times four
// features; threadIdx.y tells the rows of a block apart. partial [blocks, features]: each block's
// sums over its rows.
template <class T, int kBits, int kQuads>
__global__ void __launch_bounds__(kQuads == 1 ? kManyRows : kNormThreads)
    quant_norm_grad_kernel(const T* __restrict__ grad_out, const uint8_t* __restrict__ codes,
                           const uint32_t* __restrict__ params, NormRows norm,
                           T* __restrict__ grad_x, Sums* __restrict__ partial) {
  const auto features = static_cast<int>(norm.features);
  const auto feature_of = [](int k) {
    return static_cast<int>(4 * (k * blockDim.x + threadIdx.x));
  };
  float products[kQuads][4] = {}, grads[kQuads][4] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  unsigned turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < norm.rows;
       first += stride, turn ^= 1) {
    const int64_t row = first + threadIdx.y, begin = row * features;
    float grad[kQuads][4], x_hat[kQuads][4], slope = 0, mean = 0;
    for (int k = 0; k < kQuads; ++k) {
      const int feature = feature_of(k), left = row < norm.rows ? features - feature : 0;
      load_some<kBits>(grad_out, codes, params, begin + feature, left, grad[k], x_hat[k]);
    }
    for (int k = 0; k < kQuads; ++k) {
      float weight[4];
      load_weights(norm, feature_of(k), weight);
      for (int j = 0; j < 4; ++j) {
        const float product = grad[k][j] * x_hat[k][j];
        products[k][j] += product;
        grads[k][j] += grad[k][j];
        slope = fmaf(product, weight[j], slope);
        mean = fmaf(grad[k][j], weight[j], mean);
      }
    }
    const Sums means = row_means(slope, mean, norm, turn);
    if (row >= norm.rows) continue;
    const float rstd = norm.rstd[row];
    for (int k = 0; k < kQuads; ++k) {
      float weight[4];  // read again: held, they would leave room for fewer warps
      load_weights(norm, feature_of(k), weight);
      for (int j = 0; j < 4; ++j) {
        const float own = grad[k][j] * weight[j] - means.at[1];
        grad[k][j] = (own - x_hat[k][j] * means.at[0]) * rstd;
      }
      store_some(grad_x, begin + feature_of(k), features - feature_of(k), grad[k]);
    }
  }
  // The sums of the block's other rows come to those of its first, one after the other.
  MEMTL_SHARED(Sums, others, [4][kManyRows / 2]);
  for (int k = 0; k < kQuads; ++k) {
    for (unsigned y = 1; y < blockDim.y; ++y) {
      __syncthreads();
      for (int j = 0; j < 4; ++j) {
        if (threadIdx.y == y) others[j][threadIdx.x] = {products[k][j], grads[k][j]};
      }
      __syncthreads();
      if (threadIdx.y > 0) continue;
      for (int j = 0; j < 4; ++j) {
        products[k][j] += others[j][threadIdx.x].at[0];
        grads[k][j] += others[j][threadIdx.x].at[1];
      }
    }
    for (int j = 0; j < 4; ++j) {
      const int feature = feature_of(k) + j;
      if (threadIdx.y > 0 || feature >= features) continue;
      partial[int64_t{blockIdx.x} * features + feature] = {products[k][j], grads[k][j]};
    }
  }
}

// The same for rows of any length, a block a row, without the sums over rows: reads a row twice.
template <class T, int kBits>
__global__ void __launch_bounds__(kRowThreads)
    quant_norm_rows_kernel(const T* __restrict__ grad_out, const uint8_t* __restrict__ codes,
                           const uint32_t* __restrict__ params, NormRows norm,
                           T* __restrict__ grad_x) {
  const int64_t features = norm.features;
  unsigned turn = 0;
  for (int64_t row = blockIdx.x; row < norm.rows; row += gridDim.x, turn ^= 1) {
    const int64_t begin = row * features;
    float grad[4], x_hat[4], weight[4], slope = 0, mean = 0;
    for (int64_t f = 4 * threadIdx.x; f < features; f += 4 * blockDim.x) {
      load_some<kBits>(grad_out, codes, params, begin + f, features - f, grad, x_hat);
      load_weights(norm, f, weight);
      for (int j = 0; j < 4; ++j) {
        const float scaled = grad[j] * weight[j];
        slope = fmaf(scaled, x_hat[j], slope);
        mean += scaled;
      }
    }
    const Sums means = row_means(slope, mean, norm, turn);
    const float rstd = norm.rstd[row];
    for (int64_t f = 4 * threadIdx.x; f < features; f += 4 * blockDim.x) {
      load_some<kBits>(grad_out, codes, params, begin + f, features - f, grad, x_hat);
      load_weights(norm, f, weight);
      for (int j = 0; j < 4; ++j) {
        const float own = grad[j] * weight[j] - means.at[1];
        grad[j] = (own - x_hat[j] * means.at[0]) * rstd;
      }
      store_some(grad_x, begin + f, features - f, grad);
    }
  }
}

}  // namespace memtl::cuda
