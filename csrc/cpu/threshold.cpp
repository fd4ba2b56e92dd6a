// The k-th largest magnitude is narrowed down by counting: a range of keys that is sure, or likely,
// to hold it is cut into buckets, and the bucket that holds it is the next range. A sample says
// where to start, so that one reading of the tensors can leave few enough candidates to be copied
// out; the rest of the search is among those.
#include "threshold.h"

#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bits.h"
#include "tensor.h"
#include "threshold_checks.h"

namespace memtl {
namespace {

constexpr int kBuckets = 4096;
constexpr int64_t kRoom = 512 << 10;    // bytes of candidates
constexpr int64_t kPart = 1 << 18;      // elements a thread takes at once
constexpr int64_t kBatch = 1024;        // elements searched for candidates at once
constexpr int64_t kRun = 256;           // the sample: so many elements together,
constexpr int64_t kWindow = 16 * kRun;  // out of so many
constexpr double kDeviations = 3.3;     // where one in a thousand samples misleads

struct Part {
  const void* x;
  const uint8_t* mask;
  int64_t first, last, tensor;
};

KeyRange range_of(uint64_t lo, uint64_t hi) {
  int shift = 0;
  while ((hi - lo) >> shift >= kBuckets) ++shift;
  return {lo, hi, shift};
}

struct Counts {
  int64_t above = 0;
  std::vector<int64_t> bucket = std::vector<int64_t>(kBuckets);

  int64_t total() const {
    int64_t sum = above;
    for (int64_t count : bucket) sum += count;
    return sum;
  }
};

class Search {
 public:
  Search(DType dtype, std::vector<Part> parts, int64_t total)
      : dtype_(dtype), whole_(std::move(parts)), parts_(whole_), total_(total) {}

  // The key of the k-th largest of `total`; ties[t]: how many of tensor t that have it are among
  // the k.
  uint64_t find(int64_t k, int64_t* ties, int64_t tensors) {
    const KeyRange all = range_of(0, infinite_key(dtype_) + 1);
    KeyRange range = all;
    int64_t inside = total_;  // as far as is known
    if (total_ > room()) inside = estimate(k, &range);
    bool copied = false;
    do {
      if (!copied && inside <= room()) {
        const std::optional<int64_t> above = collect(range);
        copied = above && *above < k && k <= *above + held_;
        if (copied) k -= *above;
        if (above && !copied) parts_ = whole_;
      }
      const Counts counts = count(range, false);
      int64_t above = counts.above;
      int bucket = kBuckets - 1;
      while (bucket >= 0 && above + counts.bucket[static_cast<size_t>(bucket)] < k) {
        above += counts.bucket[static_cast<size_t>(bucket--)];
      }
      if (above >= k || bucket < 0) {  // the sample misled
        range = all;
        inside = total_;
      } else {
        range = bucket_of(range, bucket, bucket);
        inside = counts.bucket[static_cast<size_t>(bucket)];
        left_ = k - above;
      }
    } while (range.lo < range.hi || left_ == 0);
    share(range, ties, tensors);
    return range.lo;
  }

 private:
  int64_t room() const { return kRoom / size_of(dtype_); }

  static KeyRange bucket_of(KeyRange range, int first, int last) {
    const uint64_t lo = range.lo + (static_cast<uint64_t>(first) << range.shift);
    const uint64_t hi = range.lo + (static_cast<uint64_t>(last + 1) << range.shift) - 1;
    return range_of(lo, std::min(hi, range.hi));
  }

  // Anywhere in the window: rows of a like length would show the same columns again and again.
  static int64_t run_in(int64_t window) {
    const auto scrambled = static_cast<uint64_t>(window / kWindow + 1) * 0x9e3779b97f4a7c15;
    return window + static_cast<int64_t>(scrambled >> 60) * kRun;
  }

  // Calls run(worker, part) for every part.
  template <class Run>
  void for_parts(const Run& run) {
    const auto tasks = static_cast<int64_t>(parts_.size());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers(), 1, [&](int64_t worker, int64_t) {
      for (int64_t i = next++; i < tasks; i = next++) run(worker, parts_[static_cast<size_t>(i)]);
    });
  }

  int64_t workers() const {
    const auto tasks = static_cast<int64_t>(parts_.size());
    return std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
  }

