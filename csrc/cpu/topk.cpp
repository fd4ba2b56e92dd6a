#include "topk.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace memtl {
namespace {

constexpr uint32_t kLargestKey = 0x7fffffff;

constexpr int64_t kDenseTokens = 512;  // decoded at a time where a dense product is faster
constexpr int64_t kPanel = 1536;       // features whose sums of one tile still fit in L2

// Calls run(i) for every i in [0, tasks), in parallel; who is free takes the next.
template <class Run>
void for_tasks(int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

DType value_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Char:
      return DType::i8;
    default:
      STD_TORCH_CHECK(false, op, ": expected values in float32, bfloat16, float16 or int8, got ",
                      torch::headeronly::toString(dtype));
  }
  return DType::f32;
}

// --------------------------------------------------------------------------------------- packing

struct Packing {
  Tensor values, positions, scale;
  TopkOutput out;
};

Packing allocate(const Tensor& x, int64_t kept, ScalarType value_dtype, DType value, bool bitmap) {
  const int64_t rows = x.size(0), n = x.size(1);
  const int64_t values_size[] = {rows, kept};
  const int64_t positions_size[] = {rows, bitmap ? ceil_div(n, 8) : kept};
  const int64_t scale_size[] = {rows, ceil_div(n, kBlock)};
  const int64_t empty[] = {0};
  using Size = torch::headeronly::IntHeaderOnlyArrayRef;
  const Size scale_shape = value == DType::i8 ? Size(scale_size, 2) : Size(empty, 1);
  Packing packing;
  packing.values = torch::stable::new_empty(x, values_size, value_dtype);
  packing.positions = torch::stable::new_empty(x, positions_size, ScalarType::Byte);
  packing.scale = torch::stable::new_empty(x, scale_shape, ScalarType::BFloat16);
  packing.out = {value,
                 packing.values.data_ptr(),
                 data<uint8_t>(packing.positions),
                 value == DType::i8 ? data<uint16_t>(packing.scale) : nullptr,
                 nullptr,
                 kept,
                 bitmap};
  return packing;
}

std::tuple<Tensor, Tensor, Tensor> topk_pack_cpu(const Tensor& x, int64_t k, int64_t k_tail,
                                                 ScalarType value_dtype, bool bitmap) {
  STD_TORCH_CHECK(x.dim() == 2, "topk_pack: expected x [R, n], got ", describe(x));
  const DType dtype = floating("topk_pack", "x", x.scalar_type());
  const DType value = value_type("topk_pack", value_dtype);
  const int64_t rows = x.size(0), n = x.size(1), tail = n % kBlock;
  STD_TORCH_CHECK(k >= 0 && k <= kBlock, "topk_pack: expected k in [0, 256], got ", k);
  STD_TORCH_CHECK(tail == 0 || (k_tail >= 0 && k_tail <= tail), "topk_pack: x ", describe(x),
                  " has a last block of ", tail, " elements: expected k_tail in [0, ", tail,
                  "], got ", k_tail);
  const Tensor dense = torch::stable::contiguous(x);
  Packing packing =
      allocate(dense, n / kBlock * k + (tail ? k_tail : 0), value_dtype, value, bitmap);
  const void* in = dense.data_ptr();
  const TopkKernels& kernels = topk_kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    kernels.pack(dtype, in, n, k, k_tail, packing.out, first, last);
  });
  return {packing.values, packing.positions, packing.scale};
}

// One row of x for topk_pack_sample. It is cut into chunks of whole blocks; run(chunks, f) calls
// f(i) for each of them, in parallel where there are several.
template <class Run>
class SampleRow {
 public:
  SampleRow(const TopkKernels& kernels, DType dtype, const void* x, int64_t n, int64_t row,
            int64_t k, int64_t chunks, const Run& run)
      : kernels_(kernels),
        dtype_(dtype),
        x_(x),
        n_(n),
        row_(row),
        k_(k),
        blocks_(ceil_div(ceil_div(n, kBlock), chunks)),
        chunks_(ceil_div(ceil_div(n, kBlock), blocks_)),
        room_(n / 8 / chunks_ + 1024),
        keys_(std::make_unique_for_overwrite<uint32_t[]>(
            static_cast<size_t>((room_ + 16) * chunks_))),
        above_(static_cast<size_t>(chunks_)),
        inside_(static_cast<size_t>(chunks_)),
        run_(run) {}

