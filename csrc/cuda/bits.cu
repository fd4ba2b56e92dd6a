#include "cuda/bits.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/tensor.h"

namespace memtl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1 << 16;  // beyond, the threads stride

template <class T, class Math>
void launch(const Tensor& x, const Tensor& bits, double scale, Tensor& out, cudaStream_t stream) {
  const int64_t numel = x.numel();
  const int64_t blocks = ceil_div(numel, kThreads);
  bits_apply_kernel<T, Math>
      <<<static_cast<unsigned>(blocks < kBlocks ? blocks : kBlocks), kThreads, 0, stream>>>(
          static_cast<const T*>(x.const_data_ptr()),
          static_cast<const uint8_t*>(bits.const_data_ptr()), static_cast<Math>(scale), numel,
          static_cast<T*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor bits_apply_cuda(const Tensor& x, const Tensor& bits, double scale) {
  const DType dtype = floating("bits_apply", "x", x.scalar_type());
  check_bits_of("bits_apply", x, bits);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor flat = torch::stable::contiguous(x);
  const Tensor packed = torch::stable::contiguous(bits);
  Tensor out = torch::stable::new_empty(flat, flat.sizes());
  if (flat.numel() == 0) return out;
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
  auto* stream = static_cast<cudaStream_t>(handle);
  switch (dtype) {
    case DType::f64:
      launch<double, double>(flat, packed, scale, out, stream);
      break;
    case DType::bf16:
      launch<BFloat16, float>(flat, packed, scale, out, stream);
      break;
    case DType::f16:
      launch<Half, float>(flat, packed, scale, out, stream);
      break;
    default:
      launch<float, float>(flat, packed, scale, out, stream);
  }
  return out;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("bits_apply", TORCH_BOX(&memtl::cuda::bits_apply_cuda));
}
