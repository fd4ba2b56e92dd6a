// Device code of quant_channel_norm_grad, the backward of batch norm in training from a packed
// x-hat [B, C, inner]: sums over parts of planes (one of a sample and channel), or where those are
// small over columns; of those sums a channel's; then grad_x. The definition is in
// memtl/reference/fused.py.
#pragma once

#include "cuda/quant_sums.cuh"

namespace memtl::cuda {

// How planes are cut: `parts` of `each` elements, a multiple of 4, the last one may be shorter.
struct PlaneParts {
  int64_t planes, inner, parts, each;
};

// partial [planes, parts], each by `width` lanes, a power of two. Any grid and block of one
// dimension.
template <class T, int kBits>
__global__ void quant_sum_planes_kernel(const T* __restrict__ grad_out,
                                        const uint8_t* __restrict__ codes,
                                        const uint32_t* __restrict__ params, PlaneParts cut,
                                        unsigned width, Sums* __restrict__ partial) {
  const int64_t numel = cut.planes * cut.inner, all = cut.planes * cut.parts;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x / width;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const unsigned within = lane_of_thread() / width, lane = threadIdx.x % width;
  for (int64_t first = thread / width - within; first < all; first += stride) {
    const int64_t part = first + within, plane = part / cut.parts;
    const int64_t begin = plane * cut.inner + part % cut.parts * cut.each;
    const int64_t stop = (plane + 1) * cut.inner, limit = begin + cut.each;
    const int64_t end = part >= all ? begin : limit < stop ? limit : stop;
    float product = 0, sum = 0;
    for (int64_t i = begin / 4 * 4 + 4 * lane; i < end; i += 4 * width) {
      float grad[4], x_hat[4];
      load_some<kBits>(grad_out, codes, params, i, numel - i, grad, x_hat);
      for (int j = 0; j < 4; ++j) {
        const bool own = i + j >= begin && i + j < end;
        product += own ? grad[j] * x_hat[j] : 0;
        sum += own ? grad[j] : 0;
      }
    }
    for (unsigned step = width / 2; step > 0; step /= 2) {
      product += __shfl_xor_sync(kAllLanes, product, static_cast<int>(step));
      sum += __shfl_xor_sync(kAllLanes, sum, static_cast<int>(step));
    }
    if (lane == 0 && part < all) partial[part] = {product, sum};
  }
}

// What FourChannels asks for.
struct ChannelShape {
  Division channels, inner;
};

template <class T, int kBits>
__global__ void quant_channel_norm_grad_kernel(const T* __restrict__ grad_out,
                                               const uint8_t* __restrict__ codes,
                                               const uint32_t* __restrict__ params,
                                               ChannelShape shape,
                                               const ChannelSlope* __restrict__ slopes,
                                               int64_t numel, T* __restrict__ grad_x) {
  for_groups(numel, [&](int64_t group, unsigned lane) {
    Own v, x_hat;
    load_group(grad_out, numel, group, lane, v);
    decode_group<kBits>(codes, params, group, lane, x_hat);
    for (int p = 0; p < 4; ++p) {
      const FourChannels four(shape, group * kGroup + 16 * p + 4 * lane);
      four.each(slopes, [&](int j, const ChannelSlope& of) {
        v[p][j] = (v[p][j] - of.mean - x_hat[p][j] * of.slope) * of.scale;
      });
    }
    store_group(grad_x, numel, group, lane, v);
  });
}

}  // namespace memtl::cuda
