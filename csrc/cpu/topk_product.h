// A product with a sparse factor, in parallel: what both families of sparse products are made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "tensor.h"
#include "topk_columns.h"

namespace memtl {

// The dense factor [tokens, outputs]: numbers of any dtype at any distances.
struct Rows {
  DType dtype;
  const void* from;
  int64_t row_stride, output_stride;
};

// out [outputs, features] = rows^T x + start, x [tokens, features] being sparse and `start`
// [features] or null. sort(first, last, width, panels, memory, columns, cursors) puts the entries
// of a block of tokens into columns [panels] of `width` features each, cursors being room for
// `features`; where it says false, so does this, and out is as it was.
template <class Sort>
bool sparse_product(const Rows& rows, int64_t tokens, int64_t outputs, int64_t features,
                    const float* start, const Sort& sort, float* out) {
  constexpr int64_t kGroup = 4;    // tiles: longer pieces of rows are read faster
  constexpr int64_t kSums = 3072;  // features whose sums of one tile fit in L2
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
  std::atomic<bool> sorted{true};
  // Of every tile of a group: the sums, and the rows of a block of tokens.
  const int64_t sums_size = (width + 1) * kernels.tile, rows_size = kTopkTokens * kernels.tile;
  const auto multiply = [&](int64_t i, float* sums) {
    const int64_t first_feature = i / groups * width, first_tile = i % groups * together;
    const int64_t some = std::min(width, features - first_feature);
    const int64_t first_output = first_tile * kernels.tile;
    const int64_t count = std::min(outputs - first_output, together * kernels.tile);
    float* of_rows = sums + together * sums_size;
    const auto for_tiles = [&](const auto& f) {
      for (int64_t output = 0; output < count; output += kernels.tile) {
        f(output / kernels.tile, output, std::min(count - output, kernels.tile));
      }
    };
    for_tiles([&](int64_t tile, int64_t, int64_t size) {
      float* to = sums + tile * sums_size;
      if (start == nullptr) {
        std::fill_n(to, sums_size, 0.0f);
        return;
      }
      const int64_t row = ceil_div(size, kernels.lanes) * kernels.lanes;
      for (int64_t f = 0; f < some; ++f) std::fill_n(to + f * row, row, start[first_feature + f]);
      std::fill_n(to + width * row, row, 0.0f);  // of the feature that is none
    });
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t token = block * kTopkTokens;
      kernels.fill(rows.dtype, rows.from,
                   token * rows.row_stride + first_output * rows.output_stride, rows.row_stride,
                   rows.output_stride, std::min<int64_t>(tokens - token, kTopkTokens), count,
                   of_rows, rows_size);
      const TopkColumns& entries = columns[static_cast<size_t>(block * panels + i / groups)];
      for_tiles([&](int64_t tile, int64_t, int64_t size) {
        kernels.accumulate(entries, ceil_div(size, kernels.lanes), of_rows + tile * rows_size,
                           sums + tile * sums_size);
      });
    }
    for_tiles([&](int64_t tile, int64_t output, int64_t size) {
      kernels.write(sums + tile * sums_size, 0, 1, some, size,
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
          const int64_t first = i * kTopkTokens;
          try {
            if (!sort(first, std::min(tokens, first + kTopkTokens), width, panels,
                      memory[static_cast<size_t>(i)], columns.data() + i * panels, cursors.get())) {
              sorted = false;
            }
          } catch (...) {  // nobody waits for it
            sorted = false;
            ++blocks_done;
            throw;
          }
          ++blocks_done;
        }
        while (blocks_done < blocks) std::this_thread::yield();
        if (!sorted) return;
        const Workspace work = workspace(together * (sums_size + rows_size));
        for (int64_t i = next_task++; i < tasks; i = next_task++) multiply(i, work.get());
      });
  return sorted;
}

}  // namespace memtl
