#include "cuda/quant_fused.cuh"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/quant_launch.h"

namespace memtl::cuda {
namespace {

// The numbers of channels, checked; none where nothing is given.
std::optional<Tensor> table_of(const char* op, const char* what, const std::optional<Tensor>& given,
                               const Tensor& codes) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->numel() > 0, op, ": expected ", what, " of a channel at least, got ",
                  describe(*given));
  return numbers_of(op, what, *given, given->numel(), codes);
}

ChannelTables tables_of(const char* op, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, int64_t inner, int64_t numel) {
  const int64_t channels = weight ? weight->numel() : bias ? bias->numel() : 1;
  check_channels(op, channels, inner, numel);
  return {weight ? floats_of(*weight) : nullptr, bias ? floats_of(*bias) : nullptr,
          Division(channels), Division(inner)};
}

std::tuple<Tensor, Tensor> quant_pack_normalized_cuda(const Tensor& x, const Tensor& mean,
                                                      const Tensor& rstd, int64_t bits,
                                                      int64_t inner, int64_t seed) {
  const char* op = "quant_pack_normalized";
  const DType dtype = floating(op, "x", x.scalar_type());
  check_bits(op, bits);
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  check_device(op, x, "mean", mean);
  check_device(op, x, "rstd", rstd);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const int64_t numel = flat.numel();
  Packed packed = new_packed(flat, bits);
  if (numel == 0) return {packed.codes, packed.params};
  STD_TORCH_CHECK(mean.numel() == rstd.numel(), op, ": expected mean and rstd of one size, got ",
                  describe(mean), " and ", describe(rstd));
  const auto means = table_of(op, "mean", mean, flat), scales = table_of(op, "rstd", rstd, flat);
  const ChannelTables tables = tables_of(op, scales, means, inner, numel);
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_pack_normalized_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()), numel, tables, fold(seed), packed.to_codes(),
        packed.to_params());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {packed.codes, packed.params};
}

Tensor quant_unpack_affine_cuda(const Tensor& codes, const Tensor& params, int64_t bits,
                                const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& mask, int64_t inner,
                                std::vector<int64_t> size, ScalarType dtype, double lo,
                                std::optional<double> hi) {
  const char* op = "quant_unpack_affine";
  const Ends ends = ends_of(op, lo, hi);
  const DType out_dtype = floating(op, "a result", dtype);
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  const int64_t numel = numel_of(size);
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(packed.codes);
  Tensor out = empty_beside(packed.codes, size, dtype);
  if (numel == 0) return out;
  const auto weights = table_of(op, "weight", weight, packed.codes);
  const auto biases = table_of(op, "bias", bias, packed.codes);
  STD_TORCH_CHECK(!weight || !bias || weight->numel() == bias->numel(), op,
                  ": expected weight and bias of one size, got ", weights ? weights->numel() : 0,
                  " and ", biases ? biases->numel() : 0);
  const ChannelTables tables = tables_of(op, weights, biases, inner, numel);
  std::optional<Tensor> bytes;
  if (mask) {
    check_bits_of(op, out, *mask);
    bytes = as_contiguous(*mask);
  }
  with_bits(out_dtype, bits, [&]<class T, int kBits>() {
    quant_unpack_affine_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        packed.of_codes(), packed.of_params(), tables,
        bytes ? static_cast<const uint8_t*>(bytes->const_data_ptr()) : nullptr, ends, numel,
        static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor quant_unpack_activation_cuda(const Tensor& codes, const Tensor& params, int64_t bits,
                                    std::string activation, std::vector<int64_t> size,
                                    ScalarType dtype) {
  const char* op = "quant_unpack_activation";
  const DType out_dtype = floating(op, "a result", dtype);
  const Act act = act_named(op, activation);
  const int64_t numel = numel_of(size);
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(packed.codes);
  Tensor out = empty_beside(packed.codes, size, dtype);
  if (numel == 0) return out;
  with_bits(out_dtype, bits, [&]<class T, int kBits>() {
    quant_unpack_activation_kernel<T, kBits>
        <<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
            packed.of_codes(), packed.of_params(), act, numel,
            static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor quant_activation_grad_cuda(const Tensor& grad_out, const Tensor& codes, const Tensor& params,
                                  int64_t bits, std::string activation) {
  const char* op = "quant_activation_grad";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  const Act act = act_named(op, activation);
  check_device(op, grad_out, "codes", codes);
  const int64_t numel = grad_out.numel();
  const Packed packed = packed_of(op, codes, params, bits, numel);
  const OnDevice on(grad_out);
  const Tensor flat = as_contiguous(grad_out);
  Tensor out = empty_beside(flat, flat.sizes());
  if (numel == 0) return out;
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_activation_grad_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()), packed.of_codes(), packed.of_params(), act,
        numel, static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor quant_pack_derivative_cuda(const Tensor& x, int64_t bits, std::string activation, double lo,
                                  double hi, int64_t seed) {
  const char* op = "quant_pack_derivative";
  const DType dtype = floating(op, "x", x.scalar_type());
  check_bits(op, bits);
  const Act act = act_named(op, activation);
  const QuantRange range = range_of(op, bits, lo, hi);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const int64_t numel = flat.numel();
  Tensor codes = new_codes(flat, bits);
  if (numel == 0) return codes;
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_pack_derivative_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()), numel, act, range, fold(seed),
        static_cast<uint8_t*>(codes.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return codes;
}

Tensor quant_apply_range_cuda(const Tensor& grad_out, const Tensor& codes, int64_t bits, double lo,
                              double hi) {
  const char* op = "quant_apply_range";
  const DType dtype = floating(op, "grad_out", grad_out.scalar_type());
  check_bits(op, bits);
  const QuantRange range = range_of(op, bits, lo, hi);
  check_device(op, grad_out, "codes", codes);
  const int64_t numel = grad_out.numel();
  const Tensor packed = whole_words(checked_codes(op, codes, bits, numel));
  const OnDevice on(grad_out);
  const Tensor flat = as_contiguous(grad_out);
  Tensor out = empty_beside(flat, flat.sizes());
  if (numel == 0) return out;
  with_bits(dtype, bits, [&]<class T, int kBits>() {
    quant_apply_range_kernel<T, kBits><<<group_blocks(numel), kQuantThreads, 0, on.stream()>>>(
        static_cast<const T*>(flat.const_data_ptr()),
        static_cast<const uint8_t*>(packed.const_data_ptr()), range, numel,
        static_cast<T*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("quant_pack_normalized", TORCH_BOX(&memtl::cuda::quant_pack_normalized_cuda));
  m.impl("quant_unpack_affine", TORCH_BOX(&memtl::cuda::quant_unpack_affine_cuda));
  m.impl("quant_unpack_activation", TORCH_BOX(&memtl::cuda::quant_unpack_activation_cuda));
  m.impl("quant_activation_grad", TORCH_BOX(&memtl::cuda::quant_activation_grad_cuda));
  m.impl("quant_pack_derivative", TORCH_BOX(&memtl::cuda::quant_pack_derivative_cuda));
  m.impl("quant_apply_range", TORCH_BOX(&memtl::cuda::quant_apply_range_cuda));
}
