#include "bits.h"

#include <optional>
#include <vector>

#include "bits_checks.h"
#include "tensor.h"

namespace memtl {
namespace {

Tensor bits_pack_cpu(const Tensor& mask) {
  check_bool("bits_pack", mask);
  const Tensor flat = torch::stable::contiguous(mask);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, 8)};
  Tensor bits = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const auto* in = static_cast<const uint8_t*>(flat.const_data_ptr());
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, size[0], kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.pack(in, numel, out, first, last);
  });
  return bits;
}

Tensor bits_pack_between_cpu(const Tensor& x, std::optional<double> lo, std::optional<double> hi) {
  const DType dtype = floating("bits_pack_between", "x", x.scalar_type());
  const Tensor flat = torch::stable::contiguous(x);
  const int64_t numel = flat.numel();
  const int64_t size[] = {ceil_div(numel, 8)};
  Tensor bits = torch::stable::new_empty(flat, size, ScalarType::Byte);
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const double low = bound(lo, dtype), high = bound(hi, dtype);
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, size[0], kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.pack_between(dtype, in, low, high, numel, out, first, last);
  });
  return bits;
}

Tensor bits_apply_cpu(const Tensor& x, const Tensor& bits, double scale) {
  const DType dtype = floating("bits_apply", "x", x.scalar_type());
  const int64_t numel = x.numel();
  check_bits_of("bits_apply", x, bits);
  const Tensor flat = torch::stable::contiguous(x);
  const Tensor packed = torch::stable::contiguous(bits);
  Tensor result = torch::stable::new_empty(flat, flat.sizes());
  const void* in = flat.const_data_ptr();
  const auto* in_bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, packed.numel(), kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.apply(dtype, in, in_bits, scale, numel, out, first, last);
  });
  return result;
}

// Elements of parts that threads take: where each part's selected elements begin, and the end of
// all.
constexpr int64_t kPartBytes = kGrain / 8;

std::vector<int64_t> starts_of(const uint8_t* bits, int64_t numel) {
  const int64_t bytes = ceil_div(numel, 8), parts = ceil_div(bytes, kPartBytes);
  std::vector<int64_t> starts(static_cast<size_t>(parts + 1));
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, parts, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = std::min((i + 1) * kPartBytes, bytes);
      starts[static_cast<size_t>(i + 1)] = kernels.count(bits, numel, i * kPartBytes, end);
    }
  });
  for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
  return starts;
}

// Calls run(start, first, last) for the bytes of every part.
template <class Run>
void for_parts(const std::vector<int64_t>& starts, int64_t numel, const Run& run) {
  const auto parts = static_cast<int64_t>(starts.size()) - 1;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = std::min((i + 1) * kPartBytes, ceil_div(numel, 8));
      run(starts[static_cast<size_t>(i)], i * kPartBytes, end);
    }
  });
}

void check_count(const char* op, int64_t count, int64_t set) {
  STD_TORCH_CHECK(count == set, op, ": ", count, " values were asked for, and ", set,
                  " bits are set");
}

Tensor bits_select_cpu(const Tensor& x, const Tensor& bits, int64_t count) {
  const int64_t size = size_of(floating("bits_select", "x", x.scalar_type())), numel = x.numel();
  check_bits_of("bits_select", x, bits);
  const Tensor flat = torch::stable::contiguous(x), packed = torch::stable::contiguous(bits);
  const auto* in_bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  const std::vector<int64_t> starts = starts_of(in_bits, numel);
  check_count("bits_select", count, starts.back());
  Tensor result = torch::stable::new_empty(flat, {count});
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  const BitsKernels& kernels = bits_kernels();
  for_parts(starts, numel, [&](int64_t start, int64_t first, int64_t last) {
    kernels.select(size, in, in_bits, numel, out + start * size, first, last);
  });
  return result;
}

Tensor bits_expand_cpu(const Tensor& values, const Tensor& bits, std::vector<int64_t> sizes) {
  const int64_t size = size_of(floating("bits_expand", "values", values.scalar_type()));
  check_values("bits_expand", values);
  Tensor result = torch::stable::new_empty(values, sizes);
  check_bits_of("bits_expand", result, bits);
  const int64_t numel = result.numel();
  const Tensor flat = torch::stable::contiguous(values), packed = torch::stable::contiguous(bits);
  const auto* in_bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  const std::vector<int64_t> starts = starts_of(in_bits, numel);
  check_count("bits_expand", flat.numel(), starts.back());
  const auto* in = static_cast<const uint8_t*>(flat.const_data_ptr());
  void* out = result.mutable_data_ptr();
  const BitsKernels& kernels = bits_kernels();
  for_parts(starts, numel, [&](int64_t start, int64_t first, int64_t last) {
    kernels.expand(size, in + start * size, in_bits, numel, out, first, last);
  });
  return result;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("bits_pack", TORCH_BOX(&memtl::bits_pack_cpu));
  m.impl("bits_pack_between", TORCH_BOX(&memtl::bits_pack_between_cpu));
  m.impl("bits_apply", TORCH_BOX(&memtl::bits_apply_cpu));
  m.impl("bits_select", TORCH_BOX(&memtl::bits_select_cpu));
  m.impl("bits_expand", TORCH_BOX(&memtl::bits_expand_cpu));
}
