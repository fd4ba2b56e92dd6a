#include "topk_entries.h"
#include "topk_grad.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// ---------------------------------------------------------------------- weight gradient: columns

// Calls visit(token, feature, i) for every entry i of a block that is in tokens [first, last).
template <class Visit>
MEMTL_INLINE void for_entries(const uint8_t* positions, int count, int64_t at, int64_t size,
                              int64_t features, int64_t first, int64_t last, Visit visit) {
  int64_t token = at / features;
  int64_t feature = at - token * features;
  if (feature + size <= features) {  // then the token is in range too
    for (int i = 0; i < count; ++i) visit(token, feature + positions[i], i);
    return;
  }
  int64_t before = 0;
  for (int i = 0; i < count; ++i) {
    feature += positions[i] - before;
    before = positions[i];
    for (; feature >= features; feature -= features) ++token;
    if (token >= first && token < last) visit(token, feature, i);
  }
}

// for_blocks over tokens [first, last). Where the blocks of all tokens are aligned to each other,
// those of the same features come one after the other: then what they are sorted into stays in L1.
template <class Visit>
MEMTL_INLINE bool for_token_blocks(const TopkPacked& packed, int64_t features, int64_t first,
                                   int64_t last, Visit visit) {
  if (packed.n % features != 0 || (features % kBlock != 0 && packed.n != features)) {
    return for_blocks(packed, first * features, last * features, visit);
  }
  const int64_t per_row = packed.n / features;
  for (int64_t feature = 0; feature < features; feature += kBlock) {
    const int64_t size = min_of(features - feature, kBlock);
    for (int64_t token = first; token < last; ++token) {
      const int64_t block = (token % per_row * features + feature) / kBlock;
      if (!visit(token / per_row, block, token * features + feature, size)) return false;
    }
  }
  return true;
}

bool transpose(const TopkPacked& packed, int64_t features, int64_t first, int64_t last,
               int64_t width, TopkColumns* columns, uint32_t* cursors) {
  EntryBuffers buffers;
  std::memset(cursors, 0, static_cast<size_t>(features) * sizeof *cursors);
  const bool ascending = for_token_blocks(
      packed, features, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
        int count;
        const int64_t place = place_of(packed, row, block, &count);
        const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
        if (!packed.bitmap && !ascend(positions, count)) return false;
        for_entries(positions, count, at, size, features, first, last,
                    [&](int64_t, int64_t feature, int) { ++cursors[feature]; });
        return true;
      });
  if (!ascending) return false;

  // The features of a panel by falling number of entries, and where the entries of each begin.
  uint32_t entries = 0;
  for (int64_t panel = 0; panel * width < features; ++panel) {
    TopkColumns& to = columns[panel];
    const int64_t begin = panel * width, size = min_of(width, features - begin);
    if (panel > 0) {
      const TopkColumns& from = columns[panel - 1];
      to.features = from.features + 2 * from.pairs;
      to.lengths = from.lengths + from.pairs;
      to.tokens = columns[0].tokens + entries;
      to.values = columns[0].values + entries;
    }
    uint32_t place[kTopkTokens + 1] = {};  // of the first feature with so many entries
    for (int64_t i = 0; i < size; ++i) ++place[cursors[begin + i]];
    uint32_t at = 0;
    for (int length = kTopkTokens; length >= 0; --length) {
      const uint32_t of_length = place[length];
      place[length] = at;
      at += of_length;
    }
    for (int64_t i = 0; i < size; ++i) {
      to.features[place[cursors[begin + i]]++] = static_cast<uint32_t>(i);
    }
    if (size % 2) to.features[size] = static_cast<uint32_t>(width);  // a feature that is none
    int64_t pair = 0;
    for (; 2 * pair < size; ++pair) {
      uint32_t& even = cursors[begin + to.features[2 * pair]];
      const uint32_t length = even;
      if (length == 0) break;
      uint32_t odd_length = 0;
      const uint32_t start = entries;
      even = start;
      if (2 * pair + 1 < size) {
        uint32_t& odd = cursors[begin + to.features[2 * pair + 1]];
        odd_length = odd;
        odd = start + 1;
      }
      for (uint32_t i = odd_length; i < length; ++i) {
        columns[0].tokens[start + 2 * i + 1] = kTopkTokens;
        columns[0].values[start + 2 * i + 1] = 0;
      }
      to.lengths[pair] = static_cast<uint16_t>(length);
      entries += 2 * length;
    }
    to.pairs = pair;
  }

  uint8_t* tokens = columns[0].tokens;
  float* to = columns[0].values;
  return for_token_blocks(
      packed, features, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
        int count;
        const int64_t place = place_of(packed, row, block, &count);
        const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
        const float* values = values_of(packed, row, block, place, count, buffers.values);
        for_entries(positions, count, at, size, features, first, last,
                    [&](int64_t token, int64_t feature, int i) {
                      const uint32_t entry = cursors[feature];
                      cursors[feature] = entry + 2;
                      tokens[entry] = static_cast<uint8_t>(token - first);
                      to[entry] = values[i];
                    });
        return true;
      });
}

