#include "query_attention.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "quant_math.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// -----------------------------------------------------------------------------------------------
// vectors of float and of double

#if defined(__AVX512F__)
using FloatVector = __m512;
using DoubleVector = __m512d;
MEMTL_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
MEMTL_INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
using FloatVector = __m256;
using DoubleVector = __m256d;
MEMTL_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
MEMTL_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
typedef float FloatVector __attribute__((vector_size(16)));
typedef double DoubleVector __attribute__((vector_size(16)));
MEMTL_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return a * b + c; }
MEMTL_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) { return a * b + c; }
#endif

template <class Real>
struct VectorOf {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <class Real>
using Vector = typename VectorOf<Real>::type;
template <class Real>
constexpr int kLanes = sizeof(Vector<Real>) / sizeof(Real);

template <class Real>
MEMTL_INLINE Vector<Real> load_vector(const Real* p) {
  Vector<Real> a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

template <class Real>
MEMTL_INLINE void store_vector(Real* p, Vector<Real> a) {
  std::memcpy(p, &a, sizeof a);
}

template <class Real>
MEMTL_INLINE Vector<Real> spread(Real x) {
  return x - Vector<Real>{};  // -0 stays
}

// Lane i of the result is the sum of a[i]; a is used up.
template <class Real>
MEMTL_INLINE Vector<Real> sum_each(Vector<Real> (&a)[kLanes<Real>]) {
  if constexpr (std::is_same_v<Real, float> && kWidth > 1) {
    return reduce_each(a, [](Floats x, Floats y) { return x + y; });
  } else {
    Vector<Real> sums;
    for (int i = 0; i < kLanes<Real>; ++i) {
      Real sum = 0;
      for (int lane = 0; lane < kLanes<Real>; ++lane) sum += a[i][lane];
      sums[i] = sum;
    }
    return sums;
  }
}

MEMTL_INLINE int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// -----------------------------------------------------------------------------------------------
// elements of a dtype

template <DType kType>
using RealOf = std::conditional_t<kType == DType::f64, double, float>;

// `count` elements from `first` on, and zeros up to `padded`.
template <DType kType>
MEMTL_INLINE void read(const void* from, int64_t first, int64_t count, int64_t padded,
                       RealOf<kType>* to) {
  int64_t i = 0;
  if constexpr (kType == DType::f64) {
    for (; i < count; ++i) to[i] = static_cast<const double*>(from)[first + i];
  } else {
    for (; i + kWidth <= count; i += kWidth) store(to + i, load<kType>(from, first + i));
    for (; i < count; ++i) to[i] = load_float(kType, from, first + i);
  }
  for (; i < padded; ++i) to[i] = 0;
}

template <DType kType, class Real>
MEMTL_INLINE void write(const Real* from, int64_t count, void* to, int64_t first) {
  if constexpr (std::is_same_v<Real, double>) {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kType == DType::f64) {
        static_cast<double*>(to)[first + i] = from[i];
      } else {
        store_float(kType, to, first + i, static_cast<float>(from[i]));
      }
    }
  } else {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store<kType>(to, first + i, load(from + i));
    for (; i < count; ++i) store_float(kType, to, first + i, from[i]);
  }
}

// -----------------------------------------------------------------------------------------------
// products

#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

// A matrix whose element (row r, term i) is data[r * row + i * term].
template <class Real>
struct Factor {
  const Real* data;
  int64_t row, term;
};

