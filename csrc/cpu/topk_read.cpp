#include <algorithm>
#include <atomic>
#include <utility>

#include "topk_reading.h"
#include "topk_tensors.h"

namespace memtl {

Reading::Reading(const char* op, const Tensor& values, const Tensor& positions, const Tensor& scale,
                 const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap)
    : op_(op),
      values_(torch::stable::contiguous(values)),
      positions_(torch::stable::contiguous(positions)),
      scale_(torch::stable::contiguous(scale)),
      counts_(torch::stable::contiguous(counts)) {
  STD_TORCH_CHECK(values.is_cpu() && positions.is_cpu() && scale.is_cpu() && counts.is_cpu(), op,
                  ": expected values, positions, scale and counts on the CPU");
  const DType value = check_packed(op, values, positions, scale, counts, n, k, k_tail, bitmap);
  const int64_t rows = values.size(0), kept = values.size(1);
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
  if (counts.numel() > 0) starts_of_counts();
  if (bitmap) {
    starts_of_bits();
  } else {
    check_tails();
  }
}

int64_t Reading::place(int64_t row, int64_t block) const {
  const int64_t blocks = ceil_div(packed.n, kBlock);
  const int64_t start = packed.starts    ? packed.starts[row * (blocks + 1) + block]
                        : block < blocks ? block * packed.k
                                         : packed.kept;
  return row * packed.kept + start;
}

void Reading::starts_of_counts() {
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

void Reading::starts_of_bits() {
  const int64_t blocks = ceil_div(packed.n, kBlock), size = blocks + 1;
  std::vector<int64_t> starts(static_cast<size_t>(packed.rows * size));
  const TopkReadKernels& kernels = topk_read_kernels();
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
void Reading::check_tails() const {
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

void Reading::check_ascending(bool ascending) const {
  STD_TORCH_CHECK(ascending, op_, ": expected the positions of every block to ascend");
}

namespace {

Tensor topk_unpack_cpu(const Tensor& values, const Tensor& positions, const Tensor& scale,
                       const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap,
                       ScalarType dtype) {
  const DType wanted = floating("topk_unpack", "the result", dtype);
  const Reading reading("topk_unpack", values, positions, scale, counts, n, k, k_tail, bitmap);
  const int64_t size[] = {values.size(0), n};
  Tensor result = torch::stable::new_empty(values, size, dtype);
  auto* out = data<char>(result);
  const TopkReadKernels& kernels = topk_read_kernels();
  std::atomic<bool> ascending{true};
  torch::stable::parallel_for(0, size[0] * n, kGrain, [&](int64_t first, int64_t last) {
    if (!kernels.unpack(reading.packed, first, last, wanted, out + first * size_of(wanted))) {
      ascending = false;
    }
  });
  reading.check_ascending(ascending);
  return result;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("topk_unpack", TORCH_BOX(&memtl::topk_unpack_cpu));
}
