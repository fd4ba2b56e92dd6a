#include "quant.h"

#include <tuple>

#include "quant_checks.h"

namespace memtl {
namespace {

std::tuple<Tensor, Tensor> quant_pack_cpu(const Tensor& x, int64_t bits, int64_t seed) {
  const DType dtype = floating("quant_pack", "x", x.scalar_type());
  check_bits("quant_pack", bits);
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel();
  const int64_t groups = ceil_div(numel, kGroup);
  const int64_t codes_size[] = {groups, 8 * bits};
  const int64_t params_size[] = {groups, 2};
  Tensor codes = torch::stable::new_empty(flat, codes_size, ScalarType::Byte);
  Tensor params = torch::stable::new_empty(flat, params_size, ScalarType::BFloat16);
  const void* in = flat.const_data_ptr();
  auto* out_codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* out_params = static_cast<uint16_t*>(params.mutable_data_ptr());
  const QuantKernels& kernels = quant_kernels();
  torch::stable::parallel_for(0, groups, kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.pack(dtype, in, numel, static_cast<int>(bits), fold(seed), out_codes, out_params, first,
                 last);
  });
  return {codes, params};
}

std::tuple<Tensor, Tensor> quant_pack_normalized_cpu(const Tensor& x, const Tensor& mean,
                                                     const Tensor& rstd, int64_t bits,
                                                     int64_t inner, int64_t seed) {
  const char* op = "quant_pack_normalized";
  const DType dtype = floating(op, "x", x.scalar_type());
  check_bits(op, bits);
  STD_TORCH_CHECK(inner > 0, op, ": expected inner > 0, got ", inner);
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel(), groups = ceil_div(numel, kGroup);
  const int64_t codes_size[] = {groups, 8 * bits};
  const int64_t params_size[] = {groups, 2};
  Tensor codes = torch::stable::new_empty(flat, codes_size, ScalarType::Byte);
  Tensor params = torch::stable::new_empty(flat, params_size, ScalarType::BFloat16);
  if (numel == 0) return {codes, params};
  const std::vector<float> means = channel_table(op, "mean", mean);
  const std::vector<float> scales = channel_table(op, "rstd", rstd);
  STD_TORCH_CHECK(means.size() == scales.size(), op, ": expected mean and rstd of one size, got ",
                  describe(mean), " and ", describe(rstd));
  const Channels channels{scales.data(), means.data(), static_cast<int64_t>(means.size()) - kGroup,
                          inner};
  check_channels(op, channels.channels, inner, numel);
  const void* in = flat.const_data_ptr();
  auto* out_codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* out_params = static_cast<uint16_t*>(params.mutable_data_ptr());
  const QuantKernels& kernels = quant_kernels();
  torch::stable::parallel_for(0, groups, kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.pack_normalized(dtype, in, numel, channels, static_cast<int>(bits), fold(seed),
                            out_codes, out_params, first, last);
  });
  return {codes, params};
}

Tensor quant_unpack_cpu(const Tensor& codes, const Tensor& params, int64_t bits,
                        std::vector<int64_t> size, ScalarType dtype) {
  const DType out_dtype = floating("quant_unpack", "a result", dtype);
  check_bits("quant_unpack", bits);
  const int64_t numel = numel_of(size);
  const Tensor packed = checked_codes("quant_unpack", codes, bits, numel);
  const Tensor flat_params = checked_params("quant_unpack", params, packed);
  Tensor result = torch::stable::new_empty(packed, size, dtype);
  const auto* in_codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto* in_params = static_cast<const uint16_t*>(flat_params.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const QuantKernels& kernels = quant_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.unpack(out_dtype, in_codes, in_params, static_cast<int>(bits), out, numel, first, last);
  });
  return result;
}

Tensor quant_pack_range_cpu(const Tensor& x, int64_t bits, double lo, double hi, int64_t seed) {
  const DType dtype = floating("quant_pack_range", "x", x.scalar_type());
  check_bits("quant_pack_range", bits);
  const QuantRange range = range_of("quant_pack_range", bits, lo, hi);
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, kGroup), 8 * bits};
  Tensor codes = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const QuantKernels& kernels = quant_kernels();
  torch::stable::parallel_for(0, size[0], kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.pack_range(dtype, in, numel, static_cast<int>(bits), range, fold(seed), out, first,
                       last);
  });
  return codes;
}

Tensor quant_unpack_range_cpu(const Tensor& codes, int64_t bits, double lo, double hi,
                              std::vector<int64_t> size, ScalarType dtype) {
  const DType out_dtype = floating("quant_unpack_range", "a result", dtype);
  check_bits("quant_unpack_range", bits);
  const QuantRange range = range_of("quant_unpack_range", bits, lo, hi);
  const int64_t numel = numel_of(size);
  const Tensor packed = checked_codes("quant_unpack_range", codes, bits, numel);
  Tensor result = torch::stable::new_empty(packed, size, dtype);
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const QuantKernels& kernels = quant_kernels();
  torch::stable::parallel_for(0, packed.size(0), kGroupGrain, [&](int64_t first, int64_t last) {
    kernels.unpack_range(out_dtype, in, static_cast<int>(bits), range, out, numel, first, last);
  });
  return result;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("quant_pack", TORCH_BOX(&memtl::quant_pack_cpu));
  m.impl("quant_pack_normalized", TORCH_BOX(&memtl::quant_pack_normalized_cpu));
  m.impl("quant_unpack", TORCH_BOX(&memtl::quant_unpack_cpu));
  m.impl("quant_pack_range", TORCH_BOX(&memtl::quant_pack_range_cpu));
  m.impl("quant_unpack_range", TORCH_BOX(&memtl::quant_unpack_range_cpu));
}
