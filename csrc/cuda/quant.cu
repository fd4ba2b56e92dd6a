#include "cuda/quant.cuh"

#include <tuple>
#include <vector>

#include "cuda/quant_launch.h"

namespace memtl::cuda {
namespace {

std::tuple<Tensor, Tensor> quant_pack_cuda(const Tensor& x, int64_t bits, int64_t seed) {
  const DType dtype = floating("quant_pack", "x", x.scalar_type());
  check_bits("quant_pack", bits);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const int64_t numel = flat.numel();
  Packed packed = new_packed(flat, bits);
  if (numel == 0) return {packed.codes, packed.params};
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_pack_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()), numel, fold(seed), packed.to_codes(),
        packed.to_params());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {packed.codes, packed.params};
}

Tensor quant_pack_range_cuda(const Tensor& x, int64_t bits, double lo, double hi, int64_t seed) {
  const char* op = "quant_pack_range";
  const DType dtype = floating(op, "x", x.scalar_type());
  check_bits(op, bits);
  const QuantRange range = range_of(op, bits, lo, hi);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const int64_t numel = flat.numel();
  Tensor codes = new_codes(flat, bits);
  if (numel == 0) return codes;
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_pack_range_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()), numel, range, fold(seed),
        static_cast<uint8_t*>(codes.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return codes;
}

Tensor quant_unpack_cuda(const Tensor& codes, const Tensor& params, int64_t bits,
                         std::vector<int64_t> size, ScalarType dtype) {
  const char* op = "quant_unpack";
  const DType out_dtype = floating(op, "a result", dtype);
  const int64_t numel = numel_of(size);
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(packed.codes);
  Tensor out = empty_beside(packed.codes, size, dtype);
  if (numel == 0) return out;
  with_bits(out_dtype, bits, [&]<class T, int kBits>() {
    quant_unpack_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        packed.of_codes(), packed.of_params(), numel, static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor quant_unpack_range_cuda(const Tensor& codes, int64_t bits, double lo, double hi,
                               std::vector<int64_t> size, ScalarType dtype) {
  const char* op = "quant_unpack_range";
  const DType out_dtype = floating(op, "a result", dtype);
  check_bits(op, bits);
  const QuantRange range = range_of(op, bits, lo, hi);
  const int64_t numel = numel_of(size);
  const Tensor packed = whole_words(checked_codes(op, codes, bits, numel));
  const OnDevice on(packed);
  Tensor out = empty_beside(packed, size, dtype);
  if (numel == 0) return out;
  with_bits(out_dtype, bits, [&]<class T, int kBits>() {
    quant_unpack_range_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const uint8_t*>(packed.const_data_ptr()), range, numel,
        static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("quant_pack", TORCH_BOX(&memtl::cuda::quant_pack_cuda));
  m.impl("quant_pack_range", TORCH_BOX(&memtl::cuda::quant_pack_range_cuda));
  m.impl("quant_unpack", TORCH_BOX(&memtl::cuda::quant_unpack_cuda));
  m.impl("quant_unpack_range", TORCH_BOX(&memtl::cuda::quant_unpack_range_cuda));
}
