// Device code of topk_pack, and how every kernel that packs writes a block.
#pragma once

#include "cpu/topk_pack.h"
#include "cuda/topk_select.cuh"

namespace memtl::cuda {

// What a warp has in shared memory. Entries wait until there are many, so that they are written 16
// bytes at a time; with each array begins the 16 bytes of memory that its first entry falls into.
template <class T>
struct alignas(16) PackSpace {
  static constexpr int kBytes = kBlock * 4;  // a block of any values
  BitsOf<T> block[kBlock];
  unsigned char values[kBytes + 16];
  unsigned char positions[kBytes + 16];
};

// The first byte of shared memory for what goes to `to`.
__device__ inline int skipped(const void* to) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16);
}

// Copies bytes from where they have waited.
__device__ inline void write_bytes(void* to, const unsigned char* waiting, int count) {
  const int lane = static_cast<int>(lane_of_thread());
  const int first = skipped(to), end = first + count;
  unsigned char* base = static_cast<unsigned char*>(to) - first;
  const int whole = first > 0 ? 16 : 0, whole_end = end / 16 * 16;
#pragma unroll 1
  for (int at = whole + lane * 16; at < whole_end; at += static_cast<int>(kWarp) * 16) {
    store16(base + at, load16(waiting + at));
  }
  // The bytes before and behind.
  const int edge = lane < 16 ? lane : whole_end + lane - 16;
  const bool before = lane < 16 && first > 0, behind = lane >= 16 && (whole_end > 0 || first == 0);
  if ((before || behind) && edge >= first && edge < end) base[edge] = waiting[edge];
}

// A warp's entries on their way to memory. Those of blocks that are added one after the other must
// follow each other there too.
template <class T>
class Writer {
 public:
  __device__ Writer(const TopkOutput& out, int64_t n, PackSpace<T>* space)
      : out_(out), n_(n), space_(space) {}

  // The numbers that are bits, of block `index` of row `row`, whose first entry has place `start`
  // in its row. The block is in shared memory; all lanes may read it.
  __device__ void add(uint32_t bits, int64_t row, int64_t index, int64_t start) {
    const int lane = static_cast<int>(lane_of_thread());
    const int own = __popc(bits), through = warp_sum_up_to(own);
    const int count = __shfl_sync(kAllLanes, through, kWarp - 1);
    if ((waiting_ + count) * static_cast<int>(size_of(out_.value)) > PackSpace<T>::kBytes) flush();
    if (waiting_ == 0) place_ = row * out_.kept + start;
    // With a bitmap the positions do not wait: they are needed for the values alone.
    unsigned char* positions = space_->positions;
    if (!out_.bitmap) positions += skipped(out_.positions + place_) + waiting_;
    list_positions(bits, through - own, positions);
    __syncwarp();
    const int64_t block = row * ceil_div(n_, kBlock) + index;
    if (out_.value == DType::i8) {
      const float scale = scale_of(positions, count);
      encode(positions, count, scale);
      if (lane == 0) out_.scale[block] = static_cast<uint16_t>(bits_of(scale) >> 16);
    } else {
      store_values(positions, count);
    }
    if (out_.bitmap && lane * 8 < n_ - index * kBlock) {
      out_.positions[row * ceil_div(n_, 8) + index * (kBlock / 8) + lane] =
          static_cast<uint8_t>(bits);
    }
    if (out_.counts && lane == 0) out_.counts[block] = static_cast<int16_t>(count);
    waiting_ += count;
    __syncwarp();  // block and bitmap's positions may be overwritten
  }

  __device__ void flush() {
    if (waiting_ == 0) return;
    __syncwarp();
    const int size = static_cast<int>(size_of(out_.value));
    write_bytes(static_cast<char*>(out_.values) + place_ * size, space_->values, waiting_ * size);
    if (!out_.bitmap) write_bytes(out_.positions + place_, space_->positions, waiting_);
    waiting_ = 0;
    __syncwarp();
  }