// ---------------------------------------------------------------------- weight gradient: product

#if defined(__AVX2__)
constexpr int kLanes = kWidth;
using Vector = Floats;
MEMTL_INLINE Vector load_vector(const float* p) { return load(p); }
MEMTL_INLINE void store_vector(float* p, Vector a) { store(p, a); }
MEMTL_INLINE Vector spread(float x) { return floats(x); }
#if defined(__AVX512F__)
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#else
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#endif
MEMTL_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
#else
constexpr int kLanes = 4;
typedef float Vector __attribute__((vector_size(16)));
MEMTL_INLINE Vector load_vector(const float* p) {
  Vector a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
MEMTL_INLINE void store_vector(float* p, Vector a) { std::memcpy(p, &a, sizeof a); }
MEMTL_INLINE Vector spread(float x) { return Vector{x, x, x, x}; }
MEMTL_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
MEMTL_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

// Makes the compiler compute an address once: an FMA that adds up its address is two operations.
MEMTL_INLINE void keep_in_register(const float*& p) { asm("" : "+r"(p)); }

constexpr int kTileVectors = 4;
constexpr int kTile = kTileVectors * kLanes;

// Outputs [first, first + kOutputs) of tokens [token, token + rows), as floats; zeros beyond the
// last output.
template <DType kType, int kOutputs>
void copy_tile(const void* grad_out, int64_t outputs, int64_t token, int64_t rows, int64_t first,
               float* tile) {
  const int64_t count = min_of(outputs - first, kOutputs);
  for (int64_t row = 0; row < rows; ++row, tile += kOutputs) {
    const int64_t at = (token + row) * outputs + first;
    int i = 0;
    if (count == kOutputs) {
      MEMTL_UNROLL
      for (; i < kOutputs; i += kWidth) store(tile + i, load<kType>(grad_out, at + i));
      continue;
    }
    for (; i + kWidth <= count; i += kWidth) store(tile + i, load<kType>(grad_out, at + i));
    for (; i < count; ++i) tile[i] = load_float(kType, grad_out, at + i);
    for (; i < kOutputs; ++i) tile[i] = 0;
  }
}

// sums[feature, :] += value * tile[token, :] over the entries. The sums of a pair of features stay
// in registers.
template <int kVectors>
void accumulate(const TopkColumns& columns, const float* tile, float* sums) {
  constexpr int kOutputs = kVectors * kLanes;
  const uint8_t* tokens = columns.tokens;
  const float* values = columns.values;
  for (int64_t pair = 0; pair < columns.pairs; ++pair) {
    const uint32_t* features = columns.features + 2 * pair;
    float* even = sums + int64_t{features[0]} * kOutputs;
    float* odd = sums + int64_t{features[1]} * kOutputs;
    Vector a[kVectors], b[kVectors];
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      a[v] = load_vector(even + v * kLanes);
      b[v] = load_vector(odd + v * kLanes);
    }
    if (pair + 2 < columns.pairs) {
      MEMTL_UNROLL
      for (int i = 0; i < kOutputs; i += 16) {
        prefetch(sums + int64_t{features[4]} * kOutputs + i);
        prefetch(sums + int64_t{features[5]} * kOutputs + i);
      }
    }
    for (int i = columns.lengths[pair]; i > 0; --i) {
      const float* from_even = tile + tokens[0] * kOutputs;
      const float* from_odd = tile + tokens[1] * kOutputs;
      keep_in_register(from_even);
      keep_in_register(from_odd);
      const Vector x = spread(values[0]), y = spread(values[1]);
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        a[v] = fma(x, load_vector(from_even + v * kLanes), a[v]);
      }
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        b[v] = fma(y, load_vector(from_odd + v * kLanes), b[v]);
      }
      tokens += 2;
      values += 2;
    }
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_vector(even + v * kLanes, a[v]);
      store_vector(odd + v * kLanes, b[v]);
    }
  }
}