  void pack(const TopkOutput& out) {
    find_threshold();
    if (chunks_ > 1) count_all(threshold_, threshold_);
    std::vector<int64_t> start(static_cast<size_t>(chunks_)), ties(start);
    int64_t left = k_ - above_threshold_, place = 0;
    for (size_t i = 0; i < start.size(); ++i) {
      start[i] = place;
      ties[i] = chunks_ > 1 ? std::min(left, inside_[i]) : left;
      place += above_[i] + ties[i];
      left -= ties[i];
    }
    run_(chunks_, [&](int64_t i) {
      const int64_t first = i * blocks_, last = std::min(first + blocks_, ceil_div(n_, kBlock));
      kernels_.pack_above(dtype_, x_, n_, row_, first, last, threshold_,
                          ties[static_cast<size_t>(i)], start[static_cast<size_t>(i)], out);
    });
  }

 private:
  static constexpr int64_t kSearchAll = 4096;  // up to here the whole row is the sample

  const void* at(int64_t i) const {
    return static_cast<const char*>(x_) + (row_ * n_ + i) * size_of(dtype_);
  }

  // The keys above hi and in [lo, hi]; true where those inside are all in keys_.
  bool count_all(uint32_t lo, uint32_t hi) {
    run_(chunks_, [&](int64_t i) {
      const int64_t first = i * blocks_ * kBlock;
      kernels_.count(dtype_, at(first), std::min(blocks_ * kBlock, n_ - first), lo, hi,
                     &above_[static_cast<size_t>(i)], &inside_[static_cast<size_t>(i)],
                     keys_.get() + i * (room_ + 16), room_);
    });
    above_all_ = inside_all_ = 0;
    bool stored = true;
    for (int64_t i = 0; i < chunks_; ++i) {
      const int64_t inside = inside_[static_cast<size_t>(i)];
      above_all_ += above_[static_cast<size_t>(i)];
      stored = stored && inside <= room_;
      if (stored) {
        const uint32_t* from = keys_.get() + i * (room_ + 16);
        std::copy(from, from + inside, keys_.get() + inside_all_);
      }
      inside_all_ += inside;
    }
    return stored;
  }

  // A bracket of the threshold from a sample of the row's keys.
  void sample_bracket(uint32_t* lo, uint32_t* hi) const {
    const int64_t groups = std::clamp<int64_t>(n_ / 1024, 128, 4096), size = groups * 16;
    const auto sample = std::make_unique_for_overwrite<uint32_t[]>(static_cast<size_t>(size));
    for (int64_t i = 0; i < groups; ++i) {
      kernels_.keys(dtype_, at((n_ - 16) * i / (groups - 1)), 16, sample.get() + i * 16);
    }
    const double share = static_cast<double>(k_) / static_cast<double>(n_);
    const double deviation = std::sqrt(static_cast<double>(size) * share * (1 - share));
    const auto rank = static_cast<int64_t>(share * static_cast<double>(size));
    const auto margin = static_cast<int64_t>(4 * deviation) + 8;
    int64_t above;
    if (rank > margin) {
      *hi = kernels_.threshold(sample.get(), size, rank - margin, 0, kLargestKey, &above);
    }
    if (rank + margin < size) {
      *lo = kernels_.threshold(sample.get(), size, rank + margin, 0, kLargestKey, &above);
    }
  }

