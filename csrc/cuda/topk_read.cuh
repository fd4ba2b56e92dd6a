// Device code of topk_unpack: packed rows made dense. Nothing is read or written outside, whatever
// the packed data says.
#pragma once

#include "cuda/topk_chunks.cuh"

namespace memtl::cuda {

// Packed rows. Without counts every whole block has k entries, a shorter last one k_tail.
struct PackedRows {
  DType value;
  const void* values;        // [rows, kept]
  const uint8_t* positions;  // [rows, kept], or bits [rows, ceil(n / 8)]
  const uint16_t* scale;     // [rows, blocks] of int8 values
  const int16_t* counts;     // [rows, blocks], or null
  const int64_t* before;     // [rows, chunks] entries before a chunk, if there are counts
  int64_t rows, n, kept;
  int k, k_tail;
  bool bitmap;

  __device__ int64_t blocks() const { return ceil_div(n, kBlock); }
  // What counts say of a block, as far as that can be.
  __device__ int count(int64_t row, int64_t index) const {
    const int here = counts[row * blocks() + index], most = block_size(n, index);
    return here < 0 ? 0 : here < most ? here : most;
  }
};

// before [rows, chunks] of counts; a block of threads a row.
__global__ void __launch_bounds__(kTopkThreads)
    count_before_kernel(PackedRows rows, int64_t* before) {
  const int64_t blocks = rows.blocks(), chunks = ceil_div(blocks, kChunk);
  for (int64_t row = blockIdx.x; row < rows.rows; row += gridDim.x) {
    const auto sum = [&](int64_t chunk) {
      int64_t sum = 0;
      for (int64_t i = chunk * kChunk; i < blocks && i < (chunk + 1) * kChunk; ++i) {
        sum += rows.count(row, i);
      }
      return sum;
    };
    add_up_chunks(chunks, sum, before + row * chunks);
  }
}

// An entry's value, as it is in float32.
__device__ inline float entry_value(const PackedRows& rows, int64_t place, float scale) {
  switch (rows.value) {
    case DType::bf16:
      return decoded(static_cast<const BFloat16*>(rows.values)[place], scale);
    case DType::f16:
      return decoded(static_cast<const Half*>(rows.values)[place], scale);
    case DType::i8:
      return decoded(static_cast<const int8_t*>(rows.values)[place], scale);
    default:
      return static_cast<const float*>(rows.values)[place];
  }
}

// What a warp has in shared memory: a dense block, and the positions that a bitmap tells.
template <class Out>
struct alignas(16) UnpackSpace {
  Out block[kBlock];
  uint8_t positions[kBlock];
};

// Unpacks one block, `count` entries from `place` on.
template <class Out>
__device__ void unpack_block(const PackedRows& rows, int64_t row, int64_t index, int64_t place,
                             int count, UnpackSpace<Out>* space, bool aligned, Out* out) {
  const int lane = static_cast<int>(lane_of_thread()), size = block_size(rows.n, index);
  constexpr int kPieces = kBlock / kVector<Out>;
  Vector<Out, kVector<Out>> zeros;
#pragma unroll
  for (Out& each : zeros.at) each = Out{};
#pragma unroll
  for (int i = 0; i < kPieces; i += static_cast<int>(kWarp)) {
    store16(space->block + (i + lane) * kVector<Out>, zeros);
  }
  const uint8_t* positions = rows.positions + place;
  if (rows.bitmap) {
    const int64_t byte = row * ceil_div(rows.n, 8) + index * (kBlock / 8) + lane;
    const uint32_t bits = lane * 8 < size ? rows.positions[byte] : 0;
    const int own = __popc(bits), through = warp_sum_up_to(own);
    list_positions(bits, through - own, space->positions);
    positions = space->positions;
    const int set = __shfl_sync(kAllLanes, through, kWarp - 1);
    count = count < set ? count : set;
  }
  __syncwarp();
  float scale = 1;
  if (rows.value == DType::i8) scale = to_math(BFloat16{rows.scale[row * rows.blocks() + index]});
#pragma unroll 1
  for (int i = lane; i < count; i += static_cast<int>(kWarp)) {
    space->block[positions[i]] = from_math<Out>(entry_value(rows, place + i, scale));
  }
  __syncwarp();
  Out* to = out + row * rows.n + index * kBlock;
  if (aligned && size == kBlock) {
#pragma unroll
    for (int i = 0; i < kPieces; i += static_cast<int>(kWarp)) {
      const int at = (i + lane) * kVector<Out>;
      copy16(to + at, space->block + at);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < size; i += static_cast<int>(kWarp)) to[i] = space->block[i];
  }
  __syncwarp();
}

// out [rows, n]; `aligned`: whole blocks begin at 16 bytes. A warp unpacks blocks of a row that
// follow each other. Any grid of one dimension.
template <class Out>
__global__ void __launch_bounds__(kTopkThreads, 5)
    topk_unpack_kernel(PackedRows rows, bool aligned, Out* __restrict__ out) {
  MEMTL_SHARED(UnpackSpace<Out>, spaces, [kTopkWarps]);
  UnpackSpace<Out>* space = &spaces[warp_of_thread()];
  const int64_t blocks = rows.blocks(), runs = ceil_div(blocks, kRun);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTopkWarps;
  int64_t task = static_cast<int64_t>(blockIdx.x) * kTopkWarps + warp_of_thread();
  for (; task < rows.rows * runs; task += stride) {
    const int64_t row = task / runs, first = (task - row * runs) * kRun, chunk = first / kChunk;
    int own = 0;
    int64_t before = 0;
    if (rows.counts) {  // every lane has that of one block of the chunk
      const int64_t mine = chunk * kChunk + lane_of_thread();
      if (mine < blocks) own = rows.count(row, mine);
      before = rows.before[row * ceil_div(blocks, kChunk) + chunk];
    }
    const int through = warp_sum_up_to(own);
    for (int i = 0; i < kRun && first + i < blocks; ++i) {
      const int64_t index = first + i;
      int64_t start = index * rows.k;
      int count = block_size(rows.n, index) == kBlock ? rows.k : rows.k_tail;
      if (rows.counts) {
        const int lane = static_cast<int>(first - chunk * kChunk) + i;
        count = __shfl_sync(kAllLanes, own, lane);
        start = before + __shfl_sync(kAllLanes, through, lane) - count;
        start = start < rows.kept ? start : rows.kept;
        count = static_cast<int>(count < rows.kept - start ? count : rows.kept - start);
      }
      unpack_block(rows, row, index, row * rows.kept + start, count, space, aligned, out);
    }
  }
}

}  // namespace memtl::cuda
