#include "cuda/topk_grad.cuh"

#include <array>
#include <numeric>

#include "cpu/topk_grad_checks.h"
#include "cpu/topk_tensors.h"
#include "cuda/launch.h"

namespace memtl::cuda {
namespace {

constexpr int64_t kDecodedBytes = 16 << 20;  // of x, at a time, where it is decoded beforehand

// The operator's arguments, checked and contiguous.
struct Operands {
  Tensor values, positions, scale, counts, grad_out;
  int64_t n, features, k, k_tail;
  bool bitmap;

  int64_t tokens() const { return grad_out.size(0); }
  int64_t outputs() const { return grad_out.size(1); }
};

void add_parts(const float* parts, int64_t count, int64_t numel, float* out, const OnDevice& on) {
  constexpr int kThreads = 256;
  if (numel % 4 == 0) {
    add_parts_kernel<4>
        <<<blocks_of(numel / 4, kThreads), kThreads, 0, on.stream()>>>(parts, count, numel, out);
  } else {
    add_parts_kernel<1>
        <<<blocks_of(numel, kThreads), kThreads, 0, on.stream()>>>(parts, count, numel, out);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t processors_of(const Tensor& x) {
  int count = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  return count;
}

template <class T, class Value>
void launch_fused(const Operands& x, Tensor& out, const OnDevice& on) {
  const int64_t tokens = x.tokens(), outputs = x.outputs(), numel = out.numel();
  const int64_t split = split_tokens_of(tokens, outputs, x.features, processors_of(out));
  const int64_t splits = ceil_div(tokens, split);
  const int64_t tiles = ceil_div(outputs, kGradOutputs) * ceil_div(x.features, kBlock);
  const int64_t grid = tiles * splits;
  STD_TORCH_CHECK(grid < int64_t{1} << 31, "topk_weight_grad: a gradient [", outputs, ", ",
                  x.features, "] is too large");
  const int64_t size[] = {splits - 1, outputs, x.features};
  const Tensor parts = empty_beside(out, size);
  const PackedTokens<Value> packed = {static_cast<const Value*>(x.values.const_data_ptr()),
                                      static_cast<const uint8_t*>(x.positions.const_data_ptr()),
                                      static_cast<const uint16_t*>(x.scale.const_data_ptr()),
                                      x.features,
                                      kept_of(x.features, x.k, x.k_tail),
                                      static_cast<int>(x.k),
                                      static_cast<int>(x.k_tail)};
  const bool aligned = aligned16(x.grad_out) && outputs % kVector<T> == 0;
  const auto kernel = x.bitmap ? &topk_weight_grad_kernel<T, Value, BitReader>
                               : &topk_weight_grad_kernel<T, Value, ByteReader>;
  kernel<<<static_cast<unsigned>(grid), kGradThreads, 0, on.stream()>>>(
      packed, static_cast<const T*>(x.grad_out.const_data_ptr()), aligned, tokens, outputs, split,
      data<float>(out), data<float>(parts));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (splits > 1) add_parts(data<float>(parts), splits - 1, numel, data<float>(out), on);
}

// Whether a block of 256 features of a token is a packed block. The rows may then as well be
// tokens.
bool blocks_are_of_tokens(const Operands& x) {
  if (x.counts.numel() > 0) return false;
  return x.n == x.features || (x.n % kBlock == 0 && x.features % kBlock == 0);
}

template <class T>
void fused_of_type(const Operands& x, Tensor& out, const OnDevice& on) {
  switch (value_type("topk_weight_grad", x.values.scalar_type())) {
    case DType::i8:
      return launch_fused<T, int8_t>(x, out, on);
    case DType::bf16:
      return launch_fused<T, BFloat16>(x, out, on);
    case DType::f16:
      return launch_fused<T, Half>(x, out, on);
    default:
      return launch_fused<T, float>(x, out, on);
  }
}

// What the dispatcher gives for an operator of one result, by name.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor rows_of(Tensor x, int64_t first, int64_t count) {
  const bool absent = x.dim() != 2 || x.size(0) == 0;
  return absent ? x : torch::stable::narrow(x, 0, first, count);
}

// Decodes some rows at a time and leaves the product to torch.
Tensor decoded_weight_grad(const Operands& x, const OnDevice& on) {
  const ScalarType given = x.grad_out.scalar_type();
  const ScalarType dtype = given == ScalarType::Double ? ScalarType::Float : given;
  const int64_t rows = x.values.size(0);
  // Rows that are whole tokens together.
  const int64_t whole = x.features / std::gcd(x.n, x.features);
  const int64_t row_bytes = x.n * (dtype == ScalarType::Float ? 4 : 2);
  const int64_t each = std::max<int64_t>(1, kDecodedBytes / row_bytes / whole) * whole;
  Tensor out;
  for (int64_t row = 0; row < rows; row += each) {
    const int64_t count = std::min(each, rows - row);
    const int64_t token = row * x.n / x.features, tokens = count * x.n / x.features;
    const Tensor decoded = call("memtl::topk_unpack", "", rows_of(x.values, row, count),
                                rows_of(x.positions, row, count), rows_of(x.scale, row, count),
                                rows_of(x.counts, row, count), x.n, x.k, x.k_tail, x.bitmap, dtype);
    const int64_t size[] = {tokens, x.features};
    const Tensor grad = torch::stable::to(rows_of(x.grad_out, token, tokens), dtype);
    const Tensor part = call("aten::mm", "dtype", torch::stable::transpose(grad, 0, 1),
                             torch::stable::view(decoded, size), ScalarType::Float);
    if (row == 0) {
      out = part;
    } else {
      add_parts(data<float>(part), 1, out.numel(), data<float>(out), on);
    }
  }
  return out;
}

Tensor topk_weight_grad_cuda(const Tensor& values, const Tensor& positions, const Tensor& scale,
                             const Tensor& counts, const Tensor& grad_out, int64_t n,
                             int64_t features, int64_t k, int64_t k_tail, bool bitmap) {
  const char* op = "topk_weight_grad";
  check_packed(op, values, positions, scale, counts, n, k, k_tail, bitmap);
  const DType dtype = check_grad_out(grad_out, values, n, features);
  check_device(op, grad_out, "values", values);
  check_device(op, grad_out, "positions", positions);
  check_device(op, grad_out, "scale", scale);
  check_device(op, grad_out, "counts", counts);
  const OnDevice on(grad_out);
  const Operands x = {as_contiguous(values),
                      as_contiguous(positions),
                      as_contiguous(scale),
                      as_contiguous(counts),
                      as_contiguous(grad_out),
                      n,
                      features,
                      k,
                      k_tail,
                      bitmap};
  const int64_t size[] = {x.outputs(), features};
  Tensor out = empty_beside(grad_out, size, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (x.tokens() == 0) return torch::stable::zero_(out);
  if (!blocks_are_of_tokens(x)) return decoded_weight_grad(x, on);
  if (dtype == DType::bf16) {
    fused_of_type<BFloat16>(x, out, on);
  } else if (dtype == DType::f16) {
    fused_of_type<Half>(x, out, on);
  } else {
    return decoded_weight_grad(x, on);
  }
  return out;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("topk_weight_grad", TORCH_BOX(&memtl::cuda::topk_weight_grad_cuda));
}
