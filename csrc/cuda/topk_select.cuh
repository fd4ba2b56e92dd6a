// The k largest magnitudes of each of a warp's blocks.
//
// They are found by counting how many keys are at or above a threshold, for all blocks of the warp
// at once. The search begins at the threshold of the block before: those of neighbouring blocks are
// mostly near each other.
#pragma once

#include "cuda/topk_keys.cuh"

namespace memtl::cuda {

// Every key at or above `least` is taken, and of those equal to least - 1 the first `ties`.
struct Cut {
  uint32_t least;
  int ties;
};

// join() over the lanes of a block.
template <class T, class Join>
__device__ inline uint32_t over_block(uint32_t x, const Join& join) {
#pragma unroll
  for (int i = kLanes<T> / 2; i > 0; i /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, i));
  return x;
}

__device__ inline uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }
__device__ inline int larger_signed(uint32_t x, uint32_t y) {
  return static_cast<int>(x) > static_cast<int>(y) ? static_cast<int>(x) : static_cast<int>(y);
}
__device__ inline uint32_t smaller(uint32_t x, uint32_t y) { return x < y ? x : y; }

template <class T>
__device__ inline unsigned count_block(const Keys<T>& keys, uint32_t least) {
  // Before it is added up the count of 16-bit keys is two, of the halves of words.
  const auto add = [](uint32_t x, uint32_t y) { return x + y; };
  return Keys<T>::added(over_block<T>(keys.count(least), add));
}

// The largest finite key of a block, or 0.
template <class T>
__device__ inline uint32_t largest_finite(const Keys<T>& keys) {
  return over_block<T>(keys.largest_finite(), larger);
}

// Moves lo and hi to the keys of the block that are in [lo, hi), if there are any.
template <class T>
__device__ void tighten(const Keys<T>& keys, uint32_t* lo, uint32_t* hi) {
  uint32_t least, most;
  keys.range(*lo, *hi, &least, &most);
  least = over_block<T>(least, smaller);
  most = over_block<T>(most, larger);
  *lo = larger(least < *hi ? least : 0, *lo);
  *hi = least < *hi ? most + 1 : *hi;
}

// The k largest keys of a block; lanes of different blocks may ask for different k. `guess` is
// about where the cut may be, 1 or more, and becomes where it is.
template <class T>
__device__ Cut find_cut(const Keys<T>& keys, unsigned k, uint32_t* guess) {
  constexpr uint32_t kEnd = Keys<T>::kEnd, kOctave = Number<T>::kOctave;
  constexpr int kPatience = 12;  // rounds, before it looks whether many keys are equal
  // k keys or more are at or above lo; k or fewer, `above`, are at or above hi. Where the cut is
  // found while other blocks' lanes go on, it stays one.
  uint32_t lo = 0, hi = kEnd, at = *guess;
  uint32_t spacing = kOctave / 64;  // about what lies between a key and the next, and then more
  unsigned above = 0;
  for (int round = 0; __any_sync(kAllLanes, above != k && hi - lo > 1); ++round) {
    const unsigned count = count_block(keys, at);
    lo = count > k ? at : lo;
    hi = count > k ? hi : at;
    above = count > k ? above : count;
    if constexpr (sizeof(BitsOf<T>) == 4) {  // of 16 bits few are left in any case
      if (round >= kPatience) tighten(keys, &lo, &hi);
    }
    // On by what the count is off, if that is between lo and hi, else to the middle of what there
    // is of eight octaves below hi.
    const auto floor = static_cast<uint32_t>(larger_signed(hi - 8 * kOctave, lo));
    const uint32_t middle = floor + (hi - floor + 1) / 2;
    at += (count - k) * spacing;
    at = at > lo && at < hi ? at : middle;
    spacing *= 2;
  }
  if (k > 0) *guess = hi < kEnd ? hi : lo;
  return {hi, static_cast<int>(k - above)};
}

// The lane's numbers that a cut takes, as bits.
template <class T>
__device__ uint32_t chosen(const Keys<T>& keys, Cut cut) {
  uint32_t bits = keys.bits(cut.least);
  if (__any_sync(kAllLanes, cut.ties > 0)) {
    const uint32_t equal = keys.bits(cut.least - 1) & ~bits;
    const int count = __popc(equal);
    int left = cut.ties - (sum_up_to<kLanes<T>>(count) - count);
    uint32_t others = left < count ? equal : 0;
    for (; left > 0 && others != 0; --left) others &= others - 1;
    bits |= equal ^ others;
  }
  return bits;
}

}  // namespace memtl::cuda
