// Where entries are whose number differs from block to block: how many come before every 32nd block
// of a row is added up once; a warp whose lanes have a block each adds up the rest.
#pragma once

#include "cuda/topk_block.cuh"

namespace memtl::cuda {

constexpr int kChunk = static_cast<int>(kWarp);  // blocks

// before[chunk] = the sum of count(i) over all chunks i before it. All threads of a block call it.
template <class Count>
__device__ void add_up_chunks(int64_t chunks, const Count& count, int64_t* before) {
  int64_t all = 0;
  for (int64_t first = 0; first < chunks; first += kTopkThreads) {
    const int64_t chunk = first + threadIdx.x;
    const int64_t own = chunk < chunks ? count(chunk) : 0;
    const Sums<int64_t> sums = sum_of_threads(own);
    if (chunk < chunks) before[chunk] = all + sums.before;
    all += sums.all;
    __syncthreads();
  }
}

}  // namespace memtl::cuda
