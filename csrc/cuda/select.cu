#include "cuda/select.cuh"

#include "cpu/bits_checks.h"
#include "cuda/tiles.h"

namespace memtl::cuda {
namespace {

constexpr unsigned kWarpsCounting = 8;  // in a block

// Where the selected elements of each tile of T end.
template <class T>
Tensor ends_of(const Tensor& packed, int64_t numel, const OnDevice& on) {
  const int64_t tiles = tiles_of<T>(numel);
  Tensor ends = empty_beside(packed, {tiles}, ScalarType::Long);
  const unsigned blocks = blocks_of(tiles, kWarpsCounting, std::numeric_limits<int32_t>::max());
  bits_count_kernel<T><<<blocks, kWarpsCounting * kWarp, 0, on.stream()>>>(
      static_cast<const uint8_t*>(packed.const_data_ptr()), numel, tiles,
      static_cast<int64_t*>(ends.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  add_up(ends, on);
  return ends;
}

Tensor bits_select_cuda(const Tensor& x, const Tensor& bits, int64_t count) {
  const DType dtype = floating("bits_select", "x", x.scalar_type());
  check_bits_of("bits_select", x, bits);
  STD_TORCH_CHECK(count >= 0, "bits_select: expected count >= 0, got ", count);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x), packed = as_contiguous(bits);
  Tensor values = empty_beside(flat, {count});
  const int64_t numel = flat.numel();
  if (numel == 0 || count == 0) return values;
  with_integer(dtype, [&]<class T>() {
    const Tensor ends = ends_of<T>(packed, numel, on);
    bits_select_kernel<T><<<tiles_of<T>(numel), kTileThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()),
        static_cast<const uint8_t*>(packed.const_data_ptr()),
        static_cast<const int64_t*>(ends.const_data_ptr()), numel, count,
        static_cast<T*>(values.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return values;
}

Tensor bits_expand_cuda(const Tensor& values, const Tensor& bits, std::vector<int64_t> sizes) {
  const DType dtype = floating("bits_expand", "values", values.scalar_type());
  check_values("bits_expand", values);
  Tensor x = empty_beside(values, sizes);
  check_bits_of("bits_expand", x, bits);
  const OnDevice on(values);
  const Tensor flat = as_contiguous(values), packed = as_contiguous(bits);
  const int64_t numel = x.numel();
  if (numel == 0) return x;
  with_integer(dtype, [&]<class T>() {
    const Tensor ends = ends_of<T>(packed, numel, on);
    bits_expand_kernel<T><<<tiles_of<T>(numel), kTileThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()),
        static_cast<const uint8_t*>(packed.const_data_ptr()),
        static_cast<const int64_t*>(ends.const_data_ptr()), numel, flat.numel(),
        static_cast<T*>(x.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return x;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("bits_select", TORCH_BOX(&memtl::cuda::bits_select_cuda));
  m.impl("bits_expand", TORCH_BOX(&memtl::cuda::bits_expand_cuda));
}