  // Fewer than k keys are above threshold_, or just k; with those equal to it there are k or more.
  void find_threshold() {
    threshold_ = kLargestKey;
    above_threshold_ = 0;
    if (k_ == 0) return;
    if (n_ <= kSearchAll) {
      const auto keys = std::make_unique_for_overwrite<uint32_t[]>(static_cast<size_t>(n_));
      kernels_.keys(dtype_, at(0), n_, keys.get());
      threshold_ = kernels_.threshold(keys.get(), n_, k_, 0, kLargestKey, &above_threshold_);
      return;
    }
    uint32_t lowest = 0, highest = kLargestKey;  // the threshold is known to be in here
    uint32_t lo = lowest, hi = highest;
    sample_bracket(&lo, &hi);
    for (bool narrowed = false;;) {
      const bool stored = count_all(lo, hi);
      if (above_all_ >= k_) {
        lowest = lo = hi + 1;
        hi = highest;
        continue;
      }
      if (above_all_ + inside_all_ < k_) {
        highest = hi = lo - 1;
        lo = lowest;
        continue;
      }
      if (lo == hi || stored) {
        int64_t more = 0;
        threshold_ = lo;
        if (lo < hi) {
          threshold_ = kernels_.threshold(keys_.get(), inside_all_, k_ - above_all_, lo, hi, &more);
        }
        above_threshold_ = above_all_ + more;
        return;
      }
      // Too many to be stored. Mostly because of many equal ones at the low end, zeros say.
      lowest = lo;
      highest = hi;
      lo = narrowed ? lo + (hi - lo + 1) / 2 : lo + 1;
      narrowed = true;
    }
  }

  const TopkKernels& kernels_;
  DType dtype_;
  const void* x_;
  int64_t n_, row_, k_, blocks_, chunks_, room_;
  std::unique_ptr<uint32_t[]> keys_;
  std::vector<int64_t> above_, inside_;  // of every chunk
  int64_t above_all_ = 0, inside_all_ = 0;
  uint32_t threshold_ = kLargestKey;
  int64_t above_threshold_ = 0;
  const Run& run_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_pack_sample_cpu(const Tensor& x, int64_t k,
                                                                ScalarType value_dtype,
                                                                bool bitmap) {
  STD_TORCH_CHECK(x.dim() == 2, "topk_pack_sample: expected x [R, n], got ", describe(x));
  const DType dtype = floating("topk_pack_sample", "x", x.scalar_type());
  const DType value = value_type("topk_pack_sample", value_dtype);
  const int64_t rows = x.size(0), n = x.size(1);
  STD_TORCH_CHECK(k >= 0 && k <= n, "topk_pack_sample: expected k in [0, ", n, "] for x ",
                  describe(x), ", got ", k);
  const Tensor dense = torch::stable::contiguous(x);
  Packing packing = allocate(dense, k, value_dtype, value, bitmap);
  const int64_t counts_size[] = {rows, ceil_div(n, kBlock)};
  Tensor counts = torch::stable::new_empty(dense, counts_size, ScalarType::Short);
  packing.out.counts = data<int16_t>(counts);
  if (rows > 0 && n > 0) {
    const void* in = dense.data_ptr();
    const TopkKernels& kernels = topk_kernels();
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t chunks = std::min(threads, n / (8 * kGrain));
    if (rows < threads && chunks > 1) {
      const auto parallel = [](int64_t count, const auto& f) { for_tasks(count, f); };
      for (int64_t row = 0; row < rows; ++row) {
        SampleRow(kernels, dtype, in, n, row, k, chunks, parallel).pack(packing.out);
      }
    } else {
      const auto serial = [](int64_t count, const auto& f) {
        for (int64_t i = 0; i < count; ++i) f(i);
      };
      const int64_t together = ceil_div(kGrain, n);  // rows worth a task
      for_tasks(ceil_div(rows, together), [&](int64_t i) {
        const int64_t last = std::min(rows, (i + 1) * together);
        for (int64_t row = i * together; row < last; ++row) {
          SampleRow(kernels, dtype, in, n, row, k, 1, serial).pack(packing.out);
        }
      });
    }
  }
  return {packing.values, packing.positions, packing.scale, counts};
}

// --------------------------------------------------------------------------------------- reading

// Packed rows whose shapes, counts and bits have been checked, so that no position leads outside.
// That the positions of a block ascend is checked where they are read.
class Reading {
 public:
  TopkPacked packed;