#if defined(__AVX512F__)
// to[i * stride + j] = from[j * from_stride + i], i < rows, j < 16; rows <= 16.
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  __m512 a[16], b[16];
  MEMTL_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]);
    const __m512d r = _mm512_castps_pd(b[i + 2]), s = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
  MEMTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
  }
  // What fills whole lines goes past the caches: the result is larger than they are.
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && stride % 16 == 0;
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) break;
    if (aligned) {
      _mm512_stream_ps(to + i * stride, a[i]);
    } else {
      _mm512_storeu_ps(to + i * stride, a[i]);
    }
  }
}
#elif defined(__AVX2__)
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  __m256 a[8], b[8];
  MEMTL_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  MEMTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) {
    if (i < rows) _mm256_storeu_ps(to + i * stride, b[i]);
  }
}
#else
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kLanes; ++j) to[i * stride + j] = from[j * from_stride + i];
  }
}
#endif

// sums [width, kOutputs] -> out [count, width], rows `stride` apart.
template <int kOutputs>
void write_sums(const float* sums, int64_t width, int64_t count, float* out, int64_t stride) {
  const int64_t squares = width / kLanes * kLanes;
  for (int64_t o = 0; o < count; o += kLanes) {
    for (int64_t feature = 0; feature < squares; feature += kLanes) {
      transpose_square(sums + feature * kOutputs + o, kOutputs, out + o * stride + feature, stride,
                       min_of(count - o, kLanes));
    }
  }
  for (int64_t feature = squares; feature < width; ++feature) {
    for (int64_t o = 0; o < count; ++o) out[o * stride + feature] = sums[feature * kOutputs + o];
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <DType kType, int kVectors>
void product_typed(const void* grad_out, int64_t tokens, int64_t outputs,
                   const TopkColumns* columns, int64_t stride, int64_t first_output,
                   int64_t first_feature, int64_t width, int64_t features, float* workspace,
                   float* out) {
  constexpr int kOutputs = kVectors * kLanes;
  float* tile = workspace;
  float* zeros = tile + kTopkTokens * kOutputs;  // the row of token kTopkTokens
  float* sums = zeros + kOutputs;
  std::memset(zeros, 0, static_cast<size_t>(width + 2) * kOutputs * sizeof *sums);
  for (int64_t token = 0; token < tokens; token += kTopkTokens, columns += stride) {
    copy_tile<kType, kOutputs>(grad_out, outputs, token, min_of(tokens - token, kTopkTokens),
                               first_output, tile);
    accumulate<kVectors>(*columns, tile, sums);
  }
  write_sums<kOutputs>(sums, width, min_of(outputs - first_output, kOutputs),
                       out + first_output * features + first_feature, features);
}

template <DType kType>
void product_of(const void* grad_out, int64_t tokens, int64_t outputs, const TopkColumns* columns,
                int64_t stride, int64_t first_output, int64_t first_feature, int64_t width,
                int64_t features, float* workspace, float* out) {
  const int64_t vectors = ceil_div(outputs - first_output, kLanes);
  const auto run = vectors >= 4   ? product_typed<kType, 4>
                   : vectors == 3 ? product_typed<kType, 3>
                   : vectors == 2 ? product_typed<kType, 2>
                                  : product_typed<kType, 1>;
  run(grad_out, tokens, outputs, columns, stride, first_output, first_feature, width, features,
      workspace, out);
}

void product(DType dtype, const void* grad_out, int64_t tokens, int64_t outputs,
             const TopkColumns* columns, int64_t stride, int64_t first_output,
             int64_t first_feature, int64_t width, int64_t features, float* workspace, float* out) {
  MEMTL_FOR_DTYPE(dtype, product_of<kType>(grad_out, tokens, outputs, columns, stride, first_output,
                                           first_feature, width, features, workspace, out))
}

// Against torch's dense product with AVX-512 of 1576 tokens, 768 to 3072 features and back.
#if defined(__AVX512F__)
constexpr double kDenseFrom = 0.4;
#elif defined(__AVX2__)
constexpr double kDenseFrom = 0.3;
#else
constexpr double kDenseFrom = 0.12;
#endif

}  // namespace

extern const TopkGradKernels topk_grad = {transpose, kDenseFrom, kTile, product};

}  // namespace memtl::MEMTL_ISA_NS