// c[r, :] = sum_i a(r, i) b[i, :], or with `add` += that, of kRows rows and kVectors vectors; the
// sums stay in registers.
template <class Real, int kRows, int kVectors, bool kSideBySide>
MEMTL_INLINE void tile(Factor<Real> a, const Real* b, int64_t b_stride, int64_t terms, Real* c,
                       int64_t c_stride, bool add) {
  constexpr int kWide = kLanes<Real>;
  const int64_t row = kSideBySide ? 1 : a.row;
  Vector<Real> sums[kRows][kVectors] = {};
  for (int64_t i = 0; i < terms; ++i, a.data += a.term, b += b_stride) {
    Vector<Real> right[kVectors];
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = load_vector(b + v * kWide);
    MEMTL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector<Real> left = spread(a.data[r * row]);
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
    }
  }
  MEMTL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MEMTL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Real* to = c + r * c_stride + v * kWide;
      store_vector(to, add ? load_vector(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// The product of matrices, as in a tile; b and c have `columns`, whole vectors. kSideBySide: a.row
// is 1.
template <class Real, bool kSideBySide>
void multiply(Factor<Real> a, const Real* b, int64_t b_stride, int64_t terms, Real* c,
              int64_t c_stride, int64_t rows, int64_t columns, bool add) {
  const auto run = [&]<int kVectors>() {
    constexpr int64_t kWide = kVectors * kLanes<Real>;
    for (; columns >= kWide; columns -= kWide, b += kWide, c += kWide) {
      int64_t r = 0;
      const auto run_rows = [&]<int kRows>() {
        for (; r + kRows <= rows; r += kRows) {
          tile<Real, kRows, kVectors, kSideBySide>({a.data + r * a.row, a.row, a.term}, b, b_stride,
                                                   terms, c + r * c_stride, c_stride, add);
        }
      };
      run_rows.template operator()<kTileRows>();
      run_rows.template operator()<4>();
      run_rows.template operator()<2>();
      run_rows.template operator()<1>();
    }
  };
  if constexpr (kTileVectors > 2) run.template operator()<kTileVectors>();
  run.template operator()<2>();
  run.template operator()<1>();
}

// Rows that are read in place or that were copied, `stride` apart.
template <class Real>
struct Rows {
  const Real* data;
  int64_t stride;
};

// to[t * to_stride + n] = queries[t] . rows[n]; `width` is whole vectors. A few more n are written.
template <class Real>
void dots(const Real* queries, int64_t count, Rows<Real> rows, int64_t n, int64_t width, Real* to,
          int64_t to_stride) {
  constexpr int kWide = kLanes<Real>;
  const auto run = [&]<int kQueries>(int64_t t, const Real* const* row, int64_t first) {
    constexpr int kRows = kWide / kQueries;
    Vector<Real> sums[kWide] = {};
    for (int64_t i = 0; i < width; i += kWide) {
      Vector<Real> query[kQueries];
      MEMTL_UNROLL
      for (int j = 0; j < kQueries; ++j) query[j] = load_vector(queries + (t + j) * width + i);
      MEMTL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vector<Real> x = load_vector(row[r] + i);
        MEMTL_UNROLL
        for (int j = 0; j < kQueries; ++j) {
          sums[j * kRows + r] = fma(query[j], x, sums[j * kRows + r]);
        }
      }
    }
    Real each[kWide];
    store_vector(each, sum_each<Real>(sums));
    for (int j = 0; j < kQueries; ++j) {
      std::memcpy(to + (t + j) * to_stride + first, each + j * kRows, kRows * sizeof(Real));
    }
  };
  for (int64_t first = 0; first < n; first += kWide) {
    const Real* row[kWide];
    for (int r = 0; r < kWide; ++r) {
      row[r] = rows.data + (first + r < n ? first + r : n - 1) * rows.stride;
    }
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      run.template operator()<2>(t, row, first);
      run.template operator()<2>(t, row + kWide / 2, first + kWide / 2);
    }
    if (t < count) run.template operator()<1>(t, row, first);
  }
}

// -----------------------------------------------------------------------------------------------
// softmax

