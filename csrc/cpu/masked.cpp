#include "masked.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <optional>

#include "bits.h"
#include "topk_product.h"

namespace memtl {
namespace {

constexpr int64_t kOutputs = 512;      // of a task of the weight gradient: their rows stay in L2,
constexpr int64_t kInputs = 1024;      // as do the sums of its entries
constexpr int64_t kLeastOutputs = 64;  // fewer are not worth reading x again

void check_mask(const char* op, const Tensor& mask, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte, op,
                  ": expected a mask of uint8 on the CPU, got ", describe(mask));
  STD_TORCH_CHECK(mask.numel() == ceil_div(outputs * inputs, 8), op, ": a weight [", outputs, ", ",
                  inputs, "] needs ", ceil_div(outputs * inputs, 8), " bytes of mask, got ",
                  describe(mask));
}

void check_matrix(const char* op, const char* name, const Tensor& x, const char* wanted) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu(), op, ": expected ", name, " ", wanted,
                  " on the CPU, got ", describe(x));
}

ScalarType accumulated(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the entries are few enough; the kernels compute in float32.
bool sparse(const Tensor& x, const Tensor& bits, int64_t numel) {
  if (x.scalar_type() == ScalarType::Double) return false;
  const MaskedKernels& kernels = masked_kernels();
  const int64_t kept = kernels.count(data<const uint8_t>(bits), bits.numel());
  return static_cast<double>(kept) <= kernels.dense_from * static_cast<double>(numel);
}

// x where a bit is set, else 0.
Tensor applied(const Tensor& x, const Tensor& bits) {
  const DType dtype = floating("masked", "x", x.scalar_type());
  const Tensor flat = torch::stable::contiguous(x);
  Tensor result = torch::stable::new_empty(flat, flat.sizes());
  const BitsKernels& kernels = bits_kernels();
  torch::stable::parallel_for(0, bits.numel(), kGrain / 8, [&](int64_t first, int64_t last) {
    kernels.apply(dtype, flat.data_ptr(), data<const uint8_t>(bits), 1.0, flat.numel(),
                  result.data_ptr(), first, last);
  });
  return result;
}

// a b + bias
Tensor dense(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, ScalarType wide) {
  const int64_t size[] = {a.size(0), b.size(1)};
  const Tensor out = torch::stable::new_empty(a, size, wide);
  const Tensor left = torch::stable::to(a, wide), right = torch::stable::to(b, wide);
  const Tensor start = bias ? torch::stable::to(*bias, wide) : out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), left.get(),
                                                         right.get(), bias ? 1.0 : 0.0, 1.0));
  return out;
}

// x [T, R] times the weight's transpose, R being its inputs, or times the weight, of its outputs.
Tensor multiply(const char* op, const Tensor& x, const Tensor& weight, const Tensor& mask,
                const std::optional<Tensor>& bias, bool inputs) {
  const DType weight_dtype = floating(op, "weight", weight.scalar_type());
  const int64_t tokens = x.size(0), reduced = weight.size(inputs ? 1 : 0);
  const int64_t features = weight.size(inputs ? 0 : 1);
  const DType dtype = floating(op, inputs ? "x" : "grad_out", x.scalar_type());
  STD_TORCH_CHECK(x.size(1) == reduced, op, ": expected ", inputs ? "x" : "grad_out", " [T, ",
                  reduced, "] for weight ", describe(weight), ", got ", describe(x));
  const Tensor bits = torch::stable::contiguous(mask);
  const ScalarType wide = accumulated(x);
  Tensor out;
  if (!sparse(x, bits, weight.numel())) {
    const Tensor kept = applied(weight, bits);
    out = dense(x, inputs ? torch::stable::transpose(kept, 0, 1) : kept, bias, wide);
  } else {
    const int64_t size[] = {tokens, features};
    out = torch::stable::new_empty(x, size, wide);
    const Tensor rows = torch::stable::contiguous(x), values = torch::stable::contiguous(weight);
    const Tensor start = bias ? torch::stable::contiguous(torch::stable::to(*bias, wide)) : out;
    const MaskedWeight sparse_weight = {weight_dtype, values.data_ptr(), data<const uint8_t>(bits),
                                        weight.size(0), weight.size(1)};
    const MaskedKernels& kernels = masked_kernels();
    const auto sort = [&](int64_t first, int64_t last, int64_t width, int64_t panels,
                          ColumnMemory& memory, TopkColumns* columns, uint32_t* cursors) {
      const int64_t entries = kernels.count_entries(sparse_weight, inputs, first, last, cursors);
      kernels.sort(sparse_weight, inputs, first, last, width,
                   memory.storage(entries, features, panels), columns, cursors);
      return true;
    };
    if (out.numel() > 0) {
      sparse_product({dtype, rows.data_ptr(), 1, reduced}, reduced, tokens, features,
                     bias ? data<const float>(start) : nullptr, sort, data<float>(out));
    }
  }
  return torch::stable::to(out, x.scalar_type());
}

Tensor masked_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& mask,
                         std::optional<Tensor> bias) {
  const char* op = "masked_linear";
  check_matrix(op, "x", x, "[T, I]");
  check_matrix(op, "weight", weight, "[O, I]");
  check_mask(op, mask, weight.size(0), weight.size(1));
  if (bias) {
    floating(op, "bias", bias->scalar_type());
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == weight.size(0), op,
                    ": expected bias [", weight.size(0), "], got ", describe(*bias));
  }
  return multiply(op, x, weight, mask, bias, true);
}

Tensor masked_linear_input_grad_cpu(const Tensor& grad_out, const Tensor& weight,
                                    const Tensor& mask) {
  const char* op = "masked_linear_input_grad";
  check_matrix(op, "grad_out", grad_out, "[T, O]");
  check_matrix(op, "weight", weight, "[O, I]");
  check_mask(op, mask, weight.size(0), weight.size(1));
  return multiply(op, grad_out, weight, mask, std::nullopt, false);
}

