// Device code of threshold_magnitude and threshold_mask.
//
// The bits of |x|, read as a number, are in the order of the magnitudes: that is an element's key;
// NaN has the first one behind infinity's. Key is the unsigned integer of an element's size, and
// `infinite` the key of infinity.
//
// The k-th largest key is found digit by digit, from the top. The first digit has as many bits as
// counts fit into shared memory, so that few keys begin with it, and the next ones are counted in
// global memory, of those keys alone. Each digit is one reading of all tensors and one block that
// chooses it; what is found stays on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/prefix.cuh"
#include "cuda/tile.cuh"

namespace memtl::cuda {

using Count = unsigned long long;  // what atomicAdd takes

template <class Key>
__device__ inline Key key_of(Key bits, Key infinite) {
  const Key key = bits & static_cast<Key>(static_cast<Key>(~0ull) >> 1);
  return key <= infinite ? key : static_cast<Key>(infinite + 1);
}

// ------------------------------------------------------------------------------ the magnitude

// A digit of a key: `width` bits above `shift` others.
struct Digit {
  int shift, width;
};

// The digits of a key of so many bits; counts of the first one fit into `room` bytes.
inline std::vector<Digit> digits_of(int bits, int64_t room) {
  constexpr int kWidest = 17;  // whose counts in global memory are 1 MB
  int width = bits;
  while (room >> width < int64_t{sizeof(unsigned)}) --width;
  std::vector<Digit> digits{{bits - width, width}};
  while (digits.back().shift > 0) {
    const int left = digits.back().shift;
    width = left < kWidest ? left : kWidest;
    digits.push_back({left - width, width});
  }
  return digits;
}

// Some of the tensors, by value: a kernel's parameters are 4 KB at most. Each is cut into tiles.
struct Tensors {
  static constexpr int kMost = 128;
  const void* x[kMost];
  const uint8_t* mask[kMost];  // null: none
  int64_t numel[kMost];
  unsigned end[kMost];  // tiles up to the tensor's last
  int first;            // the number of x[0] in the whole list
  int count;
  unsigned tiles;

  static Tensors from(size_t first) {
    Tensors none{};
    none.first = static_cast<int>(first);
    return none;
  }

  void add(const void* data, const uint8_t* bits, int64_t elements, int64_t tile) {
    x[count] = data;
    mask[count] = bits;
    numel[count] = elements;
    tiles += static_cast<unsigned>((elements + tile - 1) / tile);
    end[count++] = tiles;
  }
};

// Calls visit(tensor, keys, counted) for vectors of keys, `counted` having a bit for each one that
// counts; all lanes of a warp come together. Blocks stride over the tiles.
template <class Key, class Visit>
__device__ void for_keys(const Tensors& list, Key infinite, const Visit& visit) {
  int t = 0;
  for (unsigned tile = blockIdx.x; tile < list.tiles; tile += gridDim.x) {
    while (tile >= list.end[t]) ++t;
    const unsigned before = t == 0 ? 0 : list.end[t - 1];
    const int64_t start = (tile - before) * tile_size<Key>(blockDim.x), numel = list.numel[t];
    Tile<Key> keys = load_tile(static_cast<const Key*>(list.x[t]), start, numel);
    const TileBits<Key> counted = load_counted<Key>(list.mask[t], start, numel);
    for (int j = 0; j < kTileVectors; ++j) {
      for (Key& each : keys.vector[j].at) each = key_of(each, infinite);
      visit(list.first + t, keys.vector[j], counted.vector[j]);
    }
  }
}

constexpr unsigned kCountThreads = 1024;

// counts[d] += keys whose first digit is d, counted by each block in its shared memory first.
template <class Key>
__global__ void __launch_bounds__(kCountThreads, 1)
    threshold_first_kernel(const __grid_constant__ Tensors list, Key infinite, Digit digit,
                           Count* __restrict__ counts) {
  MEMTL_DYNAMIC_SHARED(memory);
  auto* own = reinterpret_cast<unsigned*>(memory);
  const unsigned size = 1u << digit.width;
  for (unsigned d = threadIdx.x; d < size; d += blockDim.x) own[d] = 0;
  __syncthreads();
  for_keys(list, infinite, [&](int, const Vector<Key, kVector<Key>>& keys, unsigned counted) {
    for (int e = 0; e < kVector<Key>; ++e) {
      if (counted >> e & 1) atomicAdd(&own[keys.at[e] >> digit.shift], 1u);
    }
  });
  __syncthreads();
  for (unsigned d = threadIdx.x; d < size; d += blockDim.x) {
    if (own[d] > 0) atomicAdd(&counts[d], Count{own[d]});
  }
}

// What is known of the k-th largest key: it begins with `prefix`, and is the left-th largest of
// those that do.
struct Found {
  uint64_t prefix;
  int64_t left;
};

// A warp's additions to counts in global memory. Those to one digit are kept back: it may be that
// of all keys, and additions to one place wait for each other.
class Tally {
 public:
  __device__ explicit Tally(Count* counts) : counts_(counts) {}

