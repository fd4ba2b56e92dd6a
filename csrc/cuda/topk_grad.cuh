// Device code of topk_weight_grad: grad_out^T x, x [T, D] being read as it is packed.
//
// A block of threads sums a tile of 128 outputs and one block of 256 features over some tokens, 32
// at a time: grad_out's numbers are copied to shared memory, x's are decoded there, and tensor
// cores multiply them while the next 32 tokens are copied and decoded. Sums of different tokens,
// where there are too few tiles to fill a GPU, are added up by a second kernel, in a fixed order.
//
// Nothing is read or written outside whatever the packed data says: a position is a byte and a tile
// has 256 columns; bits beyond the number of kept values have none.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/topk_block.cuh"

namespace memtl::cuda {

constexpr int kGradThreads = 256;
constexpr int kGradOutputs = 128;  // of a tile
constexpr int kGradTokens = 32;    // at a time
constexpr int kGradWarps = kGradThreads / static_cast<int>(kWarp);
constexpr int kWarpTokens = kGradTokens / kGradWarps;  // decoded by a warp
constexpr int kHalves = 2;  // a product of 32 tokens is two instructions deep; each decodes a half

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

// A value as it is in float32; scale is that of an int8 value's block.
template <class Value>
__device__ inline float decoded(Value value, float) {
  return to_math(value);
}
template <>
__device__ inline float decoded<int8_t>(int8_t code, float scale) {
  float x = static_cast<float>(code);
  if (code > 126 || code < -126) {
    x = __uint_as_float(code == 127 ? 0x7f800000 : code == -127 ? 0xff800000 : 0x7fc00000);
  }
  return x * scale;
}

// That scale, of the token so many after the first one of `block`.
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
struct alignas(128) Tile {
  T numbers[kGradTokens][kColumns];

  __device__ T& at(int row, int column) { return numbers[row][column ^ row % 8 * kVector<T>]; }
  // The 16 bytes from a column on, a multiple of 8.
  __device__ T* piece(int row, int column) { return &at(row, column); }
};

template <class T>
using GradTile = Tile<T, kGradOutputs>;
template <class T>
using FeatureTile = Tile<T, kBlock>;

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
      const int own = __popc(bits), through = warp_prefix(own);
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

// Copies grad_out, 32 tokens after the other, to tiles, with zeros where it ends.
template <class T>
class GradReader {
 public:
  // `from`: the first token; `aligned`: rows begin at 16 bytes.
  __device__ GradReader(const T* from, int64_t outputs, int64_t output, bool aligned)
      : outputs_(outputs), aligned_(aligned) {
    row_ = static_cast<int>(threadIdx.x) / kPieces;
    column_ = static_cast<int>(threadIdx.x) % kPieces * kVector<T>;
    from_ = from + row_ * outputs + output + column_;
    const int64_t columns = outputs - output - column_;
    columns_ = static_cast<int>(columns < 0 ? 0 : columns < kVector<T> ? columns : kVector<T>);
  }

  __device__ void copy(int64_t left, GradTile<T>& tile) {
#pragma unroll
    for (int row = 0; row < kGradTokens; row += kRows) {
      const T* from = from_ + row * outputs_;
      T* to = tile.piece(row_ + row, column_);
      const int columns = row_ + row < left ? columns_ : 0;
      if (aligned_) {
        copy16_async(to, from, columns > 0);
      } else {
        Vector<T, kVector<T>> numbers = {};
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          if (i < columns) numbers.at[i] = from[i];
        }
        store16(to, numbers);
      }
    }
    from_ += kGradTokens * outputs_;
  }

 private:
  static constexpr int kPieces = kGradOutputs / kVector<T>, kRows = kGradThreads / kPieces;

  const T* from_;
  int64_t outputs_;
  int row_, column_, columns_;
  bool aligned_;
};

constexpr int kTileRows = 4, kTileColumns = 8;  // instructions a warp's 64 x 64 sums are made of
using GradSums = float[kTileRows][kTileColumns][4];

// sums += grad^T x over 16 tokens, from `token` on, for 64 outputs and 64 features.
template <class T>
__device__ inline void multiply(GradTile<T>& grad, FeatureTile<T>& x, int token, int output,
                                int feature, GradSums& sums) {
  const int lane = static_cast<int>(lane_of_thread());
  uint32_t a[kTileRows][4];
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    const int row = token + lane / 16 * 8 + lane % 8;
    load_transposed(a[i], grad.piece(row, output + 16 * i + lane / 8 % 2 * 8));
  }
#pragma unroll
  for (int j = 0; j < kTileColumns; j += 2) {
    uint32_t b[4];
    load_transposed(b, x.piece(token + lane % 16, feature + 8 * j + lane / 16 * 8));
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      mma_16x8x16(T{}, sums[i][j], a[i], b[0], b[1]);
      mma_16x8x16(T{}, sums[i][j + 1], a[i], b[2], b[3]);
    }
  }
}