// scores * scale + mask, in place; the largest. NaN is none.
MEMTL_INLINE float scale_scores(float* scores, const float* mask, float scale, int64_t n) {
  Floats most = floats(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += kWidth) {
    const Floats x = add(mul(load(scores + i), floats(scale)), load(mask + i));
    store(scores + i, x);
    most = max(x, most);
  }
  float lanes[kWidth];
  store(lanes, most);
  for (int i = 1; i < kWidth; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

MEMTL_INLINE double scale_scores(double* scores, const double* mask, double scale, int64_t n) {
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = scores[i] * scale + mask[i];
    most = scores[i] > most ? scores[i] : most;
  }
  return most;
}

// e^(x - shift), in place; the sum.
MEMTL_INLINE float exponentials(float* x, float shift, int64_t n) {
  Floats total = floats(0);
  for (int64_t i = 0; i < n; i += kWidth) {
    const Floats y = exp(sub(load(x + i), floats(shift)));
    store(x + i, y);
    total = add(total, y);
  }
  float lanes[kWidth];
  store(lanes, total);
  for (int i = 1; i < kWidth; ++i) lanes[0] += lanes[i];
  return lanes[0];
}

MEMTL_INLINE double exponentials(double* x, double shift, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - shift);
  return total;
}

// What is known of a query's softmax over the keys so far: the sum of e^(score - most).
template <class Real>
struct Softmax {
  Real most, sum;
};

// The parts that the keys before a block and those in it have in the mean over all of them.
template <class Real>
struct Parts {
  Real before, block;
};

template <class Real>
MEMTL_INLINE Real finite_shift(Real most) {
  return most == -std::numeric_limits<Real>::infinity() ? 0 : most;  // no key at all
}

// Scores, padded to whole vectors, to probabilities within their block.
template <class Real>
MEMTL_INLINE Softmax<Real> normalize(Real* scores, const Real* mask, Real scale, int64_t padded) {
  const Real most = scale_scores(scores, mask, scale, padded);
  const Real sum = exponentials(scores, finite_shift(most), padded);
  const Real inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t i = 0; i < padded; ++i) scores[i] *= inverse;
  return {most, sum};
}

template <class Real>
MEMTL_INLINE Parts<Real> put_together(Softmax<Real>& so_far, Softmax<Real> block) {
  const Real most = block.most > so_far.most ? block.most : so_far.most;
  const Real shift = finite_shift(most);
  const Real before = so_far.sum * std::exp(so_far.most - shift);
  const Real own = block.sum * std::exp(block.most - shift), sum = before + own;
  so_far = {most, sum};
  if (sum == 0) return {0, 0};
  return {before / sum, own / sum};
}

// -----------------------------------------------------------------------------------------------
// a head

constexpr int64_t kBlockBytes = 1 << 18;  // of keys and values
constexpr int64_t kLeastKeys = 64;        // of a block
constexpr int64_t kPanel = 104;           // keys of a product that fits L1

// Where the parts of a call lie in its room.
template <DType kType>
struct Layout {
  using Real = RealOf<kType>;
  static constexpr int64_t kWide = kLanes<Real>;

  int64_t width, value_width;  // in whole vectors, as are all rows below
  int64_t block, padded;       // keys of a block, and in whole vectors
  bool blocks;                 // more than one
  Real *queries, *grads;       // [T, width], [T, value_width]
  Real *keys, *values;         // of a block, where they are copied
  Real* mask;                  // [padded]
  Real *weights, *slopes;      // [T, padded]
  Real *keys_mean, *values_mean, *block_keys, *block_values;  // [T, a row]
  Real* left;                                                 // [kPanel, width]
  Real* right;                                                // [block, value_width]
  Real* center;                                               // [value_width]
  Real* covariance;                                           // [1 or T, d, value_width]
  Real* gradient;                                             // [T, width]

  Layout(const QueryAttention& a, bool jacobian, bool grad, void* memory)
      : width(round_up(a.width, kWide)),
        value_width(round_up(a.value_width, kWide)),
        start(static_cast<char*>(memory)) {
    const int64_t row = (width + value_width) * static_cast<int64_t>(sizeof(Real));
    const int64_t most = kBlockBytes / (row > 0 ? row : 1);
    block = most > kLeastKeys ? most : kLeastKeys;
    blocks = a.keys > block;
    block = blocks ? block : a.keys;
    padded = round_up(block, kWide);
    const int64_t t = a.queries < kQueryTile ? a.queries : kQueryTile;
    queries = take(t * width);
    grads = take(grad ? t * value_width : 0);
    keys = take(in_place(a.width) ? 0 : block * width);
    values = take(in_place(a.value_width) ? 0 : block * value_width);
    mask = take(padded);
    weights = take(t * padded);
    slopes = take(grad ? t * padded : 0);
    keys_mean = take(t * width);
    values_mean = take(t * value_width);
    block_keys = take(t * width);
    block_values = take(t * value_width);
    left = take(jacobian ? kPanel * width : 0);
    right = take(jacobian ? block * value_width : 0);
    center = take(jacobian ? value_width : 0);
    covariance = take(jacobian ? (blocks ? t : 1) * a.width * value_width : 0);
    gradient = take(grad ? t * width : 0);
  }

