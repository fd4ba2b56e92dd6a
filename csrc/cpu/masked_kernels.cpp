#include "masked.h"
#include "topk_lanes.h"
#include "topk_layout.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// -----------------------------------------------------------------------------------------------
// entries

// `count` bits, 64 or fewer, from element `at` on; no byte beyond `bytes` is read.
MEMTL_INLINE uint64_t bits_at(const uint8_t* bits, int64_t bytes, int64_t at, int64_t count) {
  const int64_t byte = at / 8;
  const auto shift = static_cast<int>(at % 8);
  uint64_t word = 0;
  if (byte + 9 <= bytes) {
    std::memcpy(&word, bits + byte, 8);
    word = word >> shift | (uint64_t{bits[byte + 8]} << 1) << (63 - shift);
  } else {
    copy_bytes(&word, bits + byte, min_of(bytes - byte, 8));
    word >>= shift;
    if (byte + 8 < bytes) word |= (uint64_t{bits[byte + 8]} << 1) << (63 - shift);
  }
  return count < 64 ? word & ((uint64_t{1} << count) - 1) : word;
}

// Calls visit(output, input, word) for pieces of at most 64 bits of a part of the weight.
template <class Visit>
MEMTL_INLINE void for_words(const MaskedWeight& weight, int64_t first_output, int64_t last_output,
                            int64_t first_input, int64_t last_input, Visit visit) {
  const int64_t bytes = ceil_div(weight.outputs * weight.inputs, 8);
  for (int64_t output = first_output; output < last_output; ++output) {
    for (int64_t input = first_input; input < last_input; input += 64) {
      visit(output, input,
            bits_at(weight.bits, bytes, output * weight.inputs + input,
                    min_of(last_input - input, 64)));
    }
  }
}

template <class Visit>
MEMTL_INLINE void for_block(const MaskedWeight& weight, bool inputs, int64_t first, int64_t last,
                            Visit visit) {
  if (inputs) {
    for_words(weight, 0, weight.outputs, first, last, visit);
  } else {
    for_words(weight, first, last, 0, weight.inputs, visit);
  }
}

// Calls visit(i) for every bit i that is set.
template <class Visit>
MEMTL_INLINE void for_set(uint64_t word, Visit visit) {
  for (; word != 0; word &= word - 1) visit(first_bit(word));
}

int64_t count(const uint8_t* bits, int64_t bytes) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    total += popcount(word);
  }
  for (; i < bytes; ++i) total += popcount(uint64_t{bits[i]});
  return total;
}

int64_t count_entries(const MaskedWeight& weight, bool inputs, int64_t first, int64_t last,
                      uint32_t* cursors) {
  const int64_t features = inputs ? weight.outputs : weight.inputs;
  std::memset(cursors, 0, static_cast<size_t>(features) * sizeof *cursors);
  int64_t total = 0;
  for_block(weight, inputs, first, last, [&](int64_t output, int64_t input, uint64_t word) {
    const int set = popcount(word);
    total += set;
    if (inputs) {
      cursors[output] += static_cast<uint32_t>(set);
    } else {
      for_set(word, [&](int i) { ++cursors[input + i]; });
    }
  });
  return total;
}

template <DType kType, bool kInputs>
void sort_typed(const MaskedWeight& weight, int64_t first, int64_t last, const TopkStorage& storage,
                uint32_t* cursors) {
  uint8_t* tokens = storage.tokens;
  float* values = storage.values;
  for_block(weight, kInputs, first, last, [&](int64_t output, int64_t input, uint64_t word) {
    const int64_t row = output * weight.inputs + input;
    for_set(word, [&](int i) {
      uint32_t& cursor = cursors[kInputs ? output : input + i];
      tokens[cursor] = static_cast<uint8_t>(kInputs ? input + i - first : output - first);
      values[cursor] = load_float(kType, weight.values, row + i);
      cursor += 2;
    });
  });
}

void sort(const MaskedWeight& weight, bool inputs, int64_t first, int64_t last, int64_t width,
          TopkStorage storage, TopkColumns* columns, uint32_t* cursors) {
  TopkStorage next = storage;
  lay_out(inputs ? weight.outputs : weight.inputs, width, 0, &next, columns, cursors);
  if (inputs) {
    MEMTL_FOR_DTYPE(weight.dtype, (sort_typed<kType, true>(weight, first, last, storage, cursors)))
  } else {
    MEMTL_FOR_DTYPE(weight.dtype, (sort_typed<kType, false>(weight, first, last, storage, cursors)))
  }
}

