#include "cuda/launch.h"

#include <array>
#include <atomic>

namespace memtl::cuda {
namespace {

__global__ void probe() {}

int attribute(cudaDeviceAttr which, int32_t index) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, index);
  return value;
}

}  // namespace

void check_card(int32_t index) {
  static std::array<std::atomic<bool>, 64> known{};
  const auto i = static_cast<size_t>(index);
  if (i < known.size() && known[i]) return;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) != cudaSuccess) {
    const char* why = cudaGetErrorString(cudaGetLastError());
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
    STD_TORCH_CHECK(false, "memtl's CUDA kernels were built for ", MEMTL_CUDA_ARCHS,
                    " and cannot run on GPU ", index, ", of compute capability ", major, ".", minor,
                    " (", why, "): install memtl again with MEMTL_CUDA_ARCHS=", major, minor,
                    ", or set MEMTL_BACKEND to triton or reference");
  }
  if (i < known.size()) known[i] = true;
}

}  // namespace memtl::cuda
