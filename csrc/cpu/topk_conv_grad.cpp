#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "topk_columns.h"
#include "topk_grad.h"
#include "topk_reading.h"

namespace memtl {
namespace {

constexpr const char* kOp = "topk_conv_weight_grad";

constexpr int64_t kChunkTokens = 1024;  // of the images whose entries are sorted together
constexpr int64_t kBandBlocks = 4;      // of tokens, whose rows of one tile stay in L2
constexpr int64_t kSums = 4096;         // channels times offsets whose sums of one tile fit in L2
constexpr int64_t kTasks = 8;           // with fewer tiles the batch is cut as well

using Triple = std::array<int64_t, 3>;

Triple last_of(const std::vector<int64_t>& sizes, int64_t fill) {
  Triple triple = {fill, fill, fill};
  std::copy(sizes.begin(), sizes.end(), triple.end() - static_cast<int64_t>(sizes.size()));
  return triple;
}

int64_t product(const Triple& a) { return a[0] * a[1] * a[2]; }

int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

// A convolution as products of rows that are shifted, with fewer than three dimensions in the last
// ones. A pixel belongs to a phase, its place modulo the stride. The pixels of a phase, numbered in
// a grid that has room for zeros around the outputs, meet the outputs, in a grid of the same
// pitches, at a distance that depends on the offset in the kernel alone.
struct ConvPlan {
  struct Offset {
    int64_t phase, shift;
  };
  Triple input, output, grid;
  int64_t places;               // of an image's grid
  std::vector<Offset> offsets;  // of the kernel; phase -1: meets no pixel
  int64_t phases = 0;           // that an offset has
  int64_t least = 0, most = 0;  // shifts

  ConvPlan(const Triple& input, const Triple& output, const Triple& kernel, const Triple& stride,
           const Triple& padding, const Triple& dilation)
      : input(input), output(output), stride_(stride) {
    std::array<std::vector<Offset>, 3> along;  // each dimension
    for (size_t d = 0; d < 3; ++d) {
      const int64_t longest = ceil_div(input[d], stride[d]);
      grid[d] = std::max(output[d], longest);
      for (int64_t k = 0; k < kernel[d]; ++k) {
        const int64_t from = k * dilation[d] - padding[d], phase = floor_mod(from, stride[d]);
        const int64_t shift = (phase - from) / stride[d];
        along[d].push_back({phase < input[d] ? phase : -1, shift});
        if (phase >= input[d]) continue;
        grid[d] = std::max({grid[d], output[d] - shift, longest + shift});
      }
    }
    places = product(grid);
    numbers_.assign(static_cast<size_t>(product(stride)), -1);
    for (const Offset& a : along[0]) {
      for (const Offset& b : along[1]) {
        for (const Offset& c : along[2]) {
          if (a.phase < 0 || b.phase < 0 || c.phase < 0) {
            offsets.push_back({-1, 0});
            continue;
          }
          int64_t& number =
              numbers_[static_cast<size_t>((a.phase * stride[1] + b.phase) * stride[2] + c.phase)];
          if (number < 0) number = phases++;
          offsets.push_back({number, (a.shift * grid[1] + b.shift) * grid[2] + c.shift});
          least = std::min(least, offsets.back().shift);
          most = std::max(most, offsets.back().shift);
        }
      }
    }
  }

  // What pixels are called in TopkImages, with so many tokens a phase.
  std::vector<int32_t> tokens(int64_t phase_tokens) const {
    std::vector<int32_t> tokens;
    tokens.reserve(static_cast<size_t>(product(input)));
    for (int64_t z = 0; z < input[0]; ++z) {
      for (int64_t y = 0; y < input[1]; ++y) {
        const int64_t phase = z % stride_[0] * stride_[1] + y % stride_[1];
        const int64_t place = z / stride_[0] * grid[1] + y / stride_[1];
        for (int64_t x = 0; x < input[2]; ++x) {
          const int64_t along = x / stride_[2];
          const int64_t number = numbers_[static_cast<size_t>((phase - along) * stride_[2] + x)];
          const int64_t token = number * phase_tokens + place * grid[2] + along;
          tokens.push_back(number < 0 ? -1 : static_cast<int32_t>(token));
        }
      }
    }
    return tokens;
  }

