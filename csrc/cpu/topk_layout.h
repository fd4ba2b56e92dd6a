// How entries are sorted into columns.
#pragma once

#include "topk_block.h"
#include "topk_grad.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// The columns of one block from the entries of each feature, which are counted in cursors: those
// become the places of the features' first entries, from `entries` on; returns where the last ends.
uint32_t lay_out(int64_t features, int64_t width, uint32_t entries, TopkStorage* storage,
                 TopkColumns* columns, uint32_t* cursors) {
  for (int64_t begin = 0; begin < features; begin += width, ++columns) {
    const int64_t size = min_of(width, features - begin);
    *columns = {0, storage->features, storage->lengths, storage->tokens + entries,
                storage->values + entries};
    // The features by falling number of entries.
    uint32_t place[kTopkTokens + 1] = {};  // of the first feature with so many
    for (int64_t i = 0; i < size; ++i) ++place[cursors[begin + i]];
    uint32_t at = 0;
    for (int length = kTopkTokens; length >= 0; --length) {
      const uint32_t of_length = place[length];
      place[length] = at;
      at += of_length;
    }
    for (int64_t i = 0; i < size; ++i) {
      columns->features[place[cursors[begin + i]]++] = static_cast<uint32_t>(i);
    }
    if (size % 2) columns->features[size] = static_cast<uint32_t>(width);  // one that is none
    int64_t pair = 0;
    for (; 2 * pair < size; ++pair) {
      uint32_t& first = cursors[begin + columns->features[2 * pair]];
      const uint32_t length = first;
      if (length == 0) break;
      first = entries;
      uint32_t second_length = 0;
      if (2 * pair + 1 < size) {
        uint32_t& second = cursors[begin + columns->features[2 * pair + 1]];
        second_length = second;
        second = entries + 1;
      }
      columns->lengths[2 * pair] = static_cast<uint16_t>(length);
      columns->lengths[2 * pair + 1] = static_cast<uint16_t>(second_length);
      entries += 2 * length;
    }
    columns->pairs = pair;
    storage->features += 2 * pair;
    storage->lengths += 2 * pair;
  }
  return entries;
}

// Puts an entry to its place.
MEMTL_INLINE void put(const TopkStorage& storage, uint32_t* cursor, int64_t token, float value) {
  storage.tokens[*cursor] = static_cast<uint8_t>(token);
  storage.values[*cursor] = value;
  *cursor += 2;
}

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
