// topk_weight_grad, topk_conv_weight_grad: weight gradients from the kept entries of an input.
//
// Both are sums of grad_out's rows, one a token, times the entries of those tokens. The entries of
// a block of tokens are sorted by feature; the sums of a feature then stay in registers, and the
// rows, a tile of the outputs at a time, in L1.
#pragma once

#include "topk_read.h"

namespace memtl {

constexpr int kTopkTokens = 128;  // tokens of a block

// The entries of a block of tokens and some neighbouring features, by feature. Two features of
// (almost) as many entries make a pair, the longest pairs first. Entry i of both stands in places
// 2 i and 2 i + 1; where the second one has fewer, places are left out.
struct TopkColumns {
  int64_t pairs;
  uint32_t* features;  // [pairs, 2], from the first feature on
  uint16_t* lengths;   // [pairs, 2]
  uint8_t* tokens;     // [sum of first lengths, 2], from the first token of the block on
  float* values;       // [sum of first lengths, 2]
};

// Where columns are built, one after the other. There is room for every entry, for kTopkTokens more
// a panel, and for as many features as there are and two more a panel.
struct TopkStorage {
  uint32_t* features;
  uint16_t* lengths;
  uint8_t* tokens;
  float* values;
};

// Packed rows that are images: [channels, pixels] or, with channels_last, [pixels, channels].
struct TopkImages {
  int64_t channels, pixels;
  bool channels_last;
  const int32_t* tokens;  // [pixels] of the first image; -1: the pixel is left out
  int64_t image_tokens;   // from an image to the next
  int64_t blocks;         // of tokens, of some images
};

struct TopkGradKernels {
  // Above this share of kept entries a dense product of decoded tokens was measured to be faster.
  double dense_from;
  int64_t tile;  // outputs of a tile: a few vectors of `lanes`
  int64_t lanes;

  // The entries of tokens [first, last), where element i of the flat tensor is feature i % features
  // of token i / features, to columns [panels] of `width` features each. cursors holds `features`.
  // False as for unpack.
  bool (*transpose)(const TopkPacked& packed, int64_t features, int64_t first, int64_t last,
                    int64_t width, TopkStorage storage, TopkColumns* columns, uint32_t* cursors);
  // The entries of images [first, last) to columns [blocks, panels]; cursors holds
  // blocks * channels.
  bool (*transpose_images)(const TopkPacked& packed, const TopkImages& images, int64_t first,
                           int64_t last, int64_t width, TopkStorage storage, TopkColumns* columns,
                           uint32_t* cursors);

  // Rows of numbers of any dtype, from element `first` on, to tiles `tile_stride` apart. A tile has
  // `tile` outputs a row; the last one as many as are left, rounded up to lanes.
  void (*fill)(DType dtype, const void* from, int64_t first, int64_t row_stride,
               int64_t output_stride, int64_t rows, int64_t outputs, float* to,
               int64_t tile_stride);
  // sums[feature, :] += value * rows[token, :] over the entries of a block. rows and sums have
  // vectors * lanes numbers a row, up to a tile; sums a row more than there are features.
  void (*accumulate)(const TopkColumns& columns, int64_t vectors, const float* rows, float* sums);
  // out[o * output_stride + f * sets + s] = sums[s * set_stride + f * row + o] for `outputs` o,
  // `width` f and `sets` s; a row is `outputs` rounded up to lanes.
  void (*write)(const float* sums, int64_t set_stride, int64_t sets, int64_t width, int64_t outputs,
                float* out, int64_t output_stride);
};

MEMTL_DECLARE_KERNELS(TopkGradKernels, topk_grad)

}  // namespace memtl
