// Sums of what comes before: in a block, and over the blocks of a grid. A grid that has to know
// where each block's results begin is launched twice, first to count; in between one block adds the
// counts up. So no block waits for another.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/tile.cuh"

namespace memtl::cuda {

// The sum over this lane and those before it.
template <class T>
__device__ inline T warp_sum_up_to(T x) {
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, step);
    if (lane_of_thread() >= step) x += below;
  }
  return x;
}

template <class T>
struct Sums {
  T before;  // over the threads before this warp, or this thread
  T all;     // over the block
};

// Of what each warp has, the same in all its lanes; all warps are whole. A kernel that calls it
// again has a barrier in between.
template <class T>
__device__ inline Sums<T> sum_of_warps(T x) {
  MEMTL_SHARED(T, sums, [kWarp]);
  const unsigned lane = lane_of_thread(), warp = warp_of_thread();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  const T other = lane < blockDim.x / kWarp ? sums[lane] : T{};
  return {warp_sum(lane < warp ? other : T{}), warp_sum(other)};
}

// The same of what each thread has.
template <class T>
__device__ inline Sums<T> sum_of_threads(T x) {
  const T up_to = warp_sum_up_to(x);
  const Sums<T> sums = sum_of_warps(__shfl_sync(kAllLanes, up_to, kWarp - 1));
  return {sums.before + up_to - x, sums.all};
}

// Turns the counts of a thread's vectors into the sums of all before them in the block's tile;
// returns the sum of all.
__device__ inline unsigned sum_before(unsigned (&counts)[kTileVectors]) {
  unsigned sum = 0;
  for (int j = 0; j < kTileVectors; ++j) {
    const unsigned up_to = warp_sum_up_to(counts[j]);
    counts[j] = sum + up_to - counts[j];
    sum += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  const Sums<unsigned> sums = sum_of_warps(sum);
  for (int j = 0; j < kTileVectors; ++j) counts[j] += sums.before;
  return sums.all;
}

constexpr unsigned kPrefixThreads = 1024;
constexpr int kPrefixEach = 8;

// counts[i] becomes the sum of counts[0] to counts[i], for i in [0, size). One block.
template <class T>
__global__ void __launch_bounds__(kPrefixThreads) prefix_kernel(T* counts, int64_t size) {
  T carry = 0;
  for (int64_t start = 0; start < size; start += blockDim.x * kPrefixEach) {
    const int64_t first = start + threadIdx.x * kPrefixEach;
    T own[kPrefixEach], sum = 0;
    for (int i = 0; i < kPrefixEach; ++i) own[i] = first + i < size ? counts[first + i] : 0;
    for (int i = 0; i < kPrefixEach; ++i) own[i] = sum += own[i];
    const Sums<T> sums = sum_of_threads(sum);
    const T before = carry + sums.before;
    for (int i = 0; i < kPrefixEach; ++i) {
      if (first + i < size) counts[first + i] = before + own[i];
    }
    carry += sums.all;
    __syncthreads();
  }
}

// Where a tile's begin, by what prefix_kernel made of the counts of tiles.
__device__ inline int64_t start_of_tile(const int64_t* ends, int64_t tile) {
  return tile == 0 ? 0 : ends[tile - 1];
}

}  // namespace memtl::cuda
