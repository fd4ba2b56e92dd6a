// masked: a linear layer over the weights that a mask leaves.
//
// Forward and input gradient are products with a sparse factor, the weight, whose entries are
// sorted out of the mask at every call: topk_product.h. The weight gradient is one dot product over
// tokens for each entry. With tokens in the lanes, a row of grad_out stays in registers, and the
// rows of x that it meets, a block of features at a time, in L1.
#pragma once

#include "topk_grad.h"

namespace memtl {

constexpr int kMaskedFeatures = 64;  // of a block of the weight gradient

struct MaskedWeight {
  DType dtype;
  const void* values;  // [outputs, inputs]
  const uint8_t* bits;
  int64_t outputs, inputs;
};

// The entries of some rows of a block of features, row by row.
struct MaskedEntries {
  int64_t rows;
  const uint8_t* lengths;    // [rows]
  const uint8_t* positions;  // [sum of lengths], in the block
};

struct MaskedKernels {
  // Above this share of entries dense products were measured to be faster.
  double dense_from;

  // The number of set bits of the first `bytes` bytes.
  int64_t (*count)(const uint8_t* bits, int64_t bytes);

  // The weight as a sparse factor: its inputs, or else its outputs, are the tokens of TopkColumns,
  // a block [first, last) of them, and the others the features. First the entries of every feature
  // to cursors; returns their sum. Then these entries to columns of `width` features each.
  int64_t (*count_entries)(const MaskedWeight& weight, bool inputs, int64_t first, int64_t last,
                           uint32_t* cursors);
  void (*sort)(const MaskedWeight& weight, bool inputs, int64_t first, int64_t last, int64_t width,
               TopkStorage storage, TopkColumns* columns, uint32_t* cursors);

  // The entries of rows [first_row, last_row) of a block of features to lengths and positions;
  // returns how many there are.
  int64_t (*list)(const MaskedWeight& weight, int64_t first_row, int64_t last_row, int64_t feature,
                  int64_t features, uint8_t* lengths, uint8_t* positions);
  // sums[i] += row of grad_out times row of x over some tokens, for every entry i. Both are as
  // TopkGradKernels::fill leaves them: one tile of so many vectors of tokens, or two whole ones.
  void (*dot)(const MaskedEntries& entries, int64_t tiles, int64_t vectors, const float* grad_out,
              int64_t grad_tile_stride, const float* x, int64_t x_tile_stride, float* sums);
  // sums to their places in rows of `features`, zeros to the others.
  void (*spread)(const MaskedEntries& entries, const float* sums, int64_t features, float* out,
                 int64_t stride);
};

MEMTL_DECLARE_KERNELS(MaskedKernels, masked)

}  // namespace memtl
