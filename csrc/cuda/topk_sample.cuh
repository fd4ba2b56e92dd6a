// Device code of topk_pack_sample: the k largest magnitudes of a whole row.
//
// The k-th largest key is found some bits at a time, the highest first: blocks of threads count how
// many keys of their part of a row have which value of those bits, the last one of a row to finish
// adds up and chooses. Then every block of 256 counts what is above the threshold and what is equal
// to it, the last one of a row again adds up, and the blocks are packed. No block waits for
// another.
#pragma once

#include "cuda/topk_chunks.cuh"
#include "cuda/topk_pack.cuh"

namespace memtl::cuda {

constexpr int kDigitBits = 11;  // at most, of a pass
constexpr int kDigits = 1 << kDigitBits;

struct Pass {
  int shift, bits;
};

// From the highest bit of a key to the lowest.
template <class T>
struct Passes {
  static constexpr int kCount = 3;
  static constexpr Pass kPasses[kCount] = {{20, 11}, {10, 10}, {0, 10}};
};
template <>
struct Passes<BFloat16> {
  static constexpr int kCount = 2;
  static constexpr Pass kPasses[kCount] = {{7, 8}, {0, 7}};
};
template <>
struct Passes<Half> : Passes<BFloat16> {};

// What is known of a row's threshold: its highest bits, and how many of the keys that have them are
// among the k. At last these are its key and the number of ties.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// Rows cut into equal parts, one a block of threads.
struct SampleRows {
  int64_t count, n, parts;

  __device__ int64_t blocks() const { return ceil_div(n, kBlock); }
  __device__ int64_t chunks() const { return ceil_div(blocks(), kChunk); }

  // Calls visit(index, size, first) for the blocks that a warp has of a part: their size and the
  // offset of their first element in x.
  template <class Visit>
  __device__ void for_blocks(int64_t row, int64_t part, const Visit& visit) const {
    for (int64_t index = part * kTopkWarps + warp_of_thread(); index < blocks();
         index += parts * kTopkWarps) {
      visit(index, block_size(n, index), row * n + index * kBlock);
    }
  }
};

// Whether this block of threads is the last of `parts` to come here; all its threads call it. What
// the others have written before can then be read. *done is 0 at first and in the end.
__device__ inline bool is_last(unsigned* done, int64_t parts) {
  MEMTL_SHARED(bool, last, [1]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicAdd(done, 1u) == parts - 1;
    if (last[0]) *done = 0;
  }
  __syncthreads();
  __threadfence();
  return last[0];
}

// Writes what is known of the threshold with one more digit: count(digit) keys have it. Keys that
// are zero need not be counted. All threads of a block call it, and meet after it.
template <class Count>
__device__ void choose_digit(const Count& count, Pass pass, Threshold known, Threshold* threshold) {
  constexpr int kOwn = kDigits / kTopkThreads;
  int64_t own[kOwn], sum = 0;  // from the largest digit on
  const int largest = (1 << pass.bits) - 1 - static_cast<int>(threadIdx.x) * kOwn;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int digit = largest - i;
    own[i] = digit > 0 ? count(digit) : digit == 0 ? known.ties : 0;
    sum += own[i];
  }
  int64_t before = sum_of_threads(sum).before;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < known.ties && before + own[i] >= known.ties) {
      const auto digit = static_cast<uint32_t>(largest - i);
      *threshold = {known.key | digit << pass.shift, known.ties - before};
    }
    before += own[i];
  }
}

// One pass over x; k is 1 or more. `histogram` [rows, kDigits] is zero before and after; a row that
// is one part needs none. Any grid of one dimension.
template <class T>
__global__ void __launch_bounds__(kTopkThreads)
    sample_digit_kernel(const T* __restrict__ x, SampleRows rows, bool aligned, Pass pass,
                        bool first, int64_t k, unsigned long long* histogram, unsigned* done,
                        Threshold* thresholds) {
  MEMTL_SHARED(unsigned, counts, [kDigits]);
  for (int64_t task = blockIdx.x; task < rows.count * rows.parts; task += gridDim.x) {
    const int64_t row = task / rows.parts, part = task - row * rows.parts;
    const Threshold known = first ? Threshold{0, k} : thresholds[row];
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kTopkThreads) counts[i] = 0;
    __syncthreads();
    rows.for_blocks(row, part, [&](int64_t, int size, int64_t from) {
      const Keys<T, Incoming<T>::kCount> keys(Incoming<T>(x, from, size, aligned).words);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t key = keys.at(i);
        if (key != 0 && (key ^ known.key) >> pass.shift >> pass.bits == 0) {
          atomicAdd(&counts[key >> pass.shift & ((1u << pass.bits) - 1)], 1u);
        }
      }
    });
    __syncthreads();
    if (rows.parts == 1) {
      choose_digit([&](int digit) { return int64_t{counts[digit]}; }, pass, known,
                   thresholds + row);
    } else {
      unsigned long long* sums = histogram + row * kDigits;
      for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kTopkThreads) {
        if (counts[i] > 0) atomicAdd(&sums[i], static_cast<unsigned long long>(counts[i]));
      }
      if (is_last(done + row, rows.parts)) {
        choose_digit([&](int digit) { return static_cast<int64_t>(sums[digit]); }, pass, known,
                     thresholds + row);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kTopkThreads) sums[i] = 0;
      }
    }
    __syncthreads();
  }
}