  // counts[digit] += 1 for each lane that has `counted`.
  __device__ void add(unsigned digit, bool counted) {
    const bool other = counted && digit != digit_;
    const unsigned others = __ballot_sync(kAllLanes, other);
    kept_ += static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, counted && !other)));
    if (others == 0) return;
    flush();
    digit_ = __shfl_sync(kAllLanes, digit, __ffs(static_cast<int>(others)) - 1);
    kept_ = static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, other && digit == digit_)));
    if (other && digit != digit_) atomicAdd(&counts_[digit], Count{1});
  }

  __device__ void flush() {
    if (lane_of_thread() == 0 && kept_ > 0) atomicAdd(&counts_[digit_], Count{kept_});
    kept_ = 0;
  }

 private:
  Count* counts_;
  unsigned digit_ = 0;
  unsigned kept_ = 0;
};

// counts[d] += keys that begin with what was found, and go on with the digit d.
template <class Key>
__global__ void __launch_bounds__(kCountThreads, 1)
    threshold_next_kernel(const __grid_constant__ Tensors list, Key infinite, Digit digit,
                          const Found* __restrict__ found, Count* __restrict__ counts) {
  const Key prefix = static_cast<Key>(found->prefix);
  const unsigned digits = (1u << digit.width) - 1;
  Tally tally(counts);
  for_keys(list, infinite, [&](int, const Vector<Key, kVector<Key>>& keys, unsigned counted) {
    for (int e = 0; e < kVector<Key>; ++e) {
      if (keys.at[e] >> digit.width >> digit.shift != prefix) counted &= ~(1u << e);
    }
    if (!__any_sync(kAllLanes, counted != 0)) return;
    for (int e = 0; e < kVector<Key>; ++e) {
      tally.add(static_cast<unsigned>(keys.at[e] >> digit.shift) & digits, counted >> e & 1);
    }
  });
  tally.flush();
}

// Goes on by a digit of `width` bits; k > 0: the first one, and the k-th largest of all is sought.
// Where there are fewer, as masks may have it, the digit is 0. One block, of whole warps.
__global__ void __launch_bounds__(kCountThreads)
    threshold_choose_kernel(const Count* __restrict__ counts, int width, int64_t k, Found* found) {
  const unsigned size = 1u << width, each = (size + blockDim.x - 1) / blockDim.x;
  const Found before = k > 0 ? Found{0, k} : *found;
  const auto left = static_cast<Count>(before.left);
  // This thread's digits, from the top: as many have fewer before them as threads before this one.
  const unsigned first = threadIdx.x * each, last = first + each < size ? first + each : size;
  Count sum = 0;
  for (unsigned i = first; i < last; ++i) sum += counts[size - 1 - i];
  const Count up_to = warp_sum_up_to(sum);
  const Sums<Count> sums = sum_of_warps(__shfl_sync(kAllLanes, up_to, kWarp - 1));
  Count above = sums.before + up_to - sum;
  if (above < left && left <= above + sum) {
    unsigned digit = size - 1 - first;
    for (Count here = counts[digit]; above + here < left; here = counts[--digit]) above += here;
    *found = {before.prefix << width | digit, static_cast<int64_t>(left - above)};
  } else if (threadIdx.x == 0 && sums.all < left) {
    *found = {before.prefix << width, before.left};
  }
}

// equal[t] += keys of tensor t that are the one found.
template <class Key>
__global__ void __launch_bounds__(kCountThreads, 1)
    threshold_equal_kernel(const __grid_constant__ Tensors list, Key infinite,
                           const Found* __restrict__ found, Count* __restrict__ equal) {
  const Key key = static_cast<Key>(found->prefix);
  int at = list.first;
  unsigned count = 0;
  const auto flush = [&] {
    const unsigned sum = warp_sum(count);
    if (lane_of_thread() == 0 && sum > 0) atomicAdd(&equal[at], Count{sum});
    count = 0;
  };
  for_keys(list, infinite, [&](int t, const Vector<Key, kVector<Key>>& keys, unsigned counted) {
    if (t != at) flush();
    at = t;
    for (int e = 0; e < kVector<Key>; ++e) count += keys.at[e] == key ? counted >> e & 1 : 0;
  });
  flush();
}

