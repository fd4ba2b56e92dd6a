// What the top-k kernels share: how a warp reads blocks of 256 numbers. One at a time, of which
// each lane has eight, or several together, of which each lane has more of one.
#pragma once

#include <cstring>

#include "cuda/prefix.cuh"

namespace memtl::cuda {

constexpr int kTopkWarps = 8;  // of a block of threads
constexpr int kTopkThreads = kTopkWarps * static_cast<int>(kWarp);
constexpr int kEach = kBlock / static_cast<int>(kWarp);  // numbers of a lane
constexpr int kRun = 4;                                  // blocks of a warp, one after the other

// The elements of block `index` of a row of n.
__device__ inline int block_size(int64_t n, int64_t index) {
  const int64_t left = n - index * kBlock;
  return static_cast<int>(left < kBlock ? left : kBlock);
}

// The bits that stand for a number of type T: those of half the width as they are, others in
// float32. As integers without the sign they are ordered as magnitudes are.
template <class T>
struct Number {
  using Bits = uint32_t;
  static constexpr uint32_t kOctave = 1u << 23;  // from a number to twice the number
};
template <>
struct Number<BFloat16> {
  using Bits = uint16_t;
  static constexpr uint32_t kOctave = 1u << 7;
};
template <>
struct Number<Half> {
  using Bits = uint16_t;
  static constexpr uint32_t kOctave = 1u << 10;
};
template <class T>
using BitsOf = typename Number<T>::Bits;

__device__ inline uint32_t number_bits(float x) { return bits_of(x); }
__device__ inline uint16_t number_bits(BFloat16 x) { return x.bits; }
__device__ inline uint16_t number_bits(Half x) { return x.bits; }
__device__ inline uint32_t number_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & ~(uint64_t{1} << 63)) <= uint64_t{0x7ff} << 52) {
    return bits_of(static_cast<float>(x));
  }
  // NaN, made quiet, with what float32 has room for: a GPU's own conversion would lose it all.
  return static_cast<uint32_t>(bits >> 32 & 0x80000000) | 0x7fc00000 |
         static_cast<uint32_t>(bits >> 29 & 0x003fffff);
}

template <class T>
__device__ inline float number_of(BitsOf<T> bits) {
  if constexpr (sizeof bits == 2) {
    return to_math(T{bits});
  } else {
    return __uint_as_float(bits);
  }
}

// Blocks together: each lane has 16 words of one of them, numbers that follow each other. So what
// is done by lane, and not by number, is done for all of them at once.
constexpr int kWords = 16;
template <class T>
constexpr int kOwn = kWords * 4 / static_cast<int>(sizeof(BitsOf<T>));  // numbers of a lane
template <class T>
constexpr int kLanes = kBlock / kOwn<T>;  // of a block
template <class T>
constexpr int kTogether = static_cast<int>(kWarp) / kLanes<T>;  // blocks of a warp

using Piece = Vector<uint32_t, 4>;
constexpr int kPieces = kWords / 4;  // of a lane

template <class Bits>
__device__ inline Piece load_piece(const Bits* from) {
  return *reinterpret_cast<const Piece*>(from);
}
template <class Bits>
__device__ inline void store_piece(Bits* to, const Piece& piece) {
  *reinterpret_cast<Piece*>(to) = piece;
}

// Where number i of a warp's blocks is in shared memory. The 16-byte pieces of a lane are exchanged
// so that the same one of eight lanes is in different banks.
template <class T>
__device__ inline int place_of(int i) {
  return i ^ (i >> 3 & 3 * kVector<BitsOf<T>>);
}

// A block while a warp reads it. Where it can be read 16 bytes at a time, a lane has numbers that
// follow each other in every piece; else number i of a lane is that at 32 * i + lane, or zero if
// there is none.
template <class T>
struct Incoming {
  using Bits = BitsOf<T>;
  static constexpr int kVector = cuda::kVector<Bits>;
  static constexpr int kPacked = 4 / static_cast<int>(sizeof(Bits));  // numbers of a word
  static constexpr int kCount = kEach / kPacked;
  uint32_t words[kCount];
  bool pieces;