 private:
  Triple stride_;
  std::vector<int64_t> numbers_;  // of phases; -1: no offset has it
};

// grad_out, dense in one of two orders.
struct ConvGrad {
  DType dtype;
  const void* from;
  int64_t images, outputs, image_stride, pixel_stride, output_stride;
};

// Places [begin, end) of the grid of outputs of some images, from `first_image` on, zeros between
// them, to rows.
void fill_grid(const ConvPlan& plan, const ConvGrad& grad, int64_t first_image, int64_t images,
               int64_t first_output, int64_t outputs, int64_t begin, int64_t end, float* rows) {
  const TopkGradKernels& kernels = topk_grad_kernels();
  const int64_t row = ceil_div(outputs, kernels.lanes) * kernels.lanes;
  Triple size = plan.output, grid = plan.grid;
  for (int i = 0; i < 2 && size[2] == grid[2]; ++i) {  // lines without zeros between them
    size = {1, size[0], size[1] * size[2]};
    grid = {1, grid[0], grid[1] * grid[2]};
  }
  int64_t at = begin;
  const auto zeros = [&](int64_t until) {
    std::fill_n(rows + (at - begin) * row, (until - at) * row, 0.0f);
    at = until;
  };
  const int64_t lines = images * grid[0] * grid[1];
  for (int64_t line = std::max<int64_t>(begin, 0) / grid[2]; line < lines; ++line) {
    const int64_t y = line % grid[1], z = line / grid[1] % grid[0];
    const int64_t image = line / grid[1] / grid[0];
    const int64_t start = line * grid[2];
    if (start >= end) break;
    if (y >= size[1] || z >= size[0]) continue;
    const int64_t first = std::max(begin, start), last = std::min(end, start + size[2]);
    if (first >= last) continue;
    zeros(first);
    const int64_t pixel = (z * size[1] + y) * size[2] + first - start;
    kernels.fill(grad.dtype, grad.from,
                 (first_image + image) * grad.image_stride + pixel * grad.pixel_stride +
                     first_output * grad.output_stride,
                 grad.pixel_stride, grad.output_stride, last - first, outputs,
                 rows + (first - begin) * row, 0);
    at = last;
  }
  zeros(end);
}

void conv_weight_grad(const Reading& reading, const ConvPlan& plan, const ConvGrad& grad,
                      int64_t channels, bool channels_last, float* out) {
  const TopkPacked& packed = reading.packed;
  const TopkGradKernels& kernels = topk_grad_kernels();
  const int64_t sets = static_cast<int64_t>(plan.offsets.size()), outputs = grad.outputs;
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? 2 * threads : 1;

  // Chunks of images: their entries are sorted by block of tokens and channel, once.
  const int64_t each = std::min(ceil_div(kChunkTokens, plan.places), ceil_div(grad.images, 4));
  const int64_t chunks = ceil_div(grad.images, each);
  const int64_t phase_blocks = ceil_div(each * plan.places, kTopkTokens);
  const int64_t blocks = plan.phases * phase_blocks;
  STD_TORCH_CHECK(blocks * kTopkTokens < int64_t{1} << 31, kOp, ": images too large");
  const std::vector<int32_t> tokens = plan.tokens(phase_blocks * kTopkTokens);
  const TopkImages images = {channels,      product(plan.input), channels_last,
                             tokens.data(), plan.places,         blocks};

  // Tasks: a tile of the outputs, a panel of the channels, a segment of the chunks. How sums are
  // cut into segments does not depend on the number of threads.
  const int64_t tiles = ceil_div(outputs, kernels.tile);
  const int64_t segments = std::min(chunks, ceil_div(kTasks, tiles));
  int64_t panels = std::max(ceil_div(channels * sets, kSums), ceil_div(wanted, tiles * segments));
  const int64_t width = std::max<int64_t>(64, ceil_div(ceil_div(channels, panels), 16) * 16);
  panels = ceil_div(channels, width);

  std::vector<ColumnMemory> memory(static_cast<size_t>(chunks));
  std::vector<TopkColumns> columns(static_cast<size_t>(chunks * blocks * panels));
  std::atomic<bool> ascending{true};
  const auto transpose = [&](int64_t chunk, uint32_t* cursors) {
    const int64_t first = chunk * each, last = std::min(grad.images, first + each);
    const TopkStorage storage = memory[static_cast<size_t>(chunk)].storage(
        (last - first) * packed.kept, channels, panels, blocks);
    if (!kernels.transpose_images(packed, images, first, last, width, storage,
                                  columns.data() + chunk * blocks * panels, cursors)) {
      ascending = false;
    }
  };

  // Bands of tokens: their rows, and those that the offsets lead to, are made once.
  const int64_t reach = plan.most - plan.least;
  const int64_t band = std::max(kBandBlocks, ceil_div(reach, kTopkTokens));
  const int64_t set_size = (width + 1) * kernels.tile, sums_size = sets * set_size;
  const int64_t rows_size = (band * kTopkTokens + reach) * kernels.tile;
  const auto multiply = [&](int64_t tile, int64_t panel, int64_t segment, float* rows,
                            float* sums) {
    const int64_t first_output = tile * kernels.tile;
    const int64_t count = std::min(outputs - first_output, kernels.tile);
    const int64_t vectors = ceil_div(count, kernels.lanes), row = vectors * kernels.lanes;
    std::fill_n(sums, sums_size, 0.0f);
    for (int64_t chunk = chunks * segment / segments; chunk < chunks * (segment + 1) / segments;
         ++chunk) {
      const int64_t image = chunk * each, some = std::min(each, grad.images - image);
      const int64_t used = ceil_div(some * plan.places, kTopkTokens);
      for (int64_t block = 0; block < used; block += band) {
        const int64_t end = std::min(used, block + band);
        const int64_t begin = block * kTopkTokens + plan.least;
        fill_grid(plan, grad, image, some, first_output, count, begin,
                  end * kTopkTokens + plan.most, rows);
        for (int64_t set = 0; set < sets; ++set) {
          const auto& [phase, shift] = plan.offsets[static_cast<size_t>(set)];
          if (phase < 0) continue;
          for (int64_t i = block; i < end; ++i) {
            const int64_t at = (chunk * blocks + phase * phase_blocks + i) * panels + panel;
            kernels.accumulate(columns[static_cast<size_t>(at)], vectors,
                               rows + (i * kTopkTokens + shift - begin) * row,
                               sums + set * set_size);
          }
        }
      }
    }
  };
  const auto write = [&](int64_t tile, int64_t panel, const float* sums) {
    const int64_t first_output = tile * kernels.tile, first_channel = panel * width;
    kernels.write(sums, set_size, sets, std::min(width, channels - first_channel),
                  std::min(outputs - first_output, kernels.tile),
                  out + (first_output * channels + first_channel) * sets, channels * sets);
  };

  // One parallel region, as for linear layers.
  const int64_t parts = tiles * panels, tasks = parts * segments;
  std::vector<Workspace> sums(static_cast<size_t>(tasks));
  std::vector<std::atomic<int64_t>> done(static_cast<size_t>(parts));
  std::atomic<int64_t> next_chunk{0}, next_task{0}, chunks_done{0};
  torch::stable::parallel_for(
      0, std::min(threads, std::max(chunks, tasks)), 1, [&](int64_t, int64_t) {
        const auto cursors =
            std::make_unique_for_overwrite<uint32_t[]>(static_cast<size_t>(blocks * channels));
        for (int64_t i = next_chunk++; i < chunks; i = next_chunk++) {
          try {
            transpose(i, cursors.get());
          } catch (...) {  // nobody waits for it
            ascending = false;
            ++chunks_done;
            throw;
          }
          ++chunks_done;
        }
        while (chunks_done < chunks) std::this_thread::yield();
        if (!ascending) return;
        const Workspace rows = workspace(rows_size);
        Workspace own;
        for (int64_t i = next_task++; i < tasks; i = next_task++) {
          const int64_t part = i / segments, segment = i % segments;
          Workspace& mine = segments > 1 ? sums[static_cast<size_t>(i)] : own;
          if (!mine) mine = workspace(sums_size);
          multiply(part / panels, part % panels, segment, rows.get(), mine.get());
          if (++done[static_cast<size_t>(part)] < segments) continue;
          // Whoever comes last adds the segments up, always in the same order.
          float* total =
              segments > 1 ? sums[static_cast<size_t>(part * segments)].get() : own.get();
          for (int64_t s = 1; s < segments; ++s) {
            const float* more = sums[static_cast<size_t>(part * segments + s)].get();
            for (int64_t j = 0; j < sums_size; ++j) total[j] += more[j];
          }
          write(part / panels, part % panels, total);
        }
      });
  reading.check_ascending(ascending);
}

Tensor topk_conv_weight_grad_cpu(const Tensor& values, const Tensor& positions, const Tensor& scale,
                                 const Tensor& counts, const Tensor& grad_out,
                                 std::vector<int64_t> input_size, std::vector<int64_t> kernel_size,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, bool channels_last, int64_t k,
                                 int64_t k_tail, bool bitmap) {
  const size_t dims = kernel_size.size();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && input_size.size() == dims + 1 &&
                      stride.size() == dims && padding.size() == dims && dilation.size() == dims,
                  kOp,
                  ": expected input_size (C, ...) and, for each of 1 to 3 spatial dimensions, "
                  "one kernel_size, stride, padding and dilation");
  STD_TORCH_CHECK(grad_out.is_cpu(), kOp, ": expected grad_out on the CPU");
  const DType dtype = floating(kOp, "grad_out", grad_out.scalar_type());
  std::vector<int64_t> spatial, wanted;
  int64_t n = input_size[0];
  for (size_t d = 0; d < dims; ++d) {
    const int64_t size = input_size[d + 1];
    STD_TORCH_CHECK(kernel_size[d] >= 1 && stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1,
                    kOp,
                    ": expected kernel_size, stride and dilation of 1 or more and padding of "
                    "0 or more");
    const int64_t room = size + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1;
    STD_TORCH_CHECK(size >= 0 && room >= 0, kOp, ": a dimension of ", size, " with padding ",
                    padding[d], " is less than the kernel's ", kernel_size[d], " at dilation ",
                    dilation[d]);
    spatial.push_back(size);
    wanted.push_back(room / stride[d] + 1);
    stride[d] = std::min(stride[d], room + 1);  // a single output: the same, with fewer phases
    n *= size;
  }
  const int64_t channels = input_size[0], batch = values.size(0);
  STD_TORCH_CHECK(channels >= 0 && n < (int64_t{1} << 31), kOp,
                  ": expected fewer than 2^31 elements a sample, got ", n);
  const Reading reading(kOp, values, positions, scale, counts, n, k, k_tail, bitmap);
  bool fits = static_cast<size_t>(grad_out.dim()) == dims + 2 && grad_out.size(0) == batch;
  for (size_t d = 0; fits && d < dims; ++d) {
    fits = grad_out.size(static_cast<int64_t>(d) + 2) == wanted[d];
  }
  std::string shape;
  for (const int64_t size : wanted) shape += ", " + std::to_string(size);
  STD_TORCH_CHECK(fits, kOp, ": expected grad_out [", batch, ", O", shape, "], got ",
                  describe(grad_out));

