#include "topk_entries.h"
#include "topk_grad.h"
#include "topk_lanes.h"
#include "topk_layout.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// -----------------------------------------------------------------------------------------------
// columns

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
    if (feature >= features) {
      const auto passed = static_cast<uint32_t>(feature) / static_cast<uint32_t>(features);
      token += passed;
      feature -= passed * features;
    }
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
               int64_t width, TopkStorage storage, TopkColumns* columns, uint32_t* cursors) {
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
  TopkStorage next = storage;  // a copy: `storage` stays in registers
  lay_out(features, width, 0, &next, columns, cursors);
  return for_token_blocks(
      packed, features, first, last, [&](int64_t row, int64_t block, int64_t at, int64_t size) {
        int count;
        const int64_t place = place_of(packed, row, block, &count);
        const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
        const float* values = values_of(packed, row, block, place, count, buffers.values);
        for_entries(positions, count, at, size, features, first, last,
                    [&](int64_t token, int64_t feature, int i) {
                      put(storage, cursors + feature, token - first, values[i]);
                    });
        return true;
      });
}

// Calls visit(token, channel, i) for every entry i of one block of an image.
template <class Visit>
MEMTL_INLINE void for_pixels(const TopkImages& images, const uint8_t* positions, int count,
                             int64_t at, int64_t size, int64_t first_token, Visit visit) {
  const int64_t minors = images.channels_last ? images.channels : images.pixels;
  const int64_t majors = images.channels_last ? images.pixels : images.channels;
  for_entries(
      positions, count, at, size, minors, 0, majors, [&](int64_t major, int64_t minor, int i) {
        const int32_t token = images.tokens[images.channels_last ? major : minor];
        if (token < 0) return;
        visit(static_cast<uint32_t>(first_token + token), images.channels_last ? minor : major, i);
      });
}

bool transpose_images(const TopkPacked& packed, const TopkImages& images, int64_t first,
                      int64_t last, int64_t width, TopkStorage storage, TopkColumns* columns,
                      uint32_t* cursors) {
  EntryBuffers buffers;
  const int64_t channels = images.channels, panels = ceil_div(channels, width);
  std::memset(cursors, 0, static_cast<size_t>(images.blocks * channels) * sizeof *cursors);
  const auto cursor = [&](uint32_t token, int64_t channel) {
    return cursors + token / kTopkTokens * channels + channel;
  };
  for (int64_t row = first; row < last; ++row) {
    const int64_t first_token = (row - first) * images.image_tokens;
    for (int64_t block = 0; block * kBlock < packed.n; ++block) {
      int count;
      const int64_t place = place_of(packed, row, block, &count), at = block * kBlock;
      const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
      if (!packed.bitmap && !ascend(positions, count)) return false;
      for_pixels(images, positions, count, at, min_of(packed.n - at, kBlock), first_token,
                 [&](uint32_t token, int64_t channel, int) { ++*cursor(token, channel); });
    }
  }
  TopkStorage next = storage;
  uint32_t entries = 0;
  for (int64_t block = 0; block < images.blocks; ++block) {
    entries = lay_out(channels, width, entries, &next, columns + block * panels,
                      cursors + block * channels);
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t first_token = (row - first) * images.image_tokens;
    for (int64_t block = 0; block * kBlock < packed.n; ++block) {
      int count;
      const int64_t place = place_of(packed, row, block, &count), at = block * kBlock;
      const uint8_t* positions = positions_of(packed, row, block, place, buffers.positions);
      const float* values = values_of(packed, row, block, place, count, buffers.values);
      for_pixels(images, positions, count, at, min_of(packed.n - at, kBlock), first_token,
                 [&](uint32_t token, int64_t channel, int i) {
                   put(storage, cursor(token, channel), token % kTopkTokens, values[i]);
                 });
    }
  }
  return true;
}

// -----------------------------------------------------------------------------------------------
// product

