// Packed tokens decoded into shared memory, a block of 256 features at a time, for tensor cores.
//
// Nothing is read or written outside whatever the packed data says: a position is a byte and a tile
// has 256 columns; bits beyond the number of kept values have none.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/topk_block.cuh"

namespace memtl::cuda {

constexpr int kGradThreads = 256;
constexpr int kGradTokens = 32;  // at a time
constexpr int kGradWarps = kGradThreads / static_cast<int>(kWarp);
constexpr int kWarpTokens = kGradTokens / kGradWarps;  // decoded by a warp
constexpr int kHalves = 2;  // of them, since a product of 32 tokens is two instructions deep

// Packed rows that are tokens: every whole block of 256 features keeps k, a short last one k_tail.
template <class Value>
struct PackedTokens {
  const Value* values;       // [tokens, kept]
  const uint8_t* positions;  // [tokens, kept], or bits [tokens, ceil(features / 8)]
  const uint16_t* scale;     // [tokens, ceil(features / 256)], of int8 values
  int64_t features, kept;
  int k, k_tail;
};

// The values and positions of one block of features, from some token on.
template <class Value>
struct PackedBlock {
  const Value* values;
  const uint8_t* positions;
  const uint16_t* scale;
  int kept, position_stride, scale_stride;  // from a token to the next: less than 2^24
  int count;                                // values a token
  int bytes;                                // of bits
};

template <class Value>
__device__ inline PackedBlock<Value> block_of(const PackedTokens<Value>& x, int64_t block,
                                              int64_t token, bool bitmap) {
  const int64_t before = block * kBlock, start = block * x.k;
  const int size = static_cast<int>(x.features - before < kBlock ? x.features - before : kBlock);
  const int64_t blocks = ceil_div(x.features, kBlock);
  const int64_t position_stride = bitmap ? ceil_div(x.features, 8) : x.kept;
  return {x.values + token * x.kept + start,
          x.positions + token * position_stride + (bitmap ? before / 8 : start),
          sizeof(Value) == 1 ? x.scale + token * blocks + block : nullptr,
          static_cast<int>(x.kept),
          static_cast<int>(position_stride),
          static_cast<int>(blocks),
          size < kBlock ? x.k_tail : x.k,
          (size + 7) / 8};
}

// The scale of int8 values of the token so many after the first one of `block`.
template <class Value>
__device__ inline float scale_of(const PackedBlock<Value>& block, int token) {
  if constexpr (sizeof(Value) == 1) {
    return to_math(BFloat16{block.scale[token * block.scale_stride]});
  }
  return 1;
}

template <class T>
__device__ inline T rounded(float x) {
  return {static_cast<uint16_t>(rounded_pair(T{}, x, 0))};
}

// 32 rows, of tokens, in shared memory. The 16-byte pieces of a row are exchanged so that the same
// one of eight rows is in different banks.
template <class T, int kColumns>
struct alignas(128) SharedTile {
  T numbers[kGradTokens][kColumns];

  __device__ T& at(int row, int column) { return numbers[row][column ^ row % 8 * kVector<T>]; }
  // The 16 bytes from a column on, a multiple of 8.
  __device__ T* piece(int row, int column) { return &at(row, column); }
};

template <class T>
using FeatureTile = SharedTile<T, kBlock>;

// Both readers decode the entries of a block, 32 tokens after the other, a half of them at a time,
// of which a warp has two. fetch() starts reading what is needed first, of tokens after those that
// are placed next; fetch_values() what is left of those; place() puts them to their rows. `left` is
// the number of tokens, of the 32 in question and after them.

// Entries that have a byte for their position. As many tokens are read at once as have room in a
// warp. Of more than 32 entries a token those beyond are read only where they are placed.
template <class T, class Value>
class ByteReader {
 public:
  static constexpr bool kBitmap = false;

  __device__ explicit ByteReader(const PackedBlock<Value>& block) : block_(block) {
    const int lane = static_cast<int>(lane_of_thread());
    lanes_ = block.count <= 8 ? 8 : block.count <= 16 ? 16 : 32;
    rows_ = static_cast<int>(kWarp) / lanes_;
    row_ = static_cast<int>(warp_of_thread()) * kWarpTokens + lane / lanes_;
    entry_ = lane % lanes_;
    advance(row_, entry_);
  }

  __device__ void fetch(int half, int64_t left) {
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      const int row = i * rows_;
      position_[i] = -1;
      if (row >= kWarpTokens || row_ + row >= left || entry_ >= block_.count) continue;
      position_[i] = block_.positions[row * block_.kept];
      value_[i] = block_.values[row * block_.kept];
      scale_[i] = scale_of(block_, row);
    }
    if (half == kHalves - 1) advance(kGradTokens, 0);
  }