  Counts count(KeyRange range, bool sampled) {
    const auto threads = static_cast<size_t>(workers());
    std::vector<uint32_t> buckets(threads * kBuckets);
    Counts counts;
    std::mutex adding;
    for_parts([&](int64_t worker, const Part& part) {
      uint32_t* own = buckets.data() + worker * kBuckets;
      int64_t above = 0;
      const auto read = [&](int64_t first, int64_t last) {
        above += kernels_.count(dtype_, part.x, part.mask, first, last, range, own);
      };
      if (!sampled) read(part.first, part.last);
      for (int64_t i = part.first; sampled && i < part.last; i += kWindow) {
        const int64_t first = run_in(i), next = run_in(i + kWindow);
        const auto* ahead = static_cast<const uint8_t*>(part.x) + next * size_of(dtype_);
        const int64_t bytes = next + kRun <= part.last ? kRun * size_of(dtype_) : 0;
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
        if (first < part.last) read(first, std::min(first + kRun, part.last));
      }
      const std::lock_guard<std::mutex> lock(adding);
      counts.above += above;
      for (int i = 0; i < kBuckets; ++i) counts.bucket[static_cast<size_t>(i)] += own[i];
      std::fill_n(own, kBuckets, 0u);
    });
    return counts;
  }

  // A range that holds the k-th largest most likely; returns about how many others it holds.
  int64_t estimate(int64_t k, KeyRange* range) {
    Counts counts = count(*range, true);
    const auto sampled = static_cast<double>(counts.total());
    const double share = static_cast<double>(k) / static_cast<double>(total_);
    const double from = kDeviations * std::sqrt(sampled * share * (1 - share)) + 1;
    const double first = sampled * share - from, last = sampled * share + from;
    double inside = sampled;
    for (int level = 0; level < 5; ++level) {
      auto above = static_cast<double>(counts.above);
      int top = kBuckets - 1, bottom = 0;
      inside = 0;
      for (int i = kBuckets - 1; i >= 0 && above < last; --i) {
        const auto here = static_cast<double>(counts.bucket[static_cast<size_t>(i)]);
        above += here;
        if (above < first) {
          top = i - 1;
        } else {
          inside += here;
        }
        bottom = above < last ? 0 : i;
      }
      *range = bucket_of(*range, bottom, std::max(top, bottom));
      if (range->lo == range->hi || inside < 2.2 * from) break;
      counts = count(*range, true);
    }
    return static_cast<int64_t>(inside / std::max(sampled, 1.0) * static_cast<double>(total_));
  }

  // Copies what is in a range out of the tensors, where there is room: `parts_` are the copies
  // then. Returns how many are above the range.
  std::optional<int64_t> collect(KeyRange range) {
    const int64_t itemsize = size_of(dtype_);
    if (candidates_ == nullptr) candidates_.reset(new uint8_t[static_cast<size_t>(kRoom)]);
    std::vector<uint8_t> batches(static_cast<size_t>(workers() * 2 * kBatch * itemsize));
    std::vector<Part> copies;
    std::mutex adding;
    std::atomic<bool> full{false};
    int64_t all_above = 0;
    held_ = 0;
    for_parts([&](int64_t worker, const Part& part) {
      uint8_t* batch = batches.data() + worker * 2 * kBatch * itemsize;
      int64_t above = 0, count = 0;
      const auto flush = [&] {
        const std::lock_guard<std::mutex> lock(adding);
        full = full || held_ + count > room();
        if (full || count == 0) return;
        uint8_t* place = candidates_.get() + held_ * itemsize;
        std::memcpy(place, batch, static_cast<size_t>(count * itemsize));
        copies.push_back({place, nullptr, 0, count, part.tensor});
        held_ += count;
        count = 0;
      };
      for (int64_t i = part.first; i < part.last && !full; i += kBatch) {
        count += kernels_.collect(dtype_, part.x, part.mask, i, std::min(i + kBatch, part.last),
                                  range, batch + count * itemsize, &above);
        if (count > kBatch) flush();
      }
      flush();
      const std::lock_guard<std::mutex> lock(adding);
      all_above += above;
    });
    if (full) return std::nullopt;
    parts_ = std::move(copies);
    return all_above;
  }

  // `left_` of those that have the one key of a range are given to the tensors, in order.
  void share(KeyRange range, int64_t* ties, int64_t tensors) {
    std::vector<std::atomic<int64_t>> equal(static_cast<size_t>(tensors));
    for_parts([&](int64_t, const Part& part) {
      uint32_t found = 0;
      kernels_.count(dtype_, part.x, part.mask, part.first, part.last, range, &found);
      equal[static_cast<size_t>(part.tensor)] += found;
    });
    for (int64_t t = 0; t < tensors; ++t) {
      ties[t] = std::min<int64_t>(left_, equal[static_cast<size_t>(t)]);
      left_ -= ties[t];
    }
  }