// sums[feature, :] += value * rows[token, :]. The sums of a pair of features stay in registers.
template <int kVectors>
void accumulate_typed(TopkColumns columns, const float* rows, float* sums) {
  constexpr int64_t kOutputs = kVectors * kLanes;
  const uint8_t* tokens = columns.tokens;
  const float* values = columns.values;
  for (int64_t pair = 0; pair < columns.pairs; ++pair) {
    const uint32_t* features = columns.features + 2 * pair;
    float* first = sums + int64_t{features[0]} * kOutputs;
    float* second = sums + int64_t{features[1]} * kOutputs;
    Vector a[kVectors], b[kVectors];
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      a[v] = load_vector(first + v * kLanes);
      b[v] = load_vector(second + v * kLanes);
    }
    if (pair + 2 < columns.pairs) {
      MEMTL_UNROLL
      for (int i = 0; i < kOutputs; i += 16) {
        prefetch(sums + int64_t{features[4]} * kOutputs + i);
        prefetch(sums + int64_t{features[5]} * kOutputs + i);
      }
    }
    const int longer = columns.lengths[2 * pair], both = columns.lengths[2 * pair + 1];
    for (int i = both; i > 0; --i, tokens += 2, values += 2) {
      const float* from_first = rows + tokens[0] * kOutputs;
      const float* from_second = rows + tokens[1] * kOutputs;
      keep_in_register(from_first);
      keep_in_register(from_second);
      const Vector x = spread(values[0]), y = spread(values[1]);
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        a[v] = fma(x, load_vector(from_first + v * kLanes), a[v]);
      }
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        b[v] = fma(y, load_vector(from_second + v * kLanes), b[v]);
      }
    }
    for (int i = longer - both; i > 0; --i, tokens += 2, values += 2) {
      const float* from = rows + tokens[0] * kOutputs;
      keep_in_register(from);
      const Vector x = spread(values[0]);
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) a[v] = fma(x, load_vector(from + v * kLanes), a[v]);
    }
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_vector(first + v * kLanes, a[v]);
      store_vector(second + v * kLanes, b[v]);
    }
  }
}

void accumulate(const TopkColumns& columns, int64_t vectors, const float* rows, float* sums) {
  switch (vectors) {
    case 1:
      return accumulate_typed<1>(columns, rows, sums);
    case 2:
      return accumulate_typed<2>(columns, rows, sums);
    case 3:
      return accumulate_typed<3>(columns, rows, sums);
    default:
      return accumulate_typed<4>(columns, rows, sums);
  }
}

#if defined(__AVX512F__)
// to[i * stride + j] = from[j * from_stride + i], i < rows, j < kLanes; rows <= kLanes. kPast: past
// the caches, where whole lines are filled.
template <bool kPast>
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
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && stride % 16 == 0;
  for (int i = 0; i < 16; ++i) {
    if (i >= rows) break;
    if (kPast && aligned) {
      _mm512_stream_ps(to + i * stride, a[i]);
    } else {
      _mm512_storeu_ps(to + i * stride, a[i]);
    }
  }
}
#elif defined(__AVX2__)
template <bool kPast>
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
template <bool kPast>
MEMTL_INLINE void transpose_square(const float* from, int64_t from_stride, float* to,
                                   int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kLanes; ++j) to[i * stride + j] = from[j * from_stride + i];
  }
}
#endif

// A row of less than a tile.
template <DType kType>
MEMTL_INLINE void fill_row(const void* from, int64_t at, int64_t outputs, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= outputs; i += kWidth) store(to + i, load<kType>(from, at + i));
  for (; i < outputs; ++i) to[i] = load_float(kType, from, at + i);
  for (; i % kLanes != 0; ++i) to[i] = 0;
}

// kLanes or fewer rows and outputs, each output's numbers `output_stride` apart.
template <DType kType>
MEMTL_INLINE void fill_square(const void* from, int64_t first, int64_t row_stride,
                              int64_t output_stride, int64_t rows, int64_t outputs, float* to,
                              int64_t width) {
  alignas(64) float square[kLanes * kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t at = first + i * output_stride;
    float* numbers = square + i * kLanes;
    if (i < outputs && rows == kLanes && row_stride == 1) {
      for (int64_t j = 0; j < kLanes; j += kWidth) store(numbers + j, load<kType>(from, at + j));
      continue;
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      const bool there = i < outputs && j < rows;
      numbers[j] = there ? load_float(kType, from, at + j * row_stride) : 0;
    }
  }
  transpose_square<false>(square, kLanes, to, width, rows);
}