// Tasks are parts of the weight. Of the tokens, a tile or two at a time: rows of grad_out, which
// every block of features reads.
void sparse_weight_grad(DType dtype, const void* grad_out, const void* x, int64_t tokens,
                        const MaskedWeight& weight, float* out) {
  const MaskedKernels& kernels = masked_kernels();
  const TopkGradKernels& tiles = topk_grad_kernels();
  const int64_t outputs = weight.outputs, inputs = weight.inputs;
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? 2 * threads : 1;
  const int64_t panels = ceil_div(inputs, kInputs);
  const int64_t bands = std::max(ceil_div(outputs, kOutputs), ceil_div(wanted, panels));
  const int64_t height = std::max(ceil_div(outputs, bands), std::min(outputs, kLeastOutputs));
  const int64_t width = ceil_div(ceil_div(inputs, panels), kMaskedFeatures) * kMaskedFeatures;
  const int64_t task_panels = ceil_div(inputs, width);
  for_tasks(ceil_div(outputs, height) * task_panels, [&](int64_t task) {
    const int64_t first = task / task_panels * height, rows = std::min(outputs - first, height);
    const int64_t begin = task % task_panels * width, end = std::min(inputs, begin + width);
    const int64_t blocks = ceil_div(end - begin, kMaskedFeatures);
    const auto for_blocks = [&](const auto& f) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t feature = begin + i * kMaskedFeatures;
        f(i, feature, std::min<int64_t>(end - feature, kMaskedFeatures));
      }
    };
    const auto lengths = std::make_unique_for_overwrite<uint8_t[]>(size_t(blocks * rows));
    const auto positions = std::make_unique_for_overwrite<uint8_t[]>(size_t(rows * (end - begin)));
    std::vector<int64_t> starts = {0};
    for_blocks([&](int64_t i, int64_t feature, int64_t features) {
      starts.push_back(starts.back() + kernels.list(weight, first, first + rows, feature, features,
                                                    lengths.get() + i * rows,
                                                    positions.get() + starts.back()));
    });
    const auto entries = [&](int64_t i) -> MaskedEntries {
      return {rows, lengths.get() + i * rows, positions.get() + starts[size_t(i)]};
    };
    // Whole vectors of sums are written: more than there are.
    const int64_t chunk = 2 * tiles.tile, sums_size = ceil_div(starts.back(), 16) * 16 + 16;
    const Workspace work = workspace(sums_size + (rows + kMaskedFeatures) * chunk);
    float *sums = work.get(), *of_outputs = sums + sums_size,
          *of_inputs = of_outputs + rows * chunk;
    std::fill_n(sums, sums_size, 0.0f);
    for (int64_t token = 0; token < tokens;) {
      const int64_t left = tokens - token, both = left >= chunk ? 2 : 1;
      const int64_t size = std::min(left, both * tiles.tile);
      const int64_t vectors = ceil_div(std::min(size, tiles.tile), tiles.lanes);
      const int64_t row_tile = rows * tiles.tile, input_tile = kMaskedFeatures * tiles.tile;
      tiles.fill(dtype, grad_out, token * outputs + first, 1, outputs, rows, size, of_outputs,
                 row_tile);
      for_blocks([&](int64_t i, int64_t feature, int64_t features) {
        tiles.fill(dtype, x, token * inputs + feature, 1, inputs, features, size, of_inputs,
                   input_tile);
        kernels.dot(entries(i), both, vectors, of_outputs, row_tile, of_inputs, input_tile,
                    sums + starts[size_t(i)]);
      });
      token += size;
    }
    for_blocks([&](int64_t i, int64_t feature, int64_t features) {
      kernels.spread(entries(i), sums + starts[size_t(i)], features, out + first * inputs + feature,
                     inputs);
    });
  });
}

Tensor masked_linear_weight_grad_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& mask) {
  const char* op = "masked_linear_weight_grad";
  check_matrix(op, "grad_out", grad_out, "[T, O]");
  check_matrix(op, "x", x, "[T, I]");
  const DType dtype = floating(op, "x", x.scalar_type());
  STD_TORCH_CHECK(x.size(0) == grad_out.size(0) && x.scalar_type() == grad_out.scalar_type(), op,
                  ": expected grad_out [T, O] and x [T, I] of one dtype, got ", describe(grad_out),
                  " and ", describe(x));
  const int64_t outputs = grad_out.size(1), inputs = x.size(1);
  check_mask(op, mask, outputs, inputs);
  const Tensor bits = torch::stable::contiguous(mask);
  if (!sparse(x, bits, outputs * inputs)) {
    return applied(dense(torch::stable::transpose(grad_out, 0, 1), x, std::nullopt, accumulated(x)),
                   bits);
  }
  const int64_t size[] = {outputs, inputs};
  Tensor out = torch::stable::new_empty(x, size, ScalarType::Float);
  if (out.numel() == 0) return out;
  const Tensor grad_rows = torch::stable::contiguous(grad_out), rows = torch::stable::contiguous(x);
  sparse_weight_grad(dtype, grad_rows.data_ptr(), rows.data_ptr(), x.size(0),
                     {dtype, nullptr, data<const uint8_t>(bits), outputs, inputs},
                     data<float>(out));
  return out;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&memtl::masked_linear_cpu));
  m.impl("masked_linear_input_grad", TORCH_BOX(&memtl::masked_linear_input_grad_cpu));
  m.impl("masked_linear_weight_grad", TORCH_BOX(&memtl::masked_linear_weight_grad_cpu));
}