  int64_t bytes() const { return taken; }

  // Rows of n elements that vectors can be loaded from as they are.
  static bool in_place(int64_t n) {
    return (kType == DType::f32 || kType == DType::f64) && n % kWide == 0;
  }

 private:
  char* start;  // null where bytes are only counted
  int64_t taken = 0;

  Real* take(int64_t count) {
    const int64_t from = taken;
    taken += round_up(count * static_cast<int64_t>(sizeof(Real)), 64);
    return start == nullptr ? nullptr : reinterpret_cast<Real*>(start + from);
  }
};

MEMTL_INLINE int64_t offset(const QueryRows& rows, int64_t heads, int64_t head, int64_t first) {
  return head / heads * rows.batch + head % heads * rows.head + first * rows.row;
}

// Rows [first, first + count) of a head, n elements each, to `to`, `padded` apart.
template <DType kType, class Real>
void copy_rows(const QueryRows& rows, int64_t heads, int64_t head, int64_t first, int64_t count,
               int64_t n, int64_t padded, Real* to) {
  int64_t from = offset(rows, heads, head, first);
  for (int64_t i = 0; i < count; ++i, from += rows.row, to += padded) {
    read<kType>(rows.data, from, n, padded, to);
  }
}

template <DType kType, class Real>
Rows<Real> block_rows(const QueryRows& rows, int64_t heads, int64_t head, int64_t first,
                      int64_t count, int64_t n, int64_t padded, Real* room) {
  if (Layout<kType>::in_place(n)) {
    return {static_cast<const Real*>(rows.data) + offset(rows, heads, head, first), rows.row};
  }
  copy_rows<kType>(rows, heads, head, first, count, n, padded, room);
  return {room, padded};
}

template <class Real>
struct Block {
  bool first;
  int64_t count, padded;  // keys, and in whole vectors
  Rows<Real> keys, values;
};

// What is added to the scores of a block; -inf beyond it.
template <class Real>
void block_mask(const QueryAttention& a, int64_t head, int64_t first, int64_t count, int64_t padded,
                Real* mask) {
  int64_t from = offset(a.mask, a.heads, head, first);
  for (int64_t n = 0; n < padded; ++n, from += a.mask.row) {
    if (n >= count) {
      mask[n] = -std::numeric_limits<Real>::infinity();
    } else if (a.mask.data == nullptr) {
      mask[n] = 0;
    } else if (a.mask_dtype == DType::f64) {
      mask[n] = static_cast<Real>(static_cast<const double*>(a.mask.data)[from]);
    } else {
      mask[n] = load_float(a.mask_dtype, a.mask.data, from);
    }
  }
}

// The means of rows [T, n] over the keys before a block, and in it, to those over all of them.
template <class Real>
MEMTL_INLINE void add_mean(Parts<Real> parts, const Real* block, int64_t n, Real* mean) {
  for (int64_t i = 0; i < n; ++i) mean[i] = parts.before * mean[i] + parts.block * block[i];
}

