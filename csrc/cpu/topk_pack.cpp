#include "topk_pack.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "topk_tensors.h"

namespace memtl {
namespace {

constexpr uint32_t kLargestKey = 0x7fffffff;

std::tuple<Tensor, Tensor, Tensor> topk_pack_cpu(const Tensor& x, int64_t k, int64_t k_tail,
                                                 ScalarType value_dtype, bool bitmap) {
  const DType dtype = check_rows("topk_pack", x);
  const DType value = value_type("topk_pack", value_dtype);
  check_quota(x, k, k_tail);
  const int64_t rows = x.size(0), n = x.size(1);
  const Tensor dense = torch::stable::contiguous(x);
  Packing packing = allocate_packing(dense, kept_of(n, k, k_tail), value_dtype, value, bitmap);
  const void* in = dense.data_ptr();
  const TopkPackKernels& kernels = topk_pack_kernels();
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
  SampleRow(const TopkPackKernels& kernels, DType dtype, const void* x, int64_t n, int64_t row,
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

  const TopkPackKernels& kernels_;
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
  const DType dtype = check_rows("topk_pack_sample", x);
  const DType value = value_type("topk_pack_sample", value_dtype);
  const int64_t rows = x.size(0), n = x.size(1);
  check_sample_quota(x, k);
  const Tensor dense = torch::stable::contiguous(x);
  Packing packing = allocate_packing(dense, k, value_dtype, value, bitmap);
  const int64_t counts_size[] = {rows, ceil_div(n, kBlock)};
  Tensor counts = torch::stable::new_empty(dense, counts_size, ScalarType::Short);
  packing.out.counts = data<int16_t>(counts);
  if (rows > 0 && n > 0) {
    const void* in = dense.data_ptr();
    const TopkPackKernels& kernels = topk_pack_kernels();
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

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("topk_pack", TORCH_BOX(&memtl::topk_pack_cpu));
  m.impl("topk_pack_sample", TORCH_BOX(&memtl::topk_pack_sample_cpu));
}