  Reading(const char* op, const Tensor& values, const Tensor& positions, const Tensor& scale,
          const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap)
      : op_(op),
        values_(torch::stable::contiguous(values)),
        positions_(torch::stable::contiguous(positions)),
        scale_(torch::stable::contiguous(scale)),
        counts_(torch::stable::contiguous(counts)) {
    STD_TORCH_CHECK(values.is_cpu() && positions.is_cpu() && scale.is_cpu() && counts.is_cpu(), op,
                    ": expected values, positions, scale and counts on the CPU");
    STD_TORCH_CHECK(values.dim() == 2, op, ": expected values [R, K], got ", describe(values));
    STD_TORCH_CHECK(n >= 0, op, ": expected n of 0 or more, got ", n);
    const DType value = value_type(op, values.scalar_type());
    const int64_t rows = values.size(0), kept = values.size(1);
    const int64_t blocks = ceil_div(n, kBlock), bytes = bitmap ? ceil_div(n, 8) : kept;
    check(positions, "positions", ScalarType::Byte, rows, bytes, n);
    if (value == DType::i8) check(scale, "scale", ScalarType::BFloat16, rows, blocks, n);
    packed = {value,
              values_.data_ptr(),
              data<uint8_t>(positions_),
              value == DType::i8 ? data<uint16_t>(scale_) : nullptr,
              nullptr,
              rows,
              n,
              kept,
              k,
              bitmap};
    if (rows == 0) return;
    if (counts.numel() > 0) {
      check(counts, "counts", ScalarType::Short, rows, blocks, n);
      starts_of_counts();
    } else if (!bitmap) {
      const int64_t tail = n % kBlock, wanted = n / kBlock * k + (tail ? k_tail : 0);
      STD_TORCH_CHECK(k >= 0 && k <= kBlock && (tail == 0 || (k_tail >= 0 && k_tail <= tail)), op,
                      ": expected k in [0, 256] and k_tail in [0, ", tail, "] for n = ", n,
                      ", got ", k, " and ", k_tail);
      STD_TORCH_CHECK(kept == wanted, op, ": expected values [", rows, ", ", wanted,
                      "] for n = ", n, ", k = ", k, ", k_tail = ", k_tail, ", got ",
                      describe(values));
    }
    if (bitmap) {
      starts_of_bits();
    } else {
      check_tails();
    }
  }

  // The place of the first entry of a block; `block` may be one past the last.
  int64_t place(int64_t row, int64_t block) const {
    const int64_t blocks = ceil_div(packed.n, kBlock);
    const int64_t start = packed.starts    ? packed.starts[row * (blocks + 1) + block]
                          : block < blocks ? block * packed.k
                                           : packed.kept;
    return row * packed.kept + start;
  }

 private:
  void check(const Tensor& x, const char* name, ScalarType dtype, int64_t rows, int64_t columns,
             int64_t n) const {
    STD_TORCH_CHECK(
        x.scalar_type() == dtype && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, op_,
        ": expected ", name, " ", torch::headeronly::toString(dtype), " [", rows, ", ", columns,
        "] beside values ", describe(values_), " for n = ", n, ", got ", describe(x));
  }

  void starts_of_counts() {
    const int64_t blocks = ceil_div(packed.n, kBlock);
    const auto* count = data<int16_t>(counts_);
    starts_.resize(static_cast<size_t>(packed.rows * (blocks + 1)));
    for (int64_t row = 0; row < packed.rows; ++row) {
      int64_t* start = starts_.data() + row * (blocks + 1);
      start[0] = 0;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t here = *count++, size = std::min<int64_t>(kBlock, packed.n - i * kBlock);
        STD_TORCH_CHECK(here >= 0 && here <= size, op_, ": expected counts[", row, ", ", i,
                        "] in [0, ", size, "], got ", here);
        start[i + 1] = start[i] + here;
      }
      STD_TORCH_CHECK(start[blocks] == packed.kept, op_, ": expected counts[", row,
                      "] to sum to the ", packed.kept, " kept values, got ", start[blocks]);
    }
    packed.starts = starts_.data();
  }