template <class Real>
MEMTL_INLINE void fill_zeros(Real* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// to[i, :] = weights[i] * (rows[i, :] - center), or without weights their difference; n is whole
// vectors.
template <bool kWeighted, class Real>
void subtract(Rows<Real> rows, int64_t count, const Real* center, const Real* weights, Real scale,
              int64_t n, Real* to) {
  constexpr int64_t kWide = kLanes<Real>;
  const auto run = [&]<int kVectors>(int64_t j) {
    for (; j + kVectors * kWide <= n; j += kVectors * kWide) {
      Vector<Real> middle[kVectors];
      MEMTL_UNROLL
      for (int v = 0; v < kVectors; ++v) middle[v] = load_vector(center + j + v * kWide);
      for (int64_t i = 0; i < count; ++i) {
        const Real* from = rows.data + i * rows.stride + j;
        const Vector<Real> weight = spread(kWeighted ? scale * weights[i] : scale);
        MEMTL_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vector<Real> apart = load_vector(from + v * kWide) - middle[v];
          store_vector(to + i * n + j + v * kWide, kWeighted ? weight * apart : apart);
        }
      }
    }
    return j;
  };
  run.template operator()<1>(run.template operator()<4>(0));
}

// The values of a block less their mean: the covariance does not change, and nothing cancels.
template <DType kType, class Real>
void center_values(const Layout<kType>& room, const Block<Real>& block) {
  const int64_t n = room.value_width;
  const Real share = 1 / static_cast<Real>(block.count);
  multiply<Real, false>({&share, 0, 0}, block.values.data, block.values.stride, block.count,
                        room.center, n, 1, n, false);
  subtract<false>(block.values, block.count, room.center, room.center, Real{1}, n, room.right);
}

// One query's covariance of keys and values, times `scale`, with that of a block.
template <class Real, DType kType>
void add_covariance(const Layout<kType>& room, int64_t width, const Block<Real>& block, int64_t t,
                    Parts<Real> parts, Real scale, Real* covariance) {
  const int64_t rows = room.width, columns = room.value_width;
  const Real* own_key = room.block_keys + t * rows;
  const Real* own_value = room.block_values + t * columns;
  if (!block.first) {
    const Real* key = room.keys_mean + t * rows;
    const Real* value = room.values_mean + t * columns;
    for (int64_t i = 0; i < width; ++i) {
      const Real apart = scale * parts.before * parts.block * (key[i] - own_key[i]);
      Real* row = covariance + i * columns;
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = parts.before * row[j] + apart * (value[j] - own_value[j]);
      }
    }
  }
  const int64_t each = ceil_div(block.count, ceil_div(block.count, kPanel));
  for (int64_t n = 0; n < block.count; n += each) {
    const int64_t terms = block.count - n < each ? block.count - n : each;
    subtract<true>({block.keys.data + n * block.keys.stride, block.keys.stride}, terms, own_key,
                   room.weights + t * room.padded + n, scale * parts.block, rows, room.left);
    multiply<Real, true>({room.left, 1, rows}, room.right + n * columns, columns, terms, covariance,
                         columns, width, columns, n > 0 || !block.first);
  }
}

// Calls run(block) for every block of keys; the probabilities of the queries, within the block, are
// then in room.weights, and what has come before of them in `softmax` and `parts`.
template <DType kType, class Run>
MEMTL_INLINE void for_blocks(const QueryAttention& a, const Layout<kType>& room, int64_t head,
                             int64_t queries, Softmax<RealOf<kType>>* softmax,
                             Parts<RealOf<kType>>* parts, const Run& run) {
  using Real = RealOf<kType>;
  for (int64_t first = 0; first < a.keys; first += room.block) {
    Block<Real> block;
    block.first = first == 0;
    block.count = a.keys - first < room.block ? a.keys - first : room.block;
    block.padded = round_up(block.count, kLanes<Real>);
    block.keys =
        block_rows<kType>(a.k, a.heads, head, first, block.count, a.width, room.width, room.keys);
    block.values = block_rows<kType>(a.v, a.heads, head, first, block.count, a.value_width,
                                     room.value_width, room.values);
    block_mask(a, head, first, block.count, block.padded, room.mask);
    dots(room.queries, queries, block.keys, block.count, room.width, room.weights, room.padded);
    for (int64_t t = 0; t < queries; ++t) {
      const Softmax<Real> own = normalize(room.weights + t * room.padded, room.mask,
                                          static_cast<Real>(a.scale), block.padded);
      parts[t] = block.first ? Parts<Real>{0, 1} : put_together(softmax[t], own);
      if (block.first) softmax[t] = own;
    }
    run(block);
  }
}