  // Numbers [0, size) from x + first; `aligned` says that every block begins at 16 bytes.
  __device__ Incoming(const T* x, int64_t first, int size, bool aligned)
      : pieces(sizeof(T) == sizeof(Bits) && aligned && size % kVector == 0) {
    const int lane = static_cast<int>(lane_of_thread());
    if (pieces) {
      const Bits* from = reinterpret_cast<const Bits*>(x + first);
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const int at = (i / 4 * static_cast<int>(kWarp) + lane) * kVector;
        Piece piece = {};
        if (at < size) piece = load_piece(from + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) words[i + j] = piece.at[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        words[i] = 0;
#pragma unroll
        for (int j = 0; j < kPacked; ++j) {
          const int at = (i * kPacked + j) * static_cast<int>(kWarp) + lane;
          if (at < size) words[i] |= static_cast<uint32_t>(number_bits(x[first + at])) << 16 * j;
        }
      }
    }
  }

  // Puts it to shared memory, as one of a warp's blocks.
  __device__ void store(Bits* numbers, int block) const {
    const int first = block * kBlock + static_cast<int>(lane_of_thread()) * (pieces ? kVector : 1);
    if (pieces) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        store_piece(numbers + place_of<T>(first + i / 4 * static_cast<int>(kWarp) * kVector),
                    {{words[i], words[i + 1], words[i + 2], words[i + 3]}});
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        numbers[place_of<T>(first + i * static_cast<int>(kWarp))] =
            static_cast<Bits>(words[i / kPacked] >> i % kPacked * 16);
      }
    }
  }
};

// What comes next of rows of n.
struct Place {
  int64_t n, element, left_in_row;
};

// What a warp has together, and a lane of it.
struct Together {
  int bytes;         // of all bitmaps
  int size;          // of this lane's block; 0 if there is none
  int bytes_before;  // of bitmaps, before that of this lane's block
};

// Reads the next blocks, `left` at most, to shared memory, those that are not there as zeros.
template <class T>
__device__ Together read_blocks(const T* x, Place* at, int64_t left, bool aligned,
                                BitsOf<T>* numbers) {
  using Bits = BitsOf<T>;
  constexpr int kBlocks = kTogether<T>, kAll = kBlocks * kBlock;
  const int lane = static_cast<int>(lane_of_thread()), mine = lane / kLanes<T>;
  Together read = {kAll / 8, kBlock, mine * (kBlock / 8)};
  if (sizeof(T) == sizeof(Bits) && aligned && at->left_in_row >= kAll && left >= kBlocks) {
    const auto* from = reinterpret_cast<const Bits*>(x + at->element) + lane * kVector<Bits>;
    constexpr int kStep = static_cast<int>(kWarp) * kVector<Bits>;
    Piece pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = load_piece(from + i * kStep);
    Bits* to = numbers + place_of<T>(lane * kVector<Bits>);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) store_piece(to + i * kStep, pieces[i]);
    at->element += kAll;
    at->left_in_row = at->left_in_row > kAll ? at->left_in_row - kAll : at->n;
  } else {
    read = {};
#pragma unroll 1
    for (int i = 0; i < kBlocks; ++i) {
      const int size = i < left ? block_size(at->left_in_row, 0) : 0;
      Incoming<T>(x, at->element, size, aligned).store(numbers, i);
      if (i == mine) {
        read.size = size;
        read.bytes_before = read.bytes;
      }
      read.bytes += (size + 7) / 8;
      at->element += size;
      at->left_in_row = at->left_in_row > kBlock ? at->left_in_row - kBlock : at->n;
    }
  }
  __syncwarp();
  return read;
}

// The sum over this lane and those before it, of every kWide lanes.
template <int kWide>
__device__ inline int sum_up_to(int x) {
#pragma unroll
  for (int step = 1; step < kWide; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, static_cast<unsigned>(step), kWide);
    if (static_cast<int>(lane_of_thread()) % kWide >= step) x += below;
  }
  return x;
}

// Puts the positions of this lane's set bits to their places among those of the warp.
__device__ inline void list_positions(uint32_t bits, int before, uint8_t* positions) {
  const unsigned first = lane_of_thread() * kEach;
  positions += before;
#pragma unroll
  for (unsigned i = 0; i < kEach; ++i) {
    if (bits >> i & 1) *positions++ = static_cast<uint8_t>(first + i);
  }
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

}  // namespace memtl::cuda
