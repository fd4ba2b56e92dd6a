// Device code of topk_weight_grad: grad_out^T x, x [T, D] being read as it is packed.
//
// A block of threads sums a tile of 128 outputs and one block of 256 features over some tokens, 32
// at a time: grad_out's numbers are copied to shared memory, x's are decoded there, and tensor cores
// multiply them while the next 32 tokens are copied and decoded. Sums of different tokens, where
// there are too few tiles to fill a GPU, are added up by a second kernel, in a fixed order.
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

// The values and positions of one block of features.
template <class Value>
struct PackedBlock {
  const Value* values;       // of token 0
  const uint8_t* positions;  // of token 0
  const uint16_t* scale;
  int64_t kept, position_stride, scale_stride;  // from a token to the next
  int count;                                    // values a token
  int bytes;                                    // of bits
};

template <class Value>
__device__ inline PackedBlock<Value> block_of(const PackedTokens<Value>& x, int64_t block,
                                              bool bitmap) {
  const int64_t left = x.features - block * kBlock;
  const int64_t start = block * x.k;
  const int64_t row_bytes = ceil_div(x.features, 8);
  return {x.values + start,
          x.positions + (bitmap ? block * (kBlock / 8) : start),
          x.scale + block,
          x.kept,
          bitmap ? row_bytes : x.kept,
          ceil_div(x.features, kBlock),
          left < kBlock ? x.k_tail : x.k,
          static_cast<int>(ceil_div(left < kBlock ? left : kBlock, 8))};
}

// A value as it is in float32; scale is that of an int8 value's block.
template <class Value>
__device__ inline float decoded(Value value, float) {
  return to_math(value);
}
template <>
__device__ inline float decoded<int8_t>(int8_t code, float scale) {
  float x = static_cast<float>(code);
  if (code == 127 || code == -127) x *= __uint_as_float(0x7f800000);
  if (code == -128) x = __uint_as_float(0x7fc00000);
  return x * scale;
}

template <class Value>
__device__ inline float scale_of(const PackedBlock<Value>& block, int64_t token) {
  if constexpr (sizeof(Value) == 1) {
    return to_math(BFloat16{block.scale[token * block.scale_stride]});
  }
  return 1;
}

// 32 rows, of tokens, in shared memory. The 16-byte pieces of a row are exchanged so that the same
// one of eight rows is in different banks.
template <class T, int kColumns>
struct Tile {
  T numbers[kGradTokens][kColumns];

  __device__ T* piece(int row, int piece) {
    return numbers[row] + (piece ^ row % 8) * kVector<T>;
  }
  __device__ T& at(int row, int column) {
    return piece(row, column / kVector<T>)[column % kVector<T>];
  }
};

template <class T>
using GradTile = Tile<T, kGradOutputs>;
template <class T>
using FeatureTile = Tile<T, kBlock>;

template <class T>
__device__ inline Vector<T, kVector<T>> zeros16() {
  Vector<T, kVector<T>> zeros;
  for (T& each : zeros.at) each = T{};
  return zeros;
}

// Decodes entries that have a byte for their position. All that is needed of a token is read long
// before it is placed, up to 32 entries; of more, the others are read where they are placed.
// As many tokens are read at once as have room in a warp.
template <class T, class Value>
class ByteReader {
 public:
  static constexpr bool kBitmap = false;

  __device__ ByteReader(const PackedBlock<Value>& block, int64_t end) : block_(block), end_(end) {
    const int lane = static_cast<int>(lane_of_thread());
    lanes_ = block.count <= 8 ? 8 : block.count <= 16 ? 16 : 32;
    rows_ = static_cast<int>(kWarp) / lanes_;
    row_ = static_cast<int>(warp_of_thread()) * kWarpTokens + lane / lanes_;
    entry_ = lane % lanes_;
  }

  // Starts reading a half of the tokens from `first` on.
  __device__ void fetch(int64_t first, int half) {
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      position_[i] = -1;
      const int64_t token = first + row_ + i * rows_;
      if (i * rows_ >= kWarpTokens || token >= end_ || entry_ >= block_.count) continue;
      position_[i] = block_.positions[token * block_.position_stride + entry_];
      value_[i] = block_.values[token * block_.kept + entry_];
      scale_[i] = scale_of(block_, token);
    }
  }

  __device__ void fetch_values(int64_t, int) {}

  // Puts the half to its rows.
  __device__ void place(int64_t first, int half, FeatureTile<T>& tile) {
    if (half == 0) {
      const int row = static_cast<int>(warp_of_thread()) * kWarpTokens;
      for (int i = 0; i < kWarpTokens; ++i) {
        store16(tile.piece(row + i, static_cast<int>(lane_of_thread())), zeros16<T>());
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      if (position_[i] >= 0) {
        tile.at(row_ + i * rows_, position_[i]) = from_math<T>(decoded(value_[i], scale_[i]));
      }
      const int64_t token = first + row_ + i;
      if (block_.count <= lanes_ || token >= end_) continue;
      for (int entry = entry_ + lanes_; entry < block_.count; entry += lanes_) {
        const int position = block_.positions[token * block_.position_stride + entry];
        const Value value = block_.values[token * block_.kept + entry];
        tile.at(row_ + i, position) = from_math<T>(decoded(value, scale_of(block_, token)));
      }
    }
  }

 private:
  static constexpr int kHalf = kWarpTokens / kHalves;

  PackedBlock<Value> block_;
  int64_t end_;
  int lanes_, rows_;  // of a token; tokens at once
  int row_, entry_;
  int position_[kWarpTokens];  // -1: there is no entry
  Value value_[kWarpTokens];
  float scale_[kWarpTokens];
};

