// Device code of topk_weight_grad: grad_out^T x, x [T, D] being read as it is packed.
//
// A block of threads sums a tile of 128 outputs and one block of 256 features over some tokens, 32
// at a time: grad_out's numbers are copied to shared memory, x's are decoded there, and tensor
// cores multiply them while the next 32 tokens are copied and decoded. Sums of different tokens,
// where there are too few tiles to fill a GPU, are added up by a second kernel, in a fixed order.
#pragma once

#include "cuda/topk_tile.cuh"

namespace memtl::cuda {

constexpr int kGradOutputs = 128;  // of a tile

template <class T>
using GradTile = SharedTile<T, kGradOutputs>;

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
  // In the time of 32 tokens of a tile a GPU writes and reads so many parts of tiles, by the rates
  // that data sheets give of its tensor cores and memory.
  constexpr int64_t kStep = 4;
  const int64_t tiles = ceil_div(outputs, kGradOutputs) * ceil_div(features, kBlock);
  const int64_t steps = ceil_div(tokens, kGradTokens);
  int64_t best = steps, least = ceil_div(tiles, processors) * steps * kStep;
  for (int64_t splits = 2; splits <= steps && splits * tiles <= 4 * processors; ++splits) {
    if ((splits - 1) * outputs * features > kParts) break;
    const int64_t each = ceil_div(steps, splits);
    const int64_t cost = ceil_div(tiles * splits, processors) * each * kStep + (splits - 1) * tiles;
    if (cost < least) {
      least = cost;
      best = each;
    }
  }
  return best * kGradTokens;
}

}  // namespace memtl::cuda