int64_t list(const MaskedWeight& weight, int64_t first_row, int64_t last_row, int64_t feature,
             int64_t features, uint8_t* lengths, uint8_t* positions) {
  uint8_t* to = positions;
  for_words(weight, first_row, last_row, feature, feature + features,
            [&](int64_t row, int64_t, uint64_t word) {
              lengths[row - first_row] = static_cast<uint8_t>(popcount(word));
              for_set(word, [&](int i) { *to++ = static_cast<uint8_t>(i); });
            });
  return to - positions;
}

// -----------------------------------------------------------------------------------------------
// dot products

constexpr int kHeld = 64;  // vectors whose lanes wait to be summed; a row may add as many

// sums[i] += the lanes of vectors[i], i < kLanes.
MEMTL_INLINE void sum_lanes(const float* vectors, float* sums) {
#if defined(__AVX2__)
  Vector a[kLanes];
  MEMTL_UNROLL
  for (int i = 0; i < kLanes; ++i) a[i] = load_vector(vectors + i * kLanes);
  const auto plus = [](Vector p, Vector q) { return add(p, q); };
  store_vector(sums, add(load_vector(sums), reduce_each(a, plus)));
#else
  for (int i = 0; i < kLanes; ++i) {
    const float* v = vectors + i * kLanes;
    sums[i] += (v[0] + v[1]) + (v[2] + v[3]);
  }
#endif
}

template <int kTiles, int kVectors>
void dot_typed(const MaskedEntries& entries, const float* grad_out, int64_t grad_tile_stride,
               const float* x, int64_t x_tile_stride, float* sums) {
  constexpr int64_t kTokens = kVectors * kLanes;
  alignas(64) float held[2 * kHeld * kLanes];
  const uint8_t* positions = entries.positions;
  int waiting = 0;
  for (int64_t row = 0; row < entries.rows; ++row) {
    const int length = entries.lengths[row];
    if (length == 0) continue;
    Vector g[kTiles * kVectors];
    MEMTL_UNROLL
    for (int v = 0; v < kTiles * kVectors; ++v) {
      g[v] = load_vector(grad_out + row * kTokens + v / kVectors * grad_tile_stride +
                         v % kVectors * kLanes);
    }
    float* to = held + waiting * kLanes;
    for (int i = 0; i < length; ++i) {
      const float* from = x + positions[i] * kTokens;
      keep_in_register(from);
      Vector sum = spread(0);
      MEMTL_UNROLL
      for (int v = 0; v < kTiles * kVectors; ++v) {
        sum = fma(g[v], load_vector(from + v / kVectors * x_tile_stride + v % kVectors * kLanes),
                  sum);
      }
      store_vector(to + i * kLanes, sum);
    }
    positions += length;
    waiting += length;
    if (waiting < kHeld) continue;
    int done = 0;
    for (; done + kLanes <= waiting; done += kLanes, sums += kLanes) {
      sum_lanes(held + done * kLanes, sums);
    }
    waiting -= done;
    copy_bytes(held, held + done * kLanes, waiting * kLanes * 4);
  }
  for (int i = 0; i < waiting; i += kLanes, sums += kLanes) {
    for (int j = waiting; j < i + kLanes; ++j) store_vector(held + j * kLanes, spread(0));
    sum_lanes(held + i * kLanes, sums);
  }
}

void dot(const MaskedEntries& entries, int64_t tiles, int64_t vectors, const float* grad_out,
         int64_t grad_tile_stride, const float* x, int64_t x_tile_stride, float* sums) {
  const auto run = [&](auto typed) {
    typed(entries, grad_out, grad_tile_stride, x, x_tile_stride, sums);
  };
  if (tiles == 2) return run(dot_typed<2, kTileVectors>);
  switch (vectors) {
    case 1:
      return run(dot_typed<1, 1>);
    case 2:
      return run(dot_typed<1, 2>);
    case 3:
      return run(dot_typed<1, 3>);
    default:
      return run(dot_typed<1, kTileVectors>);
  }
}

void spread(const MaskedEntries& entries, const float* sums, int64_t features, float* out,
            int64_t stride) {
  const uint8_t* positions = entries.positions;
  for (int64_t row = 0; row < entries.rows; ++row, out += stride) {
    std::memset(out, 0, static_cast<size_t>(features) * sizeof *out);
    for (int i = entries.lengths[row]; i > 0; --i) out[*positions++] = *sums++;
  }
}

// Those of topk_grad. On an AMD EPYC, 1576 tokens, 768 to 3072 features and back, there these are
// still twice as fast as torch's dense products; elsewhere those come nearer to what a core can do.
#if defined(__AVX512F__)
constexpr double kDenseFrom = 0.4;
#elif defined(__AVX2__)
constexpr double kDenseFrom = 0.3;
#else
constexpr double kDenseFrom = 0.12;
#endif

}  // namespace

extern const MaskedKernels masked = {kDenseFrom, count, count_entries, sort, list, dot, spread};

}  // namespace memtl::MEMTL_ISA_NS