// Rows whose outputs are next to each other.
template <DType kType>
void fill_rows(const void* from, int64_t first, int64_t stride, int64_t rows, int64_t outputs,
               float* to, int64_t tile_stride) {
  const int64_t tiles = outputs / kTile, left = outputs % kTile;
  const int64_t width = ceil_div(left, kLanes) * kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = first + row * stride;
    float* of_tile = to + row * kTile;
    for (int64_t tile = 0; tile < tiles; ++tile, of_tile += tile_stride) {
      MEMTL_UNROLL
      for (int i = 0; i < kTile; i += kWidth) {
        store(of_tile + i, load<kType>(from, at + tile * kTile + i));
      }
    }
    if (left > 0)
      fill_row<kType>(from, at + tiles * kTile, left, to + tiles * tile_stride + row * width);
  }
}

template <DType kType>
void fill_typed(const void* from, int64_t first, int64_t row_stride, int64_t output_stride,
                int64_t rows, int64_t outputs, float* to, int64_t tile_stride) {
  if (output_stride == 1) {
    return fill_rows<kType>(from, first, row_stride, rows, outputs, to, tile_stride);
  }
  for (int64_t tile = 0; tile < outputs; tile += kTile, to += tile_stride) {
    const int64_t size = min_of(outputs - tile, kTile), width = ceil_div(size, kLanes) * kLanes;
    for (int64_t row = 0; row < rows; row += kLanes) {
      for (int64_t o = 0; o < size; o += kLanes) {
        fill_square<kType>(from, first + row * row_stride + (tile + o) * output_stride, row_stride,
                           output_stride, min_of(rows - row, kLanes), size - o,
                           to + row * width + o, width);
      }
    }
  }
}

void fill(DType dtype, const void* from, int64_t first, int64_t row_stride, int64_t output_stride,
          int64_t rows, int64_t outputs, float* to, int64_t tile_stride) {
  MEMTL_FOR_DTYPE(dtype, fill_typed<kType>(from, first, row_stride, output_stride, rows, outputs,
                                           to, tile_stride))
}

void write(const float* sums, int64_t set_stride, int64_t sets, int64_t width, int64_t outputs,
           float* out, int64_t output_stride) {
  const int64_t row = ceil_div(outputs, kLanes) * kLanes;
  if (sets > 1) {
    alignas(64) float square[kLanes * kLanes] = {}, turned[kLanes * kLanes];
    for (int64_t o = 0; o < outputs; o += kLanes) {
      const int64_t some = min_of(outputs - o, kLanes);
      for (int64_t feature = 0; feature < width; ++feature) {
        for (int64_t set = 0; set < sets; set += kLanes) {
          const int64_t size = min_of(sets - set, kLanes);
          const float* from = sums + set * set_stride + feature * row + o;
          for (int64_t i = 0; i < size; ++i) {
            store_vector(square + i * kLanes, load_vector(from + i * set_stride));
          }
          transpose_square<false>(square, kLanes, turned, kLanes, some);
          float* to = out + o * output_stride + feature * sets + set;
          for (int64_t i = 0; i < some; ++i) {
            copy_bytes(to + i * output_stride, turned + i * kLanes, size * 4);
          }
        }
      }
    }
    return;
  }
  // What fills whole lines goes past the caches: the result is larger than they are.
  const int64_t squares = width / kLanes * kLanes;
  for (int64_t o = 0; o < outputs; o += kLanes) {
    for (int64_t feature = 0; feature < squares; feature += kLanes) {
      transpose_square<true>(sums + feature * row + o, row, out + o * output_stride + feature,
                             output_stride, min_of(outputs - o, kLanes));
    }
  }
  for (int64_t feature = squares; feature < width; ++feature) {
    for (int64_t o = 0; o < outputs; ++o)
      out[o * output_stride + feature] = sums[feature * row + o];
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
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

extern const TopkGradKernels topk_grad = {kDenseFrom,       kTile, kLanes,     transpose,
                                          transpose_images, fill,  accumulate, write};

}  // namespace memtl::MEMTL_ISA_NS
