#include "cuda/bits.cuh"

#include "cuda/launch.h"

namespace memtl::cuda {
namespace {

constexpr int kThreads = 256;

Tensor bits_apply_cuda(const Tensor& x, const Tensor& bits, double scale) {
  const DType dtype = floating("bits_apply", "x", x.scalar_type());
  check_bits_of("bits_apply", x, bits);
  const OnDevice on(x);
  const Tensor flat = torch::stable::contiguous(x);
  const Tensor packed = torch::stable::contiguous(bits);
  Tensor out = torch::stable::new_empty(flat, flat.sizes());
  const int64_t numel = flat.numel();
  if (numel == 0) return out;
  with_type(dtype, [&]<class T, class Math>() {
    bits_apply_kernel<T, Math><<<blocks_of(numel, kThreads), kThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()),
        static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<Math>(scale), numel,
        static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("bits_apply", TORCH_BOX(&memtl::cuda::bits_apply_cuda));
}
