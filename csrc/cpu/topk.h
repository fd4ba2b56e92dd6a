// topk: the largest magnitudes of every block of 256, and the weight gradient from them.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

constexpr int kTopkTokens = 128;  // tokens of a transposed block: a tile of grad_out fits in L1

// Where the packed rows go; positions are a bitmap or one byte an entry.
struct TopkOutput {
  DType value;
  void* values;        // [rows, kept]
  uint8_t* positions;  // [rows, kept] or [rows, ceil(n / 8)]
  uint16_t* scale;     // [rows, blocks] bfloat16 of int8 values, else null
  int16_t* counts;     // [rows, blocks] entries of a block, or null
  int64_t kept;
  bool bitmap;
};

// Packed rows as they are read. What bounds a loop (starts, the positions of a short block) has
// been checked before.
struct TopkPacked {
  DType value;
  const void* values;
  const uint8_t* positions;
  const uint16_t* scale;
  const int64_t* starts;  // [rows, blocks + 1] entries before a block; null: k in each full one
  int64_t rows, n, kept, k;
  bool bitmap;
};

// The entries of up to kTopkTokens tokens and some neighbouring features, by feature. Two features
// of (almost) as many entries make a pair, the longest pairs first: entry i of both, then entry
// i + 1. The shorter one is filled up with zeros of token kTopkTokens.
struct TopkColumns {
  int64_t pairs;
  uint32_t* features;  // [pairs, 2], from the first feature on
  uint16_t* lengths;   // [pairs]
  uint8_t* tokens;     // [sum of lengths, 2], from the first token on
  float* values;       // [sum of lengths, 2]
};

struct TopkKernels {
  // Rows [first, last) of x [rows, n]: the k largest of a block, k_tail of a shorter last one.
  void (*pack)(DType dtype, const void* x, int64_t n, int64_t k, int64_t k_tail,
               const TopkOutput& out, int64_t first, int64_t last);

  // The bit patterns of |x|, by which magnitudes are ordered.
  void (*keys)(DType dtype, const void* x, int64_t count, uint32_t* keys);
  // The elements with a key above hi, and those in [lo, hi], of which up to `room` keys are stored.
  // keys holds room + 16.
  void (*count)(DType dtype, const void* x, int64_t count, uint32_t lo, uint32_t hi, int64_t* above,
                int64_t* inside, uint32_t* keys, int64_t room);
  // A threshold in [lo, hi]: fewer than k (or, exactly, k) keys are above it, and with those equal
  // to it there are at least k. All keys are in [lo, hi]. 0 < k <= count.
  uint32_t (*threshold)(const uint32_t* keys, int64_t count, int64_t k, uint32_t lo, uint32_t hi,
                        int64_t* above);
  // Blocks [first, last) of row `row` of x: everything above the threshold and the first `ties` of
  // those equal to it; the first entry goes to place `start` of the row.
  void (*pack_above)(DType dtype, const void* x, int64_t n, int64_t row, int64_t first,
                     int64_t last, uint32_t threshold, int64_t ties, int64_t start,
                     const TopkOutput& out);

  // starts [blocks + 1] of one row's bitmap; false where a bit beyond n is set.
  bool (*starts)(const uint8_t* bits, int64_t n, int64_t* starts);
  // Elements [first, last) of the flat dense tensor, to out[0..]; false where the positions of a
  // block do not ascend.
  bool (*unpack)(const TopkPacked& packed, int64_t first, int64_t last, DType dtype, void* out);

  // The entries of tokens [first, last), `width` features a panel, to columns [panels], whose
  // arrays are those of columns[0] from panel to panel. cursors holds `features`. False as for
  // unpack.
  bool (*transpose)(const TopkPacked& packed, int64_t features, int64_t first, int64_t last,
                    int64_t width, TopkColumns* columns, uint32_t* cursors);
  // Above this share of kept entries a dense product of decoded tokens was measured to be faster.
  double dense_from;
  int64_t tile;  // outputs product() computes at a time
  // out[o, f] for the `tile` outputs from first_output on and the `width` features from
  // first_feature on; columns[i * stride] has the entries of token block i. workspace holds
  // (kTopkTokens + 1 + width + 1) * tile floats, aligned to 64 bytes.
  void (*product)(DType dtype, const void* grad_out, int64_t tokens, int64_t outputs,
                  const TopkColumns* columns, int64_t stride, int64_t first_output,
                  int64_t first_feature, int64_t width, int64_t features, float* workspace,
                  float* out);
};

MEMTL_DECLARE_KERNELS(TopkKernels, topk)

}  // namespace memtl
