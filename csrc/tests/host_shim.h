// Compiles a .cuh file as C++ and runs its kernels on the CPU. Include it before the .cuh.
//
// A kernel runs to its end thread by thread, so it may have no barrier and no exchange between the
// threads of a block.
#pragma once

#define __global__
#define __device__
#define __host__

namespace memtl::tests {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

}  // namespace memtl::tests

inline thread_local memtl::tests::Dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace memtl::tests {

// kernel<<<grid, block>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block, Arguments... arguments) {
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    for (unsigned t = 0; t < block.x * block.y * block.z; ++t) {
      threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      kernel(arguments...);
    }
  }
}

}  // namespace memtl::tests