// ties: equal[t] before, and how many of those are among the k afterwards. One warp.
template <class Key>
__global__ void threshold_share_kernel(const Found* __restrict__ found, Key infinite, int tensors,
                                       Key* __restrict__ value, int64_t* __restrict__ ties) {
  int64_t left = found->left;
  for (int start = 0; start < tensors; start += kWarp) {
    const int t = start + static_cast<int>(threadIdx.x);
    const int64_t equal = t < tensors ? ties[t] : 0, up_to = warp_sum_up_to(equal);
    const int64_t here = left - (up_to - equal);
    if (t < tensors) ties[t] = here < 0 ? 0 : here < equal ? here : equal;
    left -= __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  if (threadIdx.x > 0) return;
  const Key key = static_cast<Key>(found->prefix);
  // Half of the last mantissas: a quiet NaN.
  *value = key > infinite ? static_cast<Key>(infinite | infinite >> 1) : key;
}

// ----------------------------------------------------------------------------------- the mask

// Of this thread's vectors: which keys are above the threshold, and which have it; of those that
// count.
template <class Key>
struct Compared {
  TileBits<Key> above, equal;
};

template <class Key>
__device__ inline Compared<Key> compare_tile(const Key* x, const uint8_t* mask, const Key* value,
                                             Key infinite, int64_t start, int64_t numel) {
  const Tile<Key> tile = load_tile(x, start, numel);
  const TileBits<Key> counted = load_counted<Key>(mask, start, numel);
  const Key threshold = key_of(*value, infinite);
  Compared<Key> compared;
  for (int j = 0; j < kTileVectors; ++j) {
    unsigned above = 0, equal = 0;
    for (int e = 0; e < kVector<Key>; ++e) {
      const Key key = key_of(tile.vector[j].at[e], infinite);
      above |= unsigned{key > threshold} << e;
      equal |= unsigned{key == threshold} << e;
    }
    compared.above.vector[j] = above & counted.vector[j];
    compared.equal.vector[j] = equal & counted.vector[j];
  }
  return compared;
}

// The bits of what is above or equal; equal[tile]: how many of its elements are equal.
template <class Key>
__global__ void threshold_mark_kernel(const Key* __restrict__ x, const uint8_t* __restrict__ mask,
                                      const Key* __restrict__ value, Key infinite, int64_t numel,
                                      int64_t* __restrict__ equal, uint8_t* __restrict__ bits) {
  const int64_t start = tile_of_block<Key>();
  Compared<Key> compared = compare_tile(x, mask, value, infinite, start, numel);
  unsigned count = 0;
  for (int j = 0; j < kTileVectors; ++j) {
    count += static_cast<unsigned>(__popc(compared.equal.vector[j]));
    compared.above.vector[j] |= compared.equal.vector[j];
  }
  store_tile_bits(bits, start, numel, compared.above);
  const unsigned all = sum_of_warps(warp_sum(count)).all;
  if (threadIdx.x == 0) equal[blockIdx.x] = all;
}

// Once more for tiles that have some of those equal behind the first `ties`; `ends` are the sums of
// those counts. Blocks stride over the tiles: most often there is nothing to do.
template <class Key>
__global__ void threshold_trim_kernel(const Key* __restrict__ x, const uint8_t* __restrict__ mask,
                                      const Key* __restrict__ value,
                                      const int64_t* __restrict__ ties,
                                      const int64_t* __restrict__ ends, Key infinite, int64_t numel,
                                      int64_t tiles, uint8_t* __restrict__ bits) {
  const int64_t quota = *ties;
  if (ends[tiles - 1] <= quota) return;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t first = start_of_tile(ends, t), end = ends[t];
    if (end == first || end <= quota) continue;
    const int64_t start = t * tile_size<Key>(blockDim.x);
    Compared<Key> compared = compare_tile(x, mask, value, infinite, start, numel);
    unsigned rank[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j) {
      rank[j] = static_cast<unsigned>(__popc(compared.equal.vector[j]));
    }
    sum_before(rank);
    for (int j = 0; j < kTileVectors; ++j) {
      for (int e = 0; e < kVector<Key>; ++e) {
        if (!(compared.equal.vector[j] >> e & 1)) continue;
        if (first + rank[j]++ < quota) compared.above.vector[j] |= 1u << e;
      }
    }
    store_tile_bits(bits, start, numel, compared.above);
    __syncthreads();
  }
}

}  // namespace memtl::cuda