// Keys above the threshold and, 65536 times, those equal to it: of blocks [rows, blocks], and of
// all blocks of a row before a chunk, [rows, chunks] of each.
struct SampleCounts {
  uint32_t* blocks;
  int64_t* above;
  int64_t* equal;
};

// Counts the blocks, and adds up.
template <class T>
__global__ void __launch_bounds__(kTopkThreads)
    sample_count_kernel(const T* __restrict__ x, SampleRows rows, bool aligned,
                        const Threshold* __restrict__ thresholds, SampleCounts counts,
                        unsigned* done) {
  const int64_t blocks = rows.blocks(), chunks = rows.chunks();
  for (int64_t task = blockIdx.x; task < rows.count * rows.parts; task += gridDim.x) {
    const int64_t row = task / rows.parts, part = task - row * rows.parts;
    const uint32_t key = thresholds[row].key;
    uint32_t* of_row = counts.blocks + row * blocks;
    rows.for_blocks(row, part, [&](int64_t index, int size, int64_t from) {
      const Keys<T, Incoming<T>::kCount> keys(Incoming<T>(x, from, size, aligned).words);
      const auto count = [&](uint32_t least) {
        return keys.added(__reduce_add_sync(kAllLanes, keys.count(least)));
      };
      const unsigned above = count(key + 1);
      const unsigned equal = (key > 0 ? count(key) : static_cast<unsigned>(size)) - above;
      if (lane_of_thread() == 0) of_row[index] = above | equal << 16;
    });
    if (is_last(done + row, rows.parts)) {
      const auto sum = [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * kChunk < blocks ? (chunk + 1) * kChunk : blocks;
        uint32_t sum = 0;  // 8192 of each at most
        for (int64_t i = chunk * kChunk; i < end; ++i) sum += of_row[i];
        return sum;
      };
      const auto above = [&](int64_t chunk) { return int64_t{sum(chunk) & 0xffff}; };
      const auto equal = [&](int64_t chunk) { return int64_t{sum(chunk) >> 16}; };
      add_up_chunks(chunks, above, counts.above + row * chunks);
      add_up_chunks(chunks, equal, counts.equal + row * chunks);
    }
    __syncthreads();
  }
}

// Packs the rows; a warp packs as many blocks of a row as it has together. Any grid of one
// dimension.
template <class T>
__global__ void __launch_bounds__(kTopkThreads, 4)
    sample_pack_kernel(const T* __restrict__ x, SampleRows rows, int64_t k, bool aligned,
                       const Threshold* __restrict__ thresholds, SampleCounts counts,
                       TopkOutput out) {
  static_assert(kChunk % kTogether<T> == 0);
  MEMTL_SHARED(PackSpace<T>, spaces, [kTopkWarps]);
  PackSpace<T>* space = &spaces[warp_of_thread()];
  const int64_t blocks = rows.blocks(), chunks = rows.chunks();
  const int64_t tasks = ceil_div(blocks, kTogether<T>);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTopkWarps;
  int64_t task = static_cast<int64_t>(blockIdx.x) * kTopkWarps + warp_of_thread();
  for (; task < rows.count * tasks; task += stride) {
    const int64_t row = task / tasks, first = (task - row * tasks) * kTogether<T>;
    const int64_t chunk = first / kChunk, element = first * kBlock;
    Place at = {rows.n, row * rows.n + element, rows.n - element};
    const Together read = read_blocks(x, &at, blocks - first, aligned, space->numbers);
    const Threshold threshold = thresholds[row];
    const int64_t ties = threshold.ties < k ? threshold.ties : k;  // none if k is 0
    // Every lane has the counts of one block of the chunk.
    const int64_t counted = chunk * kChunk + lane_of_thread();
    const uint32_t count = counted < blocks ? counts.blocks[row * blocks + counted] : 0;
    const uint32_t through = warp_sum_up_to(count);
    // Now of this lane's own block.
    const int lane = static_cast<int>(first % kChunk + lane_of_thread() / kLanes<T>);
    const uint32_t here = __shfl_sync(kAllLanes, count, lane);
    const uint32_t earlier = __shfl_sync(kAllLanes, through, lane) - here;
    const int64_t above = counts.above[row * chunks + chunk] + (earlier & 0xffff);
    const int64_t equal = counts.equal[row * chunks + chunk] + (earlier >> 16);
    const int64_t left = ties > equal ? ties - equal : 0;
    const int same = static_cast<int>(left < (here >> 16) ? left : here >> 16);
    const int64_t entry = row * out.kept + above + (equal < ties ? equal : ties);
    const Destination to = {row * blocks + first, __shfl_sync(kAllLanes, entry, 0),
                            row * ceil_div(rows.n, 8) + first * (kBlock / 8)};
    const Keys<T> keys = own_keys<T>(space->numbers);
    write_blocks(keys, Cut{threshold.key + 1, same}, read, to, space, out);
  }
}

}  // namespace memtl::cuda
