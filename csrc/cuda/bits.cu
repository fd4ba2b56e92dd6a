#include "cuda/bits.cuh"

#include "cpu/bits_checks.h"
#include "cuda/tiles.h"

namespace memtl::cuda {
namespace {

// A block for each tile of x, and the bits.
template <class T, class Test>
Tensor pack(const Tensor& x, const Test& test) {
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const int64_t numel = flat.numel();
  Tensor bits = empty_beside(flat, {ceil_div(numel, 8)}, ScalarType::Byte);
  if (numel == 0) return bits;
  bits_pack_kernel<T, Test><<<tiles_of<T>(numel), kTileThreads, 0, on.stream()>>>(
      static_cast<const T*>(flat.const_data_ptr()), test, numel,
      static_cast<uint8_t*>(bits.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return bits;
}

Tensor bits_pack_cuda(const Tensor& mask) {
  check_bool("bits_pack", mask);
  return pack<uint8_t>(mask, IsSet{});
}

Tensor bits_pack_between_cuda(const Tensor& x, std::optional<double> lo, std::optional<double> hi) {
  const DType dtype = floating("bits_pack_between", "x", x.scalar_type());
  const double low = bound(lo, dtype), high = bound(hi, dtype);
  Tensor bits;
  with_type(dtype, [&]<class T, class Math>() {
    const IsBetween<T, Math> between{static_cast<Math>(low), static_cast<Math>(high)};
    bits = pack<T>(x, between);
  });
  return bits;
}

Tensor bits_apply_cuda(const Tensor& x, const Tensor& bits, double scale) {
  const DType dtype = floating("bits_apply", "x", x.scalar_type());
  check_bits_of("bits_apply", x, bits);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const Tensor packed = as_contiguous(bits);
  Tensor out = empty_beside(flat, flat.sizes());
  const int64_t numel = flat.numel();
  if (numel == 0) return out;
  with_type(dtype, [&]<class T, class Math>() {
    bits_apply_kernel<T, Math><<<tiles_of<T>(numel), kTileThreads, 0, on.stream()>>>(
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
  m.impl("bits_pack", TORCH_BOX(&memtl::cuda::bits_pack_cuda));
  m.impl("bits_pack_between", TORCH_BOX(&memtl::cuda::bits_pack_between_cuda));
  m.impl("bits_apply", TORCH_BOX(&memtl::cuda::bits_apply_cuda));
}