  const ThresholdKernels& kernels_ = threshold_kernels();
  const DType dtype_;
  const std::vector<Part> whole_;
  std::vector<Part> parts_;  // what is searched: the tensors, or the candidates
  const int64_t total_;
  std::unique_ptr<uint8_t[]> candidates_;
  int64_t held_ = 0;  // candidates copied
  int64_t left_ = 0;  // of those in the last range, how many are among the k
};

uint64_t key_of(DType dtype, const Tensor& value) {
  uint64_t bits = 0;
  std::memcpy(&bits, value.const_data_ptr(), static_cast<size_t>(size_of(dtype)));
  bits &= (uint64_t{1} << (8 * size_of(dtype) - 1)) - 1;
  return std::min(bits, infinite_key(dtype) + 1);
}

Tensor value_of(DType dtype, uint64_t key, const Tensor& like) {
  // Half of the last mantissas: a quiet NaN.
  if (key > infinite_key(dtype)) key = infinite_key(dtype) | infinite_key(dtype) >> 1;
  Tensor value = torch::stable::new_empty(like, {});
  std::memcpy(value.mutable_data_ptr(), &key, static_cast<size_t>(size_of(dtype)));
  return value;
}

std::tuple<Tensor, Tensor> threshold_magnitude_cpu(const std::vector<Tensor>& xs,
                                                   const std::vector<Tensor>& masks, int64_t k) {
  constexpr const char* kOp = "threshold_magnitude";
  const DType dtype = check_lists(kOp, xs, masks);
  std::vector<Tensor> read;  // contiguous ones; they live as long as the search
  std::vector<Part> parts;
  int64_t total = 0;
  for (size_t t = 0; t < xs.size(); ++t) {
    const int64_t numel = xs[t].numel();
    read.push_back(torch::stable::contiguous(xs[t]));
    const void* x = read.back().const_data_ptr();
    const uint8_t* mask = nullptr;
    if (!masks.empty()) {
      read.push_back(torch::stable::contiguous(masks[t]));
      mask = static_cast<const uint8_t*>(read.back().const_data_ptr());
    }
    total += mask == nullptr ? numel : bits_kernels().count(mask, numel, 0, ceil_div(numel, 8));
    for (int64_t first = 0; first < numel; first += kPart) {
      parts.push_back({x, mask, first, std::min(first + kPart, numel), static_cast<int64_t>(t)});
    }
  }
  check_k(kOp, k, total);
  const auto tensors = static_cast<int64_t>(xs.size());
  Tensor ties = torch::stable::new_zeros(xs[0], {tensors}, ScalarType::Long);
  uint64_t key = infinite_key(dtype);
  if (k > 0) key = Search(dtype, std::move(parts), total).find(k, data<int64_t>(ties), tensors);
  return {value_of(dtype, key, xs[0]), ties};
}

Tensor threshold_mask_cpu(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& value,
                          const Tensor& ties) {
  const DType dtype = check_threshold("threshold_mask", x, mask, value, ties);
  const Tensor flat = torch::stable::contiguous(x);
  const Tensor packed = mask ? torch::stable::contiguous(*mask) : flat;
  const auto* outer = mask ? static_cast<const uint8_t*>(packed.const_data_ptr()) : nullptr;
  const int64_t numel = flat.numel(), parts = ceil_div(numel, kPart);
  Tensor bits = torch::stable::new_empty(flat, {ceil_div(numel, 8)}, ScalarType::Byte);
  const uint64_t key = key_of(dtype, value);
  const void* in = flat.const_data_ptr();
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const ThresholdKernels& kernels = threshold_kernels();
  const auto mark = [&](int64_t part, int64_t quota) {
    const int64_t first = part * kPart;
    return kernels.mark(dtype, in, outer, first, std::min(first + kPart, numel), key, quota, out);
  };
  // All ties first; where there were too many, once more.
  std::vector<int64_t> equal(static_cast<size_t>(parts));
  for_tasks(parts, [&](int64_t i) { equal[static_cast<size_t>(i)] = mark(i, kPart); });
  std::vector<int64_t> quota(static_cast<size_t>(parts));
  int64_t left = *static_cast<const int64_t*>(ties.const_data_ptr());
  for (size_t i = 0; i < quota.size(); ++i) {
    quota[i] = std::max<int64_t>(left, 0);
    left -= equal[i];
  }
  for_tasks(parts, [&](int64_t i) {
    const auto part = static_cast<size_t>(i);
    if (quota[part] < equal[part]) mark(i, quota[part]);
  });
  return bits;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("threshold_magnitude", TORCH_BOX(&memtl::threshold_magnitude_cpu));
  m.impl("threshold_mask", TORCH_BOX(&memtl::threshold_mask_cpu));
}