// The means of a block's rows under the probabilities of each query.
template <DType kType, class Real>
void means(const Layout<kType>& room, Rows<Real> rows, int64_t count, int64_t queries, int64_t n,
           Real* to) {
  multiply<Real, false>({room.weights, room.padded, 1}, rows.data, rows.stride, count, to, n,
                        queries, n, false);
}

// sum_n weights[n] * x[n] of whole vectors.
template <class Real>
MEMTL_INLINE Real weighted_sum(const Real* weights, const Real* x, int64_t padded) {
  Vector<Real> sums = {};
  for (int64_t n = 0; n < padded; n += kLanes<Real>) {
    sums = fma(load_vector(weights + n), load_vector(x + n), sums);
  }
  Real sum = 0;
  for (int lane = 0; lane < kLanes<Real>; ++lane) sum += sums[lane];
  return sum;
}

template <class Real>
void write_any(DType dtype, const Real* from, int64_t count, void* to, int64_t first) {
  MEMTL_FOR_DTYPE(dtype, write<kType>(from, count, to, first));
}

// `rows` rows of n elements, `padded` apart, to those from element `first` on.
template <class Real>
void write_rows(DType dtype, const Real* from, int64_t rows, int64_t n, int64_t padded, void* to,
                int64_t first) {
  if (n == padded) return write_any(dtype, from, rows * n, to, first);
  for (int64_t i = 0; i < rows; ++i) write_any(dtype, from + i * padded, n, to, first + i * n);
}

template <DType kType>
void forward_typed(const QueryAttention& a, int64_t head, int64_t first, int64_t last, void* out,
                   DType jacobian_dtype, void* jacobian, void* memory) {
  using Real = RealOf<kType>;
  const Layout<kType> room(a, jacobian != nullptr, false, memory);
  const int64_t queries = last - first, row = head * a.queries + first;
  const int64_t size = a.width * room.value_width;
  const auto scale = static_cast<Real>(a.scale);
  // Where the room for a covariance is that of the Jacobian itself, it is made there.
  const bool made_there = a.value_width == room.value_width &&
                          jacobian_dtype == (kType == DType::f64 ? DType::f64 : DType::f32);
  const auto covariance = [&](int64_t t) {
    if (made_there) return static_cast<Real*>(jacobian) + (row + t) * size;
    return room.covariance + (room.blocks ? t * size : 0);
  };
  const auto write_jacobian = [&](int64_t t) {
    if (made_there) return;
    write_rows(jacobian_dtype, covariance(t), a.width, a.value_width, room.value_width, jacobian,
               (row + t) * a.width * a.value_width);
  };
  copy_rows<kType>(a.q, a.heads, head, first, queries, a.width, room.width, room.queries);
  fill_zeros(room.values_mean, queries * room.value_width);
  if (jacobian != nullptr) fill_zeros(room.keys_mean, queries * room.width);
  Softmax<Real> softmax[kQueryTile];
  Parts<Real> parts[kQueryTile];
  for_blocks(a, room, head, queries, softmax, parts, [&](const Block<Real>& block) {
    means(room, block.values, block.count, queries, room.value_width, room.block_values);
    if (jacobian != nullptr) {
      means(room, block.keys, block.count, queries, room.width, room.block_keys);
      center_values(room, block);
      for (int64_t t = 0; t < queries; ++t) {
        add_covariance(room, a.width, block, t, parts[t], scale, covariance(t));
        if (!room.blocks) write_jacobian(t);
        add_mean(parts[t], room.block_keys + t * room.width, room.width,
                 room.keys_mean + t * room.width);
      }
    }
    for (int64_t t = 0; t < queries; ++t) {
      add_mean(parts[t], room.block_values + t * room.value_width, room.value_width,
               room.values_mean + t * room.value_width);
    }
  });
  write_rows(kType, room.values_mean, queries, a.value_width, room.value_width, out,
             row * a.value_width);
  if (jacobian == nullptr || (a.keys > 0 && !room.blocks)) return;
  for (int64_t t = 0; t < queries; ++t) {
    if (a.keys == 0) fill_zeros(covariance(t), size);
    write_jacobian(t);
  }
}