  __device__ void fetch_values(int) {}

  __device__ void place(int half, int64_t left, FeatureTile<T>& tile) {
    if (half == 0) {
      const int lane = static_cast<int>(lane_of_thread());
      const int row = static_cast<int>(warp_of_thread()) * kWarpTokens;
#pragma unroll
      for (int i = 0; i < kWarpTokens; ++i) {
        store16(tile.piece(row + i, lane * kVector<T>), Vector<T, kVector<T>>{});
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      if (position_[i] >= 0) {
        tile.at(row_ + i * rows_, position_[i]) = rounded<T>(decoded(value_[i], scale_[i]));
      }
    }
    if (block_.count > static_cast<int>(kWarp)) place_others(half, left, tile);
  }

 private:
  static constexpr int kHalf = kWarpTokens / kHalves;

  __device__ void advance(int tokens, int entries) {
    block_.values += tokens * block_.kept + entries;
    block_.positions += tokens * block_.kept + entries;
    if constexpr (sizeof(Value) == 1) block_.scale += tokens * block_.scale_stride;
  }

  __device__ void place_others(int half, int64_t left, FeatureTile<T>& tile) {
    for (int row = half * kHalf; row < (half + 1) * kHalf; ++row) {
      if (row_ + row >= left) return;
      const int back = row - kGradTokens;  // fetch() is that far ahead
      const float scale = scale_of(block_, back);
      for (int i = lanes_; entry_ + i < block_.count; i += lanes_) {
        const int at = back * block_.kept + i;
        tile.at(row_ + row, block_.positions[at]) = rounded<T>(decoded(block_.values[at], scale));
      }
    }
  }

  PackedBlock<Value> block_;  // from this lane's first entry on
  int lanes_, rows_;          // of a token; tokens at once
  int row_, entry_;
  int position_[kWarpTokens];  // -1: there is no entry
  Value value_[kWarpTokens];
  float scale_[kWarpTokens];
};

// Entries whose positions are bits: a lane has a byte of them, and 8 features.
template <class T, class Value>
class BitReader {
 public:
  static constexpr bool kBitmap = true;

  __device__ explicit BitReader(const PackedBlock<Value>& block)
      : block_(block),
        row_(static_cast<int>(warp_of_thread()) * kWarpTokens),
        byte_(static_cast<int>(lane_of_thread())) {
    block_.values += row_ * block.kept;
    block_.positions += row_ * block.position_stride + byte_;
    if constexpr (sizeof(Value) == 1) block_.scale += row_ * block.scale_stride;
  }

  __device__ void fetch(int half, int64_t left) {
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      const bool there = row_ + i < left;
      bits_[i] = there && byte_ < block_.bytes ? block_.positions[i * block_.position_stride] : 0;
      scale_[i] = there ? scale_of(block_, i) : 0;
    }
    if (half == kHalves - 1) {
      block_.positions += kGradTokens * block_.position_stride;
      if constexpr (sizeof(Value) == 1) block_.scale += kGradTokens * block_.scale_stride;
    }
  }

  __device__ void fetch_values(int half) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int row = half * kHalf + i;
      unsigned bits = bits_[row];
      const int own = __popc(bits), through = warp_sum_up_to(own);
      if (through > block_.count) {  // more bits than values: the last ones have none
        for (int more = through - block_.count; bits != 0 && more > 0; --more) {
          bits &= ~(0x80000000u >> __clz(static_cast<int>(bits)));
        }
      }
      const Value* values = block_.values + row * block_.kept + (through - own);
#pragma unroll
      for (unsigned j = 0, rank = 0; j < 8; ++j) {
        const unsigned kept = bits >> j & 1;
        value_[i][j] = kept ? values[rank] : Value{};
        rank += kept;
      }
    }
    if (half == kHalves - 1) block_.values += kGradTokens * block_.kept;
  }

  __device__ void place(int half, int64_t, FeatureTile<T>& tile) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int row = half * kHalf + i;
      Vector<uint32_t, 4> pairs;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs.at[j] = rounded_pair(T{}, decoded(value_[i][2 * j], scale_[row]),
                                   decoded(value_[i][2 * j + 1], scale_[row]));
      }
      T* to = tile.piece(row_ + row, byte_ * 8);
      *reinterpret_cast<Vector<uint32_t, 4>*>(to) = pairs;
    }
  }

 private:
  static constexpr int kHalf = kWarpTokens / kHalves;

  PackedBlock<Value> block_;  // from this warp's first token on
  int row_, byte_;
  unsigned bits_[kWarpTokens];
  float scale_[kWarpTokens];
  Value value_[kHalf][8];
};

}  // namespace memtl::cuda
