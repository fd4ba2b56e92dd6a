// topk_unpack, and what every operator that reads packed rows needs.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

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

struct TopkReadKernels {
  // starts [blocks + 1] of one row's bitmap; false where a bit beyond n is set.
  bool (*starts)(const uint8_t* bits, int64_t n, int64_t* starts);
  // Elements [first, last) of the flat dense tensor, to out[0..]; false where the positions of a
  // block do not ascend.
  bool (*unpack)(const TopkPacked& packed, int64_t first, int64_t last, DType dtype, void* out);
};

MEMTL_DECLARE_KERNELS(TopkReadKernels, topk_read)

}  // namespace memtl