// dq = scale * the covariance of grad_out . v and k.
template <DType kType>
void grad_typed(const QueryAttention& a, const QueryRows& grad_out, int64_t head, int64_t first,
                int64_t last, void* grad_q, void* memory) {
  using Real = RealOf<kType>;
  const Layout<kType> room(a, false, true, memory);
  const int64_t queries = last - first, width = room.width;
  copy_rows<kType>(a.q, a.heads, head, first, queries, a.width, width, room.queries);
  copy_rows<kType>(grad_out, a.heads, head, first, queries, a.value_width, room.value_width,
                   room.grads);
  fill_zeros(room.gradient, queries * width);
  fill_zeros(room.keys_mean, queries * width);
  Softmax<Real> softmax[kQueryTile];
  Parts<Real> parts[kQueryTile];
  Real slopes_mean[kQueryTile] = {};
  for_blocks(a, room, head, queries, softmax, parts, [&](const Block<Real>& block) {
    dots(room.grads, queries, block.values, block.count, room.value_width, room.slopes,
         room.padded);
    if (room.blocks) means(room, block.keys, block.count, queries, width, room.block_keys);
    for (int64_t t = 0; t < queries; ++t) {
      Real *weights = room.weights + t * room.padded, *slopes = room.slopes + t * room.padded;
      fill_zeros(slopes + block.count, block.padded - block.count);
      // Twice: what the first mean is off by would come times the mean of the keys.
      Real own = 0;
      for (int round = 0; round < 2; ++round) {
        const Real mean = weighted_sum(weights, slopes, block.padded);
        for (int64_t n = 0; n < block.count; ++n) slopes[n] -= mean;
        own += mean;
      }
      if (!block.first) {
        const Real apart = parts[t].before * parts[t].block * (slopes_mean[t] - own);
        Real* gradient = room.gradient + t * width;
        for (int64_t i = 0; i < width; ++i) {
          const Real key = room.keys_mean[t * width + i] - room.block_keys[t * width + i];
          gradient[i] = parts[t].before * gradient[i] + apart * key;
        }
      }
      for (int64_t n = 0; n < block.count; ++n) weights[n] *= parts[t].block * slopes[n];
      slopes_mean[t] = parts[t].before * slopes_mean[t] + parts[t].block * own;
      if (room.blocks) {
        add_mean(parts[t], room.block_keys + t * width, width, room.keys_mean + t * width);
      }
    }
    multiply<Real, false>({room.weights, room.padded, 1}, block.keys.data, block.keys.stride,
                          block.count, room.gradient, width, queries, width, true);
  });
  for (int64_t i = 0; i < queries * width; ++i) room.gradient[i] *= static_cast<Real>(a.scale);
  write_rows(kType, room.gradient, queries, a.width, width, grad_q,
             (head * a.queries + first) * a.width);
}

template <DType kType>
int64_t room_typed(const QueryAttention& a, bool jacobian, bool grad) {
  return Layout<kType>(a, jacobian, grad, nullptr).bytes();
}

int64_t room(const QueryAttention& a, bool jacobian, bool grad) {
  MEMTL_FOR_DTYPE(a.dtype, room_typed<kType>(a, jacobian, grad));
}

void forward(const QueryAttention& a, int64_t head, int64_t first, int64_t last, void* out,
             DType jacobian_dtype, void* jacobian, void* room) {
  MEMTL_FOR_DTYPE(a.dtype,
                  forward_typed<kType>(a, head, first, last, out, jacobian_dtype, jacobian, room));
}

void grad(const QueryAttention& a, const QueryRows& grad_out, int64_t head, int64_t first,
          int64_t last, void* grad_q, void* room) {
  MEMTL_FOR_DTYPE(a.dtype, grad_typed<kType>(a, grad_out, head, first, last, grad_q, room));
}

}  // namespace

const QueryAttentionKernels query_attention = {room, forward, grad};

}  // namespace memtl::MEMTL_ISA_NS
