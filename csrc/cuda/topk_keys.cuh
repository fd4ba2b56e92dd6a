// The keys of a lane: bits of |x|, by which magnitudes are ordered. Those of 16 bits are two a
// word, and are handled two at a time.
#pragma once

#include "cuda/topk_block.cuh"

namespace memtl::cuda {

// 1 for each key at or above `least`, else 0, in place of the key. Keys are below 2^31, and halves
// of words below 2^15; `least` is 1 or more, and that at most.
__device__ inline uint32_t reached_of_word(uint32_t key, uint32_t least) {
  return 1 - ((key - least) >> 31);
}
__device__ inline uint32_t reached_of_halves(uint32_t keys, uint32_t least) {
  return (keys + (0x8000 - least) * 0x00010001) >> 15 & 0x00010001;
}

// The same, on GPUs that have one instruction for it.
__device__ inline uint32_t reached_at_once(uint32_t key, uint32_t least) {
  return static_cast<uint32_t>(
      __viaddmin_s32_relu(static_cast<int>(key), static_cast<int>(1 - least), 1));
}
__device__ inline uint32_t reached_at_once_of_halves(uint32_t keys, uint32_t least) {
  const uint32_t less = 1 - least;
  return __viaddmin_s16x2_relu(keys, (less & 0xffff) | less << 16, 0x00010001);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kAtOnce = false;
#else
constexpr bool kAtOnce = true;
#endif

// Has x in a register: nvcc would rather compute it again at every use.
__device__ inline void keep(uint32_t& x) { asm("" : "+r"(x)); }

template <class T, int kCount = kWords, class Bits = BitsOf<T>>
class Keys;

template <class T, int kCount>
class Keys<T, kCount, uint32_t> {
 public:
  static constexpr uint32_t kEnd = 0x80000000;  // beyond every key

  __device__ explicit Keys(const uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      key_[i] = words[i] & 0x7fffffff;
      keep(key_[i]);
    }
  }

  __device__ uint32_t at(int i) const { return key_[i]; }

  // How many are at or above `least`; added() makes the count out of a sum of such.
  __device__ unsigned count(uint32_t least) const {
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += reached(key_[i], least);
    return sum;
  }
  static __device__ unsigned added(unsigned sum) { return sum; }

  // One bit for each that is at or above `least`.
  __device__ uint32_t bits(uint32_t least) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) bits = 2 * bits + reached(key_[i], least);
    return least > 0 ? bits : (1u << kCount) - 1;
  }

  // The largest that is finite, or 0.
  __device__ uint32_t largest_finite() const {
    constexpr uint32_t kBeyond = 0x00800000;  // makes what is not finite negative
    int largest = kBeyond;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto key = static_cast<int>(key_[i] + kBeyond);
      largest = key > largest ? key : largest;
    }
    return static_cast<uint32_t>(largest) - kBeyond;
  }

  // The least and the largest of those in [lo, hi); kEnd and 0 if there are none.
  __device__ void range(uint32_t lo, uint32_t hi, uint32_t* least, uint32_t* most) const {
    *least = kEnd;
    *most = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (key_[i] >= lo && key_[i] < hi) {
        *least = key_[i] < *least ? key_[i] : *least;
        *most = key_[i] > *most ? key_[i] : *most;
      }
    }
  }

 private:
  static __device__ uint32_t reached(uint32_t key, uint32_t least) {
    return kAtOnce ? reached_at_once(key, least) : reached_of_word(key, least);
  }

  uint32_t key_[kCount];
};

template <class T, int kCount>
class Keys<T, kCount, uint16_t> {
 public:
  static constexpr uint32_t kEnd = 0x8000;

  __device__ explicit Keys(const uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      words_[i] = words[i] & 0x7fff7fff;
      if constexpr (Number<T>::kOctave == Number<Half>::kOctave) {
        words_[i] |= reached(words_[i], 0x7c01) << 9;  // in float32 NaN would be quiet
      }
      keep(words_[i]);
    }
  }

  __device__ uint32_t at(int i) const { return words_[i / 2] >> (i % 2 * 16) & 0xffff; }

  __device__ unsigned count(uint32_t least) const {
    unsigned sum = 0;  // of each half
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += reached(words_[i], least);
    return sum;
  }
  static __device__ unsigned added(unsigned sum) { return (sum & 0xffff) + (sum >> 16); }

  __device__ uint32_t bits(uint32_t least) const {
    static_assert(kCount == 16);
    uint32_t sixteen[2] = {0, 0};
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      uint32_t& bits = sixteen[i / 8];
      bits = 4 * bits + reached(words_[i], least);
    }
    // In each the lower halves of words gave the even bits from 0 on, the upper ones those from 16.
    const uint32_t first = (sixteen[0] | sixteen[0] >> 15) & 0xffff;
    const uint32_t second = (sixteen[1] << 16 | sixteen[1] << 1) & 0xffff0000;
    return least > 0 ? first | second : 0xffffffff;
  }

  __device__ uint32_t largest_finite() const {
    constexpr uint32_t kBeyond = Number<T>::kOctave;
    uint32_t largest = kBeyond * 0x00010001;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest = __viaddmax_s16x2(words_[i], kBeyond * 0x00010001, largest);
    }
    const uint32_t low = largest & 0xffff, high = largest >> 16;
    return (low > high ? low : high) - kBeyond;
  }

 private:
  static __device__ uint32_t reached(uint32_t keys, uint32_t least) {
    return kAtOnce ? reached_at_once_of_halves(keys, least) : reached_of_halves(keys, least);
  }

  uint32_t words_[kCount];
};

// The keys of a lane's own numbers, in order of position, of blocks in shared memory.
template <class T>
__device__ Keys<T> own_keys(const BitsOf<T>* numbers) {
  uint32_t words[kWords];
  const int first = place_of<T>(static_cast<int>(lane_of_thread()) * kOwn<T>);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const Piece piece = load_piece(numbers + (first ^ i * kVector<BitsOf<T>>));
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * i + j] = piece.at[j];
  }
  return Keys<T>(words);
}

}  // namespace memtl::cuda