// Decodes entries whose positions are bits: a lane has a byte of them, and 8 features.
template <class T, class Value>
class BitReader {
 public:
  static constexpr bool kBitmap = true;

  __device__ BitReader(const PackedBlock<Value>& block, int64_t end)
      : block_(block), end_(end), row_(static_cast<int>(warp_of_thread()) * kWarpTokens) {}

  __device__ void fetch(int64_t first, int half) {
    const int lane = static_cast<int>(lane_of_thread());
#pragma unroll
    for (int i = half * kHalf; i < (half + 1) * kHalf; ++i) {
      const int64_t token = first + row_ + i;
      const bool there = token < end_ && lane < block_.bytes;
      bits_[i] = there ? block_.positions[token * block_.position_stride + lane] : 0;
    }
  }

  // The bits are there: starts reading the values.
  __device__ void fetch_values(int64_t first, int half) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      unsigned& bits = bits_[half * kHalf + i];
      const int own = __popc(bits);
      int rank = warp_prefix(own) - own;
      const int64_t token = first + row_ + half * kHalf + i;
      const Value* values = block_.values + token * block_.kept;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(bits >> j & 1)) continue;
        if (rank < block_.count) value_[i][j] = values[rank];
        if (rank >= block_.count) bits ^= 1u << j;
        ++rank;
      }
      scale_[i] = token < end_ ? scale_of(block_, token) : 0;
    }
  }

  __device__ void place(int64_t, int half, FeatureTile<T>& tile) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int row = half * kHalf + i;
      Vector<T, 8> numbers;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool kept = bits_[row] >> j & 1;
        numbers.at[j] = kept ? from_math<T>(decoded(value_[i][j], scale_[i])) : T{};
      }
      store16(tile.piece(row_ + row, static_cast<int>(lane_of_thread())), numbers);
    }
  }

 private:
  static constexpr int kHalf = kWarpTokens / kHalves;

  PackedBlock<Value> block_;
  int64_t end_;
  int row_;
  unsigned bits_[kWarpTokens];
  Value value_[kHalf][8];
  float scale_[kHalf];
};

// Copies grad_out[first..first + 32, output..output + 128] to a tile, with zeros where it ends.
// `aligned`: rows begin at 16 bytes.
template <class T>
__device__ inline void copy_grad(const T* grad_out, int64_t outputs, bool aligned, int64_t first,
                                 int64_t end, int64_t output, GradTile<T>& tile) {
  constexpr int kPieces = kGradOutputs / kVector<T>;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kGradTokens * kPieces; i += kGradThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t token = first + row, column = output + piece * kVector<T>;
    const bool there = token < end && column < outputs;
    const T* from = there ? grad_out + token * outputs + column : grad_out;
    if (aligned) {
      copy16_async(tile.piece(row, piece), from, there);
    } else {
      auto numbers = zeros16<T>();
      for (int j = 0; j < kVector<T>; ++j) {
        if (there && column + j < outputs) numbers.at[j] = from[j];
      }
      store16(tile.piece(row, piece), numbers);
    }
  }
}

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
    load_transposed(a[i], grad.piece(row, output / 8 + 2 * i + lane / 8 % 2));
  }
#pragma unroll
  for (int j = 0; j < kTileColumns; j += 2) {
    uint32_t b[4];
    load_transposed(b, x.piece(token + lane % 16, feature / 8 + j + lane / 16));
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
  const int64_t end = begin + split_tokens < tokens ? begin + split_tokens : tokens;
  const int warp = static_cast<int>(warp_of_thread()), lane = static_cast<int>(lane_of_thread());
  const int warp_output = warp % 2 * 64, warp_feature = warp / 2 * 64;

  using Source = Reader<T, Value>;
  Source reader(block_of(x, block, Source::kBitmap), end);
  GradSums sums = {};
  copy_grad(grad_out, outputs, aligned, begin, end, output, grad[0]);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) reader.fetch(begin, half);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    reader.fetch_values(begin, half);
    reader.place(begin, half, rows[0]);
    reader.fetch(begin + kGradTokens, half);
  }
  int now = 0;
  for (int64_t first = begin; first < end; first += kGradTokens, now ^= 1) {
    // This tile is there, and the other one is no longer read.
    await_copies();
    __syncthreads();
    const int64_t next = first + kGradTokens;
    copy_grad(grad_out, outputs, aligned, next, end, output, grad[now ^ 1]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reader.fetch_values(next, half);
      multiply(grad[now], rows[now], half * 16, warp_output, warp_feature, sums);
      reader.place(next, half, rows[now ^ 1]);
      reader.fetch(next + kGradTokens, half);
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
