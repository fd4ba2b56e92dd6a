// topk_weight_grad: the weight gradient of a linear layer from the kept entries of its input.
#pragma once

#include "topk_read.h"

namespace memtl {

constexpr int kTopkTokens = 128;  // tokens of a transposed block: a tile of grad_out fits in L1

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

struct TopkGradKernels {
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

MEMTL_DECLARE_KERNELS(TopkGradKernels, topk_grad)

}  // namespace memtl
