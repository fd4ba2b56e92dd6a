// The k largest magnitudes of a block, by a warp.
//
// They are found by counting how many keys are at or above a threshold. The search begins at the
// threshold of the block before: those of neighbouring blocks are mostly near each other.
#pragma once

#include "cuda/topk_block.cuh"

namespace memtl::cuda {

// The keys of a lane: bits of |x|, by which magnitudes are ordered. Those of 16 bits are two a
// word.
template <class T, class Bits = BitsOf<T>>
class Keys;

template <class T>
class Keys<T, uint32_t> {
 public:
  static constexpr uint32_t kEnd = 0x80000000;  // beyond every key

  template <int kPiece, int kPieces>
  __device__ explicit Keys(const Vector<uint32_t, kPiece> (&pieces)[kPieces]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) key_[i] = pieces[i / kPiece].at[i % kPiece] & 0x7fffffff;
  }

  __device__ uint32_t at(int i) const { return key_[i]; }

  __device__ unsigned count(uint32_t least) const {
    unsigned below = 0;  // the difference has no sign else: a key has 31 bits
#pragma unroll
    for (int i = 0; i < kEach; ++i) below += (key_[i] - least) >> 31;
    return kEach - below;
  }

  // One bit a key.
  __device__ uint32_t bits(uint32_t least) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) bits |= static_cast<uint32_t>(key_[i] >= least) << i;
    return bits;
  }

  __device__ uint32_t largest() const {
    uint32_t largest = key_[0];
#pragma unroll
    for (int i = 1; i < kEach; ++i) largest = key_[i] > largest ? key_[i] : largest;
    return largest;
  }

  // Moves lo and hi to the keys of the warp that are in [lo, hi), of which there is one.
  __device__ void tighten(uint32_t* lo, uint32_t* hi) const {
    uint32_t least = kEnd, most = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (key_[i] >= *lo && key_[i] < *hi) {
        least = key_[i] < least ? key_[i] : least;
        most = key_[i] > most ? key_[i] : most;
      }
    }
    *lo = __reduce_min_sync(kAllLanes, least);
    *hi = __reduce_max_sync(kAllLanes, most) + 1;
  }

 private:
  uint32_t key_[kEach];
};

template <class T>
class Keys<T, uint16_t> {
 public:
  static constexpr uint32_t kEnd = 0x8000;

  template <int kPiece, int kPieces>
  __device__ explicit Keys(const Vector<uint16_t, kPiece> (&pieces)[kPieces]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t low = pieces[0].at[2 * i], high = pieces[0].at[2 * i + 1];
      words_[i] = (low | high << 16) & 0x7fff7fff;
      if constexpr (Number<T>::kOctave == Number<Half>::kOctave) {
        // In float32 NaN would be quiet.
        words_[i] |= at_least(words_[i], 0x7c01) >> 6;
      }
    }
  }

  __device__ uint32_t at(int i) const { return words_[i / 2] >> (i % 2 * 16) & 0xffff; }

  __device__ unsigned count(uint32_t least) const {
    uint32_t found = 0;  // eight bits, anywhere
#pragma unroll
    for (int i = 0; i < kWords; ++i) found |= at_least(words_[i], least) >> i;
    return static_cast<unsigned>(__popc(found));
  }

  __device__ uint32_t bits(uint32_t least) const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) found |= at_least(words_[i], least) >> (15 - 2 * i);
    return (found | found >> 15) & 0xff;
  }

  __device__ uint32_t largest() const {
    uint32_t largest = 0;  // in the upper half; what is below it does not matter
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t low = words_[i] << 16;
      largest = words_[i] > largest ? words_[i] : largest;
      largest = low > largest ? low : largest;
    }
    return largest >> 16;
  }

  __device__ void tighten(uint32_t*, uint32_t*) const {}  // few rounds are left in any case

 private:
  static constexpr int kWords = kEach / 2;

  // The upper bit of each half says whether its key is at or above the threshold: both have 15
  // bits, so no sum is carried into the other half.
  static __device__ uint32_t at_least(uint32_t word, uint32_t least) {
    return (word + (0x8000 - least) * 0x00010001) & 0x80008000;
  }

  uint32_t words_[kWords];
};

// The keys of a lane's own numbers, in order of position, of a block in shared memory.
template <class T>
__device__ Keys<T> own_keys(const BitsOf<T>* block) {
  constexpr int kPiece = kVector<BitsOf<T>>;
  Vector<BitsOf<T>, kPiece> own[kEach / kPiece];
#pragma unroll
  for (int i = 0; i < kEach / kPiece; ++i) {
    own[i] = load16(block + lane_of_thread() * kEach + i * kPiece);
  }
  return Keys<T>(own);
}

// Every key at or above `least` is taken, and of those equal to least - 1 the first `ties`.
struct Cut {
  uint32_t least;
  int ties;
};

// The k largest keys of a warp; `guess` is about where the cut may be, or 0, and becomes where it
// is.
template <class T>
__device__ Cut find_cut(const Keys<T>& keys, unsigned k, uint32_t* guess) {
  constexpr uint32_t kEnd = Keys<T>::kEnd, kOctave = Number<T>::kOctave;
  constexpr int kSteps = 8;      // rounds, before the middle is taken
  constexpr int kPatience = 12;  // rounds, before it looks whether many keys are equal
  if (k == 0) return {kEnd, 0};
  if (*guess == 0) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, keys.largest());
    *guess = largest > kOctave ? largest - kOctave : 1;
  }
  // k keys or more are at or above lo; fewer than k, `above`, are at or above hi.
  uint32_t lo = 0, hi = kEnd, at = *guess;
  uint32_t spacing = kOctave / 64;  // about what lies between a key and the next, and then more
  unsigned above = 0;
  for (int round = 0; hi - lo > 1; ++round) {
    const unsigned count = __reduce_add_sync(kAllLanes, keys.count(at));
    if (count == k) {
      *guess = at;
      return {at, 0};
    }
    lo = count > k ? at : lo;
    hi = count > k ? hi : at;
    above = count > k ? above : count;
    if (round >= kPatience) keys.tighten(&lo, &hi);
    at += (count - k) * spacing;
    spacing *= 2;
    if (at <= lo || at >= hi || round >= kSteps) {
      at = lo > 0 ? lo + (hi - lo) / 2 : hi > 4 * kOctave ? hi - 4 * kOctave : 1;
    }
  }
  *guess = hi < kEnd ? hi : lo;
  return {hi, static_cast<int>(k - above)};
}

// The lane's numbers that a cut takes, as bits.
template <class T>
__device__ uint32_t chosen(const Keys<T>& keys, Cut cut) {
  uint32_t bits = keys.bits(cut.least);
  if (cut.ties > 0) {
    uint32_t equal = keys.bits(cut.least - 1) & ~bits;
    const int count = __popc(equal);
    int left = cut.ties - (warp_sum_up_to(count) - count);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (equal >> i & 1 && left-- > 0) bits |= 1u << i;
    }
  }
  return bits;
}

}  // namespace memtl::cuda
