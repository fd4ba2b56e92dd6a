// Device code of topk_pack, and how every kernel that packs writes blocks.
#pragma once

#include "cpu/topk_pack.h"
#include "cuda/topk_select.cuh"

namespace memtl::cuda {

// What int8 codes of a block are divided by. The quotient is rounded as that of a division: a
// product with the reciprocal, and what that leaves of the number once more (Markstein). `up`, a
// power of two, keeps what is left from being too small for float32.
struct alignas(16) Divisor {
  float scale, reciprocal, up;

  __device__ static Divisor of(float scale) {
    const float up = scale < 0x1p-60f ? 0x1p60f : 1.0f;
    return {scale * up, 1.0f / (scale * up), up};
  }
  __device__ float divide(float x) const {
    x *= up;
    const float near = x * reciprocal;
    return fmaf(fmaf(-near, scale, x), reciprocal, near);
  }
};

// What a warp has in shared memory.
template <class T>
struct alignas(16) PackSpace {
  BitsOf<T> numbers[kTogether<T> * kBlock];
  uint16_t entries[kTogether<T> * kBlock];  // which of the numbers are kept
  Divisor divisors[kTogether<T>];
};

// The scale of int8 codes: the largest finite magnitude over 126, rounded up to bfloat16.
__device__ inline float scale_for(float largest) {
  constexpr Divisor kLevels = {126.0f, 1.0f / 126.0f, 1.0f};
  const uint32_t scale = (bits_of(kLevels.divide(largest)) + 0xffff) & 0xffff0000;
  return __uint_as_float(scale > 0x00800000 ? scale : 0x00800000);
}

__device__ inline uint8_t code_of(float x, const Divisor& divisor) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: its sum with a small number is whole
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
  uint32_t code = bits_of(divisor.divide(x) + rounder);
  if (size >= 0x7f800000) code = size > 0x7f800000 ? 0x80 : bits == size ? 127 : 0x81;
  return static_cast<uint8_t>(code);
}

// The entry that number i of a warp's blocks is.
template <class T, class Value>
__device__ inline Value entry_of(const PackSpace<T>& space, int i) {
  const float x = number_of<T>(space.numbers[place_of<T>(i)]);
  if constexpr (sizeof(Value) == 1) {
    return code_of(x, space.divisors[i / kBlock]);
  } else {
    return from_math<Value>(x);
  }
}

template <class T, class Value>
__device__ void write_entries(const PackSpace<T>& space, int count, const TopkOutput& out,
                              int64_t place) {
  const int lane = static_cast<int>(lane_of_thread()), warp = static_cast<int>(kWarp);
  const uint16_t* entry = space.entries + lane;
  auto* value = static_cast<Value*>(out.values) + place + lane;
  uint8_t* position = out.positions + place + lane;
  // Four of a lane at once, so that most addresses are the first one's.
#pragma unroll 1
  for (int left = count - lane; left > 0; left -= 4 * warp) {
#pragma unroll
    for (int i = 0; i < 4 * warp; i += warp) {
      if (i >= left) break;
      const int number = entry[i];
      value[i] = entry_of<T, Value>(space, number);
      if (!out.bitmap) position[i] = static_cast<uint8_t>(number);
    }
    entry += 4 * warp;
    value += 4 * warp;
    position += 4 * warp;
  }
}

template <class T>
__device__ void write_values(const PackSpace<T>& space, int count, const TopkOutput& out,
                             int64_t place) {
  switch (out.value) {
    case DType::bf16:
      return write_entries<T, BFloat16>(space, count, out, place);
    case DType::f16:
      return write_entries<T, Half>(space, count, out, place);
    default:
      return write_entries<T, float>(space, count, out, place);
  }
}

// Where what a warp has together goes.
struct Destination {
  int64_t block;  // the first one's place among all blocks
  int64_t entry;  // its first entry's
  int64_t byte;   // its bitmap's
};

// Finds the scales of int8 codes, and writes them.
template <class T>
__device__ void write_scales(const Keys<T>& keys, Cut cut, bool there, PackSpace<T>* space,
                             uint16_t* scales) {
  const int lane = static_cast<int>(lane_of_thread()), block = lane / kLanes<T>;
  // The largest finite one is chosen unless enough are not finite.
  const uint32_t key = largest_finite(keys);
  const bool is_chosen = key + (cut.ties > 0) >= cut.least;
  const float scale = scale_for(number_of<T>(static_cast<BitsOf<T>>(is_chosen ? key : 0)));
  if (lane % kLanes<T> == 0) {
    space->divisors[block] = Divisor::of(scale);
    if (there) scales[block] = static_cast<uint16_t>(bits_of(scale) >> 16);
  }
}