  void starts_of_bits() {
    const int64_t blocks = ceil_div(packed.n, kBlock), size = blocks + 1;
    std::vector<int64_t> starts(static_cast<size_t>(packed.rows * size));
    const TopkKernels& kernels = topk_kernels();
    std::atomic<int64_t> wrong{-1};
    const int64_t grain = std::max<int64_t>(1, 64 * kGrain / std::max<int64_t>(1, packed.n));
    torch::stable::parallel_for(0, packed.rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        int64_t* start = starts.data() + row * size;
        const uint8_t* bits = packed.positions + row * ceil_div(packed.n, 8);
        if (!kernels.starts(bits, packed.n, start) || start[blocks] != packed.kept) wrong = row;
      }
    });
    STD_TORCH_CHECK(wrong < 0, op_, ": expected ", packed.kept,
                    " bits in every row of positions, one a kept value and none beyond n = ",
                    packed.n, "; row ", wrong.load(), " is different");
    STD_TORCH_CHECK(starts_.empty() || starts_ == starts, op_,
                    ": expected counts to be those of the bits in positions");
    starts_ = std::move(starts);
    packed.starts = starts_.data();
  }

  // The largest position of a short last block; those of a full one are below 256 by their type.
  void check_tails() const {
    const int64_t tail = packed.n % kBlock, block = packed.n / kBlock;
    if (tail == 0) return;
    for (int64_t row = 0; row < packed.rows; ++row) {
      for (int64_t i = place(row, block); i < place(row, block + 1); ++i) {
        STD_TORCH_CHECK(packed.positions[i] < tail, op_, ": expected positions below ", tail,
                        " in the last block of n = ", packed.n, ", got ",
                        static_cast<int>(packed.positions[i]), " in row ", row);
      }
    }
  }

  const char* op_;
  Tensor values_, positions_, scale_, counts_;
  std::vector<int64_t> starts_;
};

void check_ascending(const char* op, bool ascending) {
  STD_TORCH_CHECK(ascending, op, ": expected the positions of every block to ascend");
}

Tensor topk_unpack_cpu(const Tensor& values, const Tensor& positions, const Tensor& scale,
                       const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap,
                       ScalarType dtype) {
  const DType wanted = floating("topk_unpack", "the result", dtype);
  const Reading reading("topk_unpack", values, positions, scale, counts, n, k, k_tail, bitmap);
  const int64_t size[] = {values.size(0), n};
  Tensor result = torch::stable::new_empty(values, size, dtype);
  auto* out = data<char>(result);
  const TopkKernels& kernels = topk_kernels();
  std::atomic<bool> ascending{true};
  torch::stable::parallel_for(0, size[0] * n, kGrain, [&](int64_t first, int64_t last) {
    if (!kernels.unpack(reading.packed, first, last, wanted, out + first * size_of(wanted))) {
      ascending = false;
    }
  });
  check_ascending("topk_unpack", ascending);
  return result;
}

// ------------------------------------------------------------------------------- weight gradient

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
  const TopkKernels& kernels = topk_kernels();
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
  check_ascending("topk_weight_grad", ascending);
}

// Decodes some tokens at a time and leaves the product to torch.
void dense_weight_grad(const Reading& reading, Tensor grad_out, int64_t features,
                       const Tensor& out) {
  const int64_t tokens = grad_out.size(0);
  const int64_t chunk = ceil_div(tokens, ceil_div(tokens, kDenseTokens));
  const int64_t size[] = {chunk, features};
  Tensor decoded = torch::stable::new_empty(out, size);
  auto* x = data<float>(decoded);
  const TopkKernels& kernels = topk_kernels();
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t count = std::min(chunk, tokens - token);
    std::atomic<bool> ascending{true};
    torch::stable::parallel_for(0, count * features, kGrain, [&](int64_t first, int64_t last) {
      const int64_t begin = token * features;
      if (!kernels.unpack(reading.packed, begin + first, begin + last, DType::f32, x + first)) {
        ascending = false;
      }
    });
    check_ascending("topk_weight_grad", ascending);
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
  if (static_cast<double>(packed.kept) > topk_kernels().dense_from * static_cast<double>(n)) {
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
  m.impl("topk_pack", TORCH_BOX(&memtl::topk_pack_cpu));
  m.impl("topk_pack_sample", TORCH_BOX(&memtl::topk_pack_sample_cpu));
  m.impl("topk_unpack", TORCH_BOX(&memtl::topk_unpack_cpu));
  m.impl("topk_weight_grad", TORCH_BOX(&memtl::topk_weight_grad_cpu));
}