 private:
  // Where entry i of the block at hand waits.
  template <class Value>
  __device__ Value* value_at(int i) const {
    const auto* to = static_cast<const Value*>(out_.values) + place_;
    return reinterpret_cast<Value*>(space_->values + skipped(to)) + waiting_ + i;
  }

  template <class Value>
  __device__ void store_as(const unsigned char* positions, int count) const {
#pragma unroll 1
    for (int i = static_cast<int>(lane_of_thread()); i < count; i += static_cast<int>(kWarp)) {
      *value_at<Value>(i) = from_math<Value>(number_of<T>(space_->block[positions[i]]));
    }
  }

  __device__ void store_values(const unsigned char* positions, int count) const {
    switch (out_.value) {
      case DType::bf16:
        return store_as<BFloat16>(positions, count);
      case DType::f16:
        return store_as<Half>(positions, count);
      default:
        return store_as<float>(positions, count);
    }
  }

  // The scale of int8 codes: the largest finite magnitude over 126, rounded up to bfloat16.
  __device__ float scale_of(const unsigned char* positions, int count) const {
    uint32_t largest = 0;
#pragma unroll 1
    for (int i = static_cast<int>(lane_of_thread()); i < count; i += static_cast<int>(kWarp)) {
      const uint32_t size = bits_of(number_of<T>(space_->block[positions[i]])) & 0x7fffffff;
      if (size < 0x7f800000 && size > largest) largest = size;
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    const uint32_t step = bits_of(__uint_as_float(largest) / 126.0f);
    const uint32_t scale = (step + 0xffff) & 0xffff0000;
    return __uint_as_float(scale > 0x00800000 ? scale : 0x00800000);
  }

  __device__ void encode(const unsigned char* positions, int count, float scale) const {
    const float rounder = 12582912.0f;  // 1.5 * 2^23: its sum with a small number is whole
#pragma unroll 1
    for (int i = static_cast<int>(lane_of_thread()); i < count; i += static_cast<int>(kWarp)) {
      const float x = number_of<T>(space_->block[positions[i]]);
      const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
      uint32_t code = bits_of(x / scale + rounder);
      if (size == 0x7f800000) code = bits == size ? 127 : 0x81;
      if (size > 0x7f800000) code = 0x80;
      *value_at<uint8_t>(i) = static_cast<uint8_t>(code);
    }
  }

  const TopkOutput& out_;
  int64_t n_;
  PackSpace<T>* space_;
  int waiting_ = 0;
  int64_t place_ = 0;  // of the first that waits
};

// The k largest magnitudes of every block of 256 of x [rows, n], k_tail of a shorter last one;
// `aligned`: whole blocks begin at 16 bytes. Any grid of one dimension of kTopkThreads threads.
template <class T>
__global__ void __launch_bounds__(kTopkThreads, 5)
    topk_pack_kernel(const T* __restrict__ x, int64_t rows, int64_t n, int k, int k_tail,
                     bool aligned, TopkOutput out) {
  MEMTL_SHARED(PackSpace<T>, spaces, [kTopkWarps]);
  PackSpace<T>* space = &spaces[warp_of_thread()];
  Writer<T> writer(out, n, space);
  const int64_t blocks = ceil_div(n, kBlock), all = rows * blocks;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTopkWarps * kRun;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kTopkWarps + warp_of_thread()) * kRun;
  uint32_t guess = 0;
  for (; first < all; first += stride) {
    int64_t row = first / blocks, index = first - row * blocks;
    for (int i = 0; i < kRun && first + i < all; ++i) {
      const int size = block_size(n, index);
      Incoming<T>(x, row * n + index * kBlock, size, aligned).store(space->block);
      __syncwarp();
      const Keys<T> keys = own_keys<T>(space->block);
      const Cut cut = find_cut(keys, static_cast<unsigned>(size == kBlock ? k : k_tail), &guess);
      writer.add(chosen(keys, cut), row, index, index * k);
      index = index + 1 < blocks ? index + 1 : 0;
      row += index == 0;
    }
    writer.flush();
  }
}

}  // namespace memtl::cuda
