#include "topk_entries.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

bool starts(const uint8_t* bits, int64_t n, int64_t* starts) {
  int64_t entries = 0, block = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    starts[block++] = entries;
    entries += popcount(load_bits(bits + at / 8, min_of(n - at, kBlock)));
  }
  starts[block] = entries;
  return n % 8 == 0 || bits[n / 8] >> (n % 8) == 0;
}

template <DType kType>
bool unpack_typed(const TopkPacked& packed, int64_t first, int64_t last, void* out) {
  EntryBuffers buffers;
  alignas(64) float dense[kBlock];
  return for_blocks(packed, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
    int count;
    const int64_t place = place_of(packed, row, block, &count);
    const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
    if (!packed.bitmap && !ascend(positions, count)) return false;
    const float* values = values_of(packed, row, block, place, count, buffers.values);
    const bool whole = size == kBlock && at >= first && at + size <= last;
    float* to = dense;
    if constexpr (kType == DType::f32) {
      if (whole) to = static_cast<float*>(out) + (at - first);
    }
    std::memset(to, 0, sizeof dense);
    for (int i = 0; i < count; ++i) to[positions[i]] = values[i];
    if (to != dense) return true;
    if (whole) {
      for (int i = 0; i < kBlock; i += kWidth) store<kType>(out, at - first + i, load(dense + i));
    } else {
      const int64_t end = min_of(size, last - at);
      for (int64_t i = at < first ? first - at : 0; i < end; ++i) {
        store_float(kType, out, at - first + i, dense[i]);
      }
    }
    return true;
  });
}

bool unpack(const TopkPacked& packed, int64_t first, int64_t last, DType dtype, void* out) {
  MEMTL_FOR_DTYPE(dtype, unpack_typed<kType>(packed, first, last, out))
}

}  // namespace

extern const TopkReadKernels topk_read = {starts, unpack};

}  // namespace memtl::MEMTL_ISA_NS