  const int64_t outputs = grad_out.size(1);
  std::vector<int64_t> size = {outputs, channels};
  size.insert(size.end(), kernel_size.begin(), kernel_size.end());
  Tensor out = torch::stable::new_empty(grad_out, size, ScalarType::Float);
  if (out.numel() == 0) return out;
  if (batch == 0 || n == 0) return torch::stable::zero_(out);
  const ConvPlan plan(last_of(spatial, 1), last_of(wanted, 1), last_of(kernel_size, 1),
                      last_of(stride, 1), last_of(padding, 0), last_of(dilation, 1));
  const int64_t pixels = product(plan.output);
  // The order of memory (B, ..., O), or else (B, O, ...).
  const Tensor flat = torch::stable::flatten(grad_out, 2, -1);
  const bool outputs_last = torch::stable::transpose(flat, 1, 2).is_contiguous();
  const Tensor rows = outputs_last ? flat : torch::stable::contiguous(flat);
  const ConvGrad grad = {dtype,
                         rows.data_ptr(),
                         batch,
                         outputs,
                         outputs * pixels,
                         outputs_last ? outputs : 1,
                         outputs_last ? 1 : pixels};
  conv_weight_grad(reading, plan, grad, channels, channels_last, data<float>(out));
  return out;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("topk_conv_weight_grad", TORCH_BOX(&memtl::topk_conv_weight_grad_cpu));
}
