// Sums in kNormLanes parts, the same in every instruction set.
#pragma once

#include "common/simd.h"
#include "quant_norm.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr int kParts = kNormLanes / kWidth;
using Lanes = Floats[kParts];

// The kNormLanes elements from i on; beyond `count` of them, zeros.
template <DType kType>
MEMTL_INLINE void load_lanes(const void* x, int64_t i, int64_t count, Lanes& v) {
  if (count >= kNormLanes) {
    MEMTL_UNROLL
    for (int p = 0; p < kParts; ++p) v[p] = load<kType>(x, i + p * kWidth);
    return;
  }
  float padded[kNormLanes] = {};
  for (int64_t j = 0; j < count; ++j) padded[j] = load_float(kType, x, i + j);
  for (int p = 0; p < kParts; ++p) v[p] = load(padded + p * kWidth);
}

template <DType kType>
MEMTL_INLINE void store_lanes(void* out, int64_t i, int64_t count, const Lanes& v) {
  if (count >= kNormLanes) {
    MEMTL_UNROLL
    for (int p = 0; p < kParts; ++p) store<kType>(out, i + p * kWidth, v[p]);
    return;
  }
  float padded[kNormLanes];
  for (int p = 0; p < kParts; ++p) store(padded + p * kWidth, v[p]);
  for (int64_t j = 0; j < count; ++j) store_float(kType, out, i + j, padded[j]);
}

MEMTL_INLINE float sum(const Lanes& v) {
  float lane[kNormLanes];
  for (int p = 0; p < kParts; ++p) store(lane + p * kWidth, v[p]);
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
