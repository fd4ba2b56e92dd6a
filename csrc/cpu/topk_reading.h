// Packed rows as operators get them.
#pragma once

#include <vector>

#include "tensor.h"
#include "topk_read.h"

namespace memtl {

// Packed rows whose shapes, counts and bits have been checked, so that no position leads outside.
// That the positions of a block ascend is checked where they are read.
class Reading {
 public:
  TopkPacked packed;

  Reading(const char* op, const Tensor& values, const Tensor& positions, const Tensor& scale,
          const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap);

  // The place of the first entry of a block; `block` may be one past the last.
  int64_t place(int64_t row, int64_t block) const;

  // What a kernel said of the positions it read.
  void check_ascending(bool ascending) const;

 private:
  void starts_of_counts();
  void starts_of_bits();
  void check_tails() const;

  const char* op_;
  Tensor values_, positions_, scale_, counts_;
  std::vector<int64_t> starts_;
};

}  // namespace memtl
