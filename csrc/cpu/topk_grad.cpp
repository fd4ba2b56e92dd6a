#include "topk_grad.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "topk_columns.h"
#include "topk_reading.h"

namespace memtl {
namespace {

constexpr int64_t kDenseTokens = 512;  // decoded at a time where a dense product is faster
constexpr int64_t kGroup = 4;          // tiles: longer pieces of grad_out's rows are read faster
constexpr int64_t kSums = 3072;        // features whose sums of one tile fit in L2

void sparse_weight_grad(const Reading& reading, DType dtype, const void* grad_out, int64_t tokens,
                        int64_t outputs, int64_t features, float* out) {
  const TopkPacked& packed = reading.packed;
  const TopkGradKernels& kernels = topk_grad_kernels();
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? 2 * threads : 1;
  const int64_t tiles = ceil_div(outputs, kernels.tile);
  int64_t panels = ceil_div(features, kSums), together = kGroup;
  while (together > 1 && (together * features > kSums || ceil_div(tiles, together) < wanted)) {
    together /= 2;
  }
  const int64_t groups = ceil_div(tiles, together);
  panels = std::max(panels, ceil_div(wanted, groups));
  const int64_t width = std::max<int64_t>(64, ceil_div(ceil_div(features, panels), 16) * 16);
  panels = ceil_div(features, width);

  const int64_t blocks = ceil_div(tokens, kTopkTokens);
  std::vector<ColumnMemory> memory(static_cast<size_t>(blocks));
  std::vector<TopkColumns> columns(static_cast<size_t>(blocks * panels));
  std::atomic<bool> ascending{true};
  const auto transpose = [&](int64_t i, uint32_t* cursors) {
    const int64_t first = i * kTopkTokens, last = std::min(tokens, first + kTopkTokens);
    const int64_t begin = first * features, end = last * features - 1;
    const int64_t entries = reading.place(end / packed.n, end % packed.n / kBlock + 1) -
                            reading.place(begin / packed.n, begin % packed.n / kBlock);
    const TopkStorage storage = memory[static_cast<size_t>(i)].storage(entries, features, panels);
    if (!kernels.transpose(packed, features, first, last, width, storage,
                           columns.data() + i * panels, cursors)) {
      ascending = false;
    }
  };
  // Of every tile of a group: the sums, and the rows of a block of tokens.
  const int64_t sums_size = (width + 1) * kernels.tile, rows_size = kTopkTokens * kernels.tile;
  const auto multiply = [&](int64_t i, float* sums) {
    const int64_t first_feature = i / groups * width, first_tile = i % groups * together;
    const int64_t first_output = first_tile * kernels.tile;
    const int64_t count = std::min(outputs - first_output, together * kernels.tile);
    float* rows = sums + together * sums_size;
    std::fill_n(sums, together * sums_size, 0.0f);
    const auto for_tiles = [&](const auto& f) {
      for (int64_t output = 0; output < count; output += kernels.tile) {
        f(output / kernels.tile, output, std::min(count - output, kernels.tile));
      }
    };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t token = block * kTopkTokens;
      kernels.fill(dtype, grad_out, token * outputs + first_output, outputs, 1,
                   std::min<int64_t>(tokens - token, kTopkTokens), count, rows, rows_size);
      const TopkColumns& entries = columns[static_cast<size_t>(block * panels + i / groups)];
      for_tiles([&](int64_t tile, int64_t, int64_t size) {
        kernels.accumulate(entries, ceil_div(size, kernels.lanes), rows + tile * rows_size,
                           sums + tile * sums_size);
      });
    }
    for_tiles([&](int64_t tile, int64_t output, int64_t size) {
      kernels.write(sums + tile * sums_size, 0, 1, std::min(width, features - first_feature), size,
                    out + (first_output + output) * features + first_feature, features);
    });
  };

  // One parallel region for both steps: on a busy machine, joining the threads may cost more than
  // either. A thread that comes late finds nothing left to do.
  std::atomic<int64_t> next_block{0}, next_task{0}, blocks_done{0};
  const int64_t tasks = groups * panels;
  torch::stable::parallel_for(
      0, std::min(threads, std::max(blocks, tasks)), 1, [&](int64_t, int64_t) {
        const auto cursors =
            std::make_unique_for_overwrite<uint32_t[]>(static_cast<size_t>(features));
        for (int64_t i = next_block++; i < blocks; i = next_block++) {
          try {
            transpose(i, cursors.get());
          } catch (...) {  // nobody waits for it
            ascending = false;
            ++blocks_done;
            throw;
          }
          ++blocks_done;
        }
        while (blocks_done < blocks) std::this_thread::yield();
        if (!ascending) return;
        const Workspace work = workspace(together * (sums_size + rows_size));
        for (int64_t i = next_task++; i < tasks; i = next_task++) multiply(i, work.get());
      });
  reading.check_ascending(ascending);
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
  STD_TORCH_CHECK(grad_out.dim() == 2, "topk_weight_grad: expected grad_out [T, O], got ",
                  describe(grad_out));
  STD_TORCH_CHECK(grad_out.is_cpu(), "topk_weight_grad: expected grad_out on the CPU");
  const DType dtype = floating("topk_weight_grad", "grad_out", grad_out.scalar_type());
  const int64_t tokens = grad_out.size(0), outputs = grad_out.size(1);
  STD_TORCH_CHECK(features >= 0 && features < (int64_t{1} << 24),
                  "topk_weight_grad: expected features in [0, 2^24), got ", features);
  const Reading reading("topk_weight_grad", values, positions, scale, counts, n, k, k_tail, bitmap);
  STD_TORCH_CHECK(tokens * features == values.size(0) * n, "topk_weight_grad: ", values.size(0),
                  " rows of ", n, " are not ", tokens, " tokens of ", features,
                  " features, those of grad_out ", describe(grad_out));
  const int64_t size[] = {outputs, features};
  Tensor out = torch::stable::new_empty(grad_out, size, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (tokens == 0) return torch::stable::zero_(out);
  const TopkPacked& packed = reading.packed;
  if (static_cast<double>(packed.kept) > topk_grad_kernels().dense_from * static_cast<double>(n)) {
    dense_weight_grad(reading, grad_out, features, out);
  } else {
    const Tensor rows = torch::stable::contiguous(grad_out);
    sparse_weight_grad(reading, dtype, rows.data_ptr(), tokens, outputs, features,
                       data<float>(out));
  }
  return out;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("topk_weight_grad", TORCH_BOX(&memtl::topk_weight_grad_cpu));
}
