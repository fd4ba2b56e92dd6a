#include "topk_grad.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>

#include "topk_grad_checks.h"
#include "topk_product.h"
#include "topk_reading.h"

namespace memtl {
namespace {

constexpr int64_t kDenseTokens = 512;  // decoded at a time where a dense product is faster

void sparse_weight_grad(const Reading& reading, const Rows& grad_out, int64_t tokens,
                        int64_t outputs, int64_t features, float* out) {
  const TopkPacked& packed = reading.packed;
  const TopkGradKernels& kernels = topk_grad_kernels();
  const auto sort = [&](int64_t first, int64_t last, int64_t width, int64_t panels,
                        ColumnMemory& memory, TopkColumns* columns, uint32_t* cursors) {
    const int64_t begin = first * features, end = last * features - 1;
    const int64_t entries = reading.place(end / packed.n, end % packed.n / kBlock + 1) -
                            reading.place(begin / packed.n, begin % packed.n / kBlock);
    const TopkStorage storage = memory.storage(entries, features, panels);
    return kernels.transpose(packed, features, first, last, width, storage, columns, cursors);
  };
  reading.check_ascending(sparse_product(grad_out, tokens, outputs, features, nullptr, sort, out));
}

// Decodes some tokens at a time and leaves the product to torch.
void dense_weight_grad(const Reading& reading, Tensor grad_out, int64_t features,
                       const Tensor& out) {
  const int64_t tokens = grad_out.size(0);
  const int64_t chunk = ceil_div(tokens, ceil_div(tokens, kDenseTokens));
  const int64_t size[] = {chunk, features};
  Tensor decoded = torch::stable::new_empty(out, size);
  auto* x = data<float>(decoded);
  const TopkReadKernels& kernels = topk_read_kernels();
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t count = std::min(chunk, tokens - token);
    std::atomic<bool> ascending{true};
    torch::stable::parallel_for(0, count * features, kGrain, [&](int64_t first, int64_t last) {
      const int64_t begin = token * features;
      if (!kernels.unpack(reading.packed, begin + first, begin + last, DType::f32, x + first)) {
        ascending = false;
      }
    });
    reading.check_ascending(ascending);
    const Tensor rows =
        torch::stable::to(torch::stable::narrow(grad_out, 0, token, count), ScalarType::Float);
    const Tensor columns = torch::stable::transpose(rows, 0, 1);
    const Tensor kept = torch::stable::narrow(decoded, 0, 0, count);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
        out.get(), out.get(), columns.get(), kept.get(), token == 0 ? 0.0 : 1.0, 1.0));
  }
}

Tensor topk_weight_grad_cpu(const Tensor& values, const Tensor& positions, const Tensor& scale,
                            const Tensor& counts, const Tensor& grad_out, int64_t n,
                            int64_t features, int64_t k, int64_t k_tail, bool bitmap) {
  STD_TORCH_CHECK(grad_out.is_cpu(), "topk_weight_grad: expected grad_out on the CPU");
  const Reading reading("topk_weight_grad", values, positions, scale, counts, n, k, k_tail, bitmap);
  const DType dtype = check_grad_out(grad_out, values, n, features);
  const int64_t tokens = grad_out.size(0), outputs = grad_out.size(1);
  const int64_t size[] = {outputs, features};
  Tensor out = torch::stable::new_empty(grad_out, size, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (tokens == 0) return torch::stable::zero_(out);
  const TopkPacked& packed = reading.packed;
  if (static_cast<double>(packed.kept) > topk_grad_kernels().dense_from * static_cast<double>(n)) {
    dense_weight_grad(reading, grad_out, features, out);
  } else {
    const Tensor rows = torch::stable::contiguous(grad_out);
    sparse_weight_grad(reading, {dtype, rows.data_ptr(), outputs, 1}, tokens, outputs, features,
                       data<float>(out));
  }
  return out;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("topk_weight_grad", TORCH_BOX(&memtl::topk_weight_grad_cpu));
}
