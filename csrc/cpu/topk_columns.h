// Memory of the weight gradients.
#pragma once

#include <memory>
#include <new>

#include "topk_grad.h"

namespace memtl {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<float[], FreeAligned>;

inline Workspace workspace(int64_t floats) {
  return Workspace(new (std::align_val_t{64}) float[static_cast<size_t>(floats)]);
}

// What TopkColumns point to.
class ColumnMemory {
 public:
  // For up to so many entries in so many blocks of features.
  TopkStorage storage(int64_t entries, int64_t features, int64_t panels, int64_t blocks = 1) {
    entries += blocks * panels * kTopkTokens;
    const int64_t places = blocks * (features + 2 * panels);
    memory_ = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(entries * 5 + places * 6));
    TopkStorage storage;
    storage.values = reinterpret_cast<float*>(memory_.get());
    storage.features = reinterpret_cast<uint32_t*>(storage.values + entries);
    storage.lengths = reinterpret_cast<uint16_t*>(storage.features + places);
    storage.tokens = reinterpret_cast<uint8_t*>(storage.lengths + places);
    return storage;
  }

 private:
  std::unique_ptr<char[]> memory_;
};

}  // namespace memtl