// Writes the chosen ones of this lane's numbers, and says how many are all lanes'. The blocks are
// in shared memory, and their entries follow each other.
template <class T>
__device__ int write_blocks(const Keys<T>& keys, Cut cut, const Together& read,
                            const Destination& to, PackSpace<T>* space, const TopkOutput& out) {
  constexpr int kLane = kLanes<T>;
  const int lane = static_cast<int>(lane_of_thread()), within = lane % kLane;
  const uint32_t bits = chosen(keys, cut);
  const int own = __popc(bits), up_to = sum_up_to<static_cast<int>(kWarp)>(own);
  const int count = __shfl_sync(kAllLanes, up_to, static_cast<int>(kWarp) - 1);
  uint16_t* entry = space->entries + up_to;
#pragma unroll 4
  for (uint32_t rest = bits; rest != 0;) {  // from the last one on
    const int last = 31 - __clz(static_cast<int>(rest));
    rest ^= 1u << last;
    *--entry = static_cast<uint16_t>(lane * kOwn<T> + last);
  }
  if (out.bitmap) {
    uint8_t* bytes = out.positions + to.byte + read.bytes_before;
#pragma unroll
    for (int i = 0; i < kOwn<T> / 8; ++i) {
      const int byte = within * (kOwn<T> / 8) + i;
      if (byte * 8 < read.size) bytes[byte] = static_cast<uint8_t>(bits >> 8 * i);
    }
  }
  if (out.counts) {
    const int last = __shfl_sync(kAllLanes, up_to, lane | (kLane - 1));
    const int before = __shfl_sync(kAllLanes, up_to - own, lane - within);
    if (within == 0 && read.size > 0) {
      out.counts[to.block + lane / kLane] = static_cast<int16_t>(last - before);
    }
  }
  if (out.value == DType::i8) {
    write_scales(keys, cut, read.size > 0, space, out.scale + to.block);
    __syncwarp();
    write_entries<T, uint8_t>(*space, count, out, to.entry);
  } else {
    __syncwarp();
    write_values(*space, count, out, to.entry);
  }
  __syncwarp();  // blocks and entries may be overwritten
  return count;
}

// The k largest magnitudes of every block of 256 of x [rows, n], k_tail of a shorter last one;
// `aligned`: whole blocks begin at 16 bytes. A warp takes `run` times as many blocks as it has
// together. Any grid of one dimension of kTopkThreads threads.
template <class T>
__global__ void __launch_bounds__(kTopkThreads, 4)
    topk_pack_kernel(const T* __restrict__ x, int64_t rows, int64_t n, int k, int k_tail,
                     bool aligned, int run, TopkOutput out) {
  MEMTL_SHARED(PackSpace<T>, spaces, [kTopkWarps]);
  PackSpace<T>* space = &spaces[warp_of_thread()];
  const int64_t blocks = ceil_div(n, kBlock), all = rows * blocks;
  const int64_t each = int64_t{run} * kTogether<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTopkWarps * each;
  uint32_t guess = 0;
  int64_t begin = (static_cast<int64_t>(blockIdx.x) * kTopkWarps + warp_of_thread()) * each;
  for (; begin < all; begin += stride) {
    const int64_t row = begin / blocks, index = begin - row * blocks;
    Place at = {n, row * n + index * kBlock, n - index * kBlock};
    Destination to = {begin, row * out.kept + index * k,
                      row * ceil_div(n, 8) + index * (kBlock / 8)};
    auto left = static_cast<int>(all - begin < each ? all - begin : each);
    for (; left > 0; left -= kTogether<T>) {
      const Together read = read_blocks(x, &at, left, aligned, space->numbers);
      const int own_k = read.size == kBlock ? k : read.size > 0 ? k_tail : 0;
      const Keys<T> keys = own_keys<T>(space->numbers);
      if (guess == 0) {
        const uint32_t largest = largest_finite(keys);
        guess = largest > Number<T>::kOctave ? largest - Number<T>::kOctave : 1;
      }
      const Cut cut = find_cut(keys, static_cast<unsigned>(own_k), &guess);
      to.entry += write_blocks(keys, cut, read, to, space, out);
      to.block += kTogether<T>;
      to.byte += read.bytes;
    }
  }
}

}  // namespace memtl::cuda