// The sums of a split go to out [outputs, features], those of the splits after the first one to
// parts [splits - 1, outputs, features]. One block of kGradThreads for every tile of outputs, block
// of features and split, in this order.
template <class T, class Value, template <class, class> class Reader>
__global__ void __launch_bounds__(kGradThreads, 1)
    topk_weight_grad_kernel(PackedTokens<Value> x, const T* __restrict__ grad_out, bool aligned,
                            int64_t tokens, int64_t outputs, int64_t split_tokens, float* out,
                            float* parts) {
  MEMTL_SHARED(GradTile<T>, grad, [2]);
  MEMTL_SHARED(FeatureTile<T>, rows, [2]);
  const int64_t output_tiles = ceil_div(outputs, kGradOutputs);
  const int64_t blocks = ceil_div(x.features, kBlock);
  const int64_t output = blockIdx.x % output_tiles * kGradOutputs;
  const int64_t block = blockIdx.x / output_tiles % blocks;
  const int64_t split = blockIdx.x / output_tiles / blocks;
  const int64_t begin = split * split_tokens;
  const int warp = static_cast<int>(warp_of_thread()), lane = static_cast<int>(lane_of_thread());
  const int warp_output = warp % 2 * 64, warp_feature = warp / 2 * 64;

  using Source = Reader<T, Value>;
  Source reader(block_of(x, block, begin, Source::kBitmap));
  GradReader<T> grad_reader(grad_out + begin * outputs, outputs, output, aligned);
  GradSums sums = {};
  int64_t left = split_tokens < tokens - begin ? split_tokens : tokens - begin;
  grad_reader.copy(left, grad[0]);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) reader.fetch(half, left);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    reader.fetch_values(half);
    reader.place(half, left, rows[0]);
    reader.fetch(half, left - kGradTokens);
  }
  for (int now = 0; left > 0; now ^= 1) {
    // These tiles are there, and the others are no longer read.
    await_copies();
    __syncthreads();
    left -= kGradTokens;
    grad_reader.copy(left, grad[now ^ 1]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reader.fetch_values(half);
      multiply(grad[now], rows[now], half * 16, warp_output, warp_feature, sums);
      reader.place(half, left, rows[now ^ 1]);
      reader.fetch(half, left - kGradTokens);
    }
  }
  await_copies();

  float* to = split == 0 ? out : parts + (split - 1) * outputs * x.features;
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t o = output + warp_output + 16 * i + 8 * half + lane / 4;
        const int64_t f = block * kBlock + warp_feature + 8 * j + lane % 4 * 2;
        if (o >= outputs || f >= x.features) continue;
        float* at = to + o * x.features + f;
        const Vector<float, 2> pair = {{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        if (x.features % 2 == 0) {
          *reinterpret_cast<Vector<float, 2>*>(at) = pair;
        } else {
          at[0] = pair.at[0];
          if (f + 1 < x.features) at[1] = pair.at[1];
        }
      }
    }
  }
}

// out[i] += parts[0, i] + parts[1, i] + ..., from the left. Any grid of one dimension.
template <int kWide>
__global__ void add_parts_kernel(const float* __restrict__ parts, int64_t count, int64_t numel,
                                 float* __restrict__ out) {
  using Numbers = Vector<float, kWide>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * kWide;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  for (; i < numel; i += stride) {
    Numbers sum = *reinterpret_cast<const Numbers*>(out + i);
#pragma unroll 4
    for (int64_t part = 0; part < count; ++part) {
      const Numbers more = *reinterpret_cast<const Numbers*>(parts + part * numel + i);
      for (int j = 0; j < kWide; ++j) sum.at[j] += more.at[j];
    }
    *reinterpret_cast<Numbers*>(out + i) = sum;
  }
}

// Tokens of a split, a multiple of kGradTokens, so that `processors` have work, all of them about
// the same, and adding up the parts does not take longer than it saves.
inline int64_t split_tokens_of(int64_t tokens, int64_t outputs, int64_t features,
                               int64_t processors) {
  constexpr int64_t kParts = int64_t{8} << 20;  // numbers in all parts, at most
  constexpr int64_t kPartCost = 4;  // one more part of a tile: an n-th of a step of every processor
  const int64_t tiles = ceil_div(outputs, kGradOutputs) * ceil_div(features, kBlock);
  const int64_t steps = ceil_div(tokens, kGradTokens);
  int64_t best = steps, least = ceil_div(tiles, processors) * steps * kPartCost;
  for (int64_t splits = 2; splits <= steps && splits * tiles <= 4 * processors; ++splits) {
    if ((splits - 1) * outputs * features > kParts) break;
    const int64_t each = ceil_div(steps, splits);
    const int64_t cost =
        ceil_div(tiles * splits, processors) * each * kPartCost + (splits - 1) * tiles;
    if (cost < least) {
      least = cost;
      best = each;
    }
  }
  return best * kGradTokens;
}

}  // namespace memtl::cuda
