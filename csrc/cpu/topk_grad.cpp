#include "topk_grad.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "topk_reading.h"

namespace memtl {
namespace {

constexpr int64_t kDenseTokens = 512;  // decoded at a time where a dense product is faster
constexpr int64_t kPanel = 1536;       // features whose sums of one tile still fit in L2

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<float[], FreeAligned>;

Workspace workspace(int64_t floats) {
  return Workspace(new (std::align_val_t{64}) float[static_cast<size_t>(floats)]);
}

// The entries of one block of tokens, feature by feature, in every panel of features.
struct TokenBlock {
  std::unique_ptr<char[]> memory;

  TokenBlock() = default;
  // `entries` is at least the number that will be there.
  TokenBlock(int64_t entries, int64_t features, int64_t panels, TopkColumns* columns) {
    entries += panels * kTopkTokens;  // what fills up the shorter of a pair
    const int64_t places = features + panels + 2;
    memory = std::make_unique_for_overwrite<char[]>(
        static_cast<size_t>(entries * 5 + places * 4 + (places / 2 + 1) * 2));
    columns->values = reinterpret_cast<float*>(memory.get());
    columns->features = reinterpret_cast<uint32_t*>(columns->values + entries);
    columns->lengths = reinterpret_cast<uint16_t*>(columns->features + places);
    columns->tokens = reinterpret_cast<uint8_t*>(columns->lengths + places / 2 + 1);
  }
};

void sparse_weight_grad(const Reading& reading, DType dtype, const void* grad_out, int64_t tokens,
                        int64_t outputs, int64_t features, float* out) {
  const TopkPacked& packed = reading.packed;
  const TopkGradKernels& kernels = topk_grad_kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = ceil_div(outputs, kernels.tile);
  int64_t panels = ceil_div(features, kPanel);
  if (threads > 1) panels = std::max(panels, ceil_div(2 * threads, tiles));
  const int64_t width = std::max<int64_t>(64, ceil_div(ceil_div(features, panels), 16) * 16);
  panels = ceil_div(features, width);

  const int64_t blocks = ceil_div(tokens, kTopkTokens);
  std::vector<TokenBlock> token_blocks(static_cast<size_t>(blocks));
  std::vector<TopkColumns> columns(static_cast<size_t>(blocks * panels));
  std::atomic<bool> ascending{true};
  const auto transpose = [&](int64_t i, uint32_t* cursors) {
    const int64_t first = i * kTopkTokens, last = std::min(tokens, first + kTopkTokens);
    const int64_t begin = first * features, end = last * features - 1;
    const int64_t entries = reading.place(end / packed.n, end % packed.n / kBlock + 1) -
                            reading.place(begin / packed.n, begin % packed.n / kBlock);
    TopkColumns* of_block = columns.data() + i * panels;
    token_blocks[static_cast<size_t>(i)] = TokenBlock(entries, features, panels, of_block);
    if (!kernels.transpose(packed, features, first, last, width, of_block, cursors)) {
      ascending = false;
    }
  };
  const auto multiply = [&](int64_t i, float* work) {
    const int64_t panel = i / tiles, output = i % tiles * kernels.tile;
    kernels.product(dtype, grad_out, tokens, outputs, columns.data() + panel, panels, output,
                    panel * width, std::min(width, features - panel * width), features, work, out);
  };

  // One parallel region for both steps: on a busy machine, joining the threads may cost more than
  // either. A thread that comes late finds nothing left to do.
  std::atomic<int64_t> next_block{0}, next_tile{0}, blocks_done{0};
  const int64_t tasks = std::max(blocks, tiles * panels);
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    const auto cursors = std::make_unique_for_overwrite<uint32_t[]>(static_cast<size_t>(features));
    for (int64_t i = next_block++; i < blocks; i = next_block++) {
      transpose(i, cursors.get());
      ++blocks_done;
    }
    while (blocks_done < blocks) std::this_thread::yield();
    if (!ascending) return;
    const Workspace work = workspace((kTopkTokens + width + 2) * kernels.tile);
    for (int64_t i = next_tile++; i < tiles * panels; i = next_tile++) multiply(i, work.get());
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
