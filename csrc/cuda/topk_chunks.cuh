// Where entries are whose number differs from block to block: how many come before every 32nd block
// of a row is added up once; a warp whose lanes have a block each adds up the rest.
#pragma once

#include "cuda/topk_block.cuh"

namespace memtl::cuda {

constexpr int kChunk = static_cast<int>(kWarp);  // blocks

// The sum of x over this thread and those of its block before it; *total is that over all. All
// threads call it.
// sums holds one number a warp, and may be used again.
__device__ inline int64_t thread_prefix(int64_t x, int64_t* sums, int64_t* total) {
  const unsigned lane = lane_of_thread(), warp = warp_of_thread();
  const unsigned warps = blockDim.x / kWarp;
  const int64_t within = warp_prefix(x);
  __syncthreads();  // whoever read sums before has done so
  if (lane == kWarp - 1) sums[warp] = within;
  __syncthreads();
  int64_t before = 0;
  *total = 0;
  for (unsigned i = 0; i < warps; ++i) {
    if (i < warp) before += sums[i];
    *total += sums[i];
  }
  return before + within;
}

// before[chunk] = the sum of count(i) over all chunks i before it. All threads of a block call it.
template <class Count>
__device__ void add_up_chunks(int64_t chunks, const Count& count, int64_t* before) {
  MEMTL_SHARED(int64_t, sums, [kTopkWarps]);
  int64_t all = 0;
  for (int64_t first = 0; first < chunks; first += kTopkThreads) {
    const int64_t chunk = first + threadIdx.x;
    const int64_t own = chunk < chunks ? count(chunk) : 0;
    int64_t total;
    const int64_t through = thread_prefix(own, sums, &total);
    if (chunk < chunks) before[chunk] = all + through - own;
    all += total;
  }
}

}  // namespace memtl::cuda
