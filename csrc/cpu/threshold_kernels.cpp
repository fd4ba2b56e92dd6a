#include "threshold.h"

#include <type_traits>

#include "common/simd.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

template <DType kType>
using Key = std::conditional_t<kType == DType::f64, uint64_t,
                               std::conditional_t<kType == DType::f32, uint32_t, uint16_t>>;

// kLanes keys, and which of them are greater than those of another, a bit each. Keys have their
// sign bit clear, so that signed comparisons do.
template <DType kType>
constexpr Key<kType> kPositive = static_cast<Key<kType>>(~Key<kType>{0}) >> 1;
template <DType kType>
constexpr Key<kType> kNan = static_cast<Key<kType>>(infinite_key(kType) + 1);

#if defined(__AVX512F__)

template <DType kType>
constexpr int kLanes = 64 / sizeof(Key<kType>);
using Keys = __m512i;

template <DType kType>
MEMTL_INLINE Keys keys(uint64_t key) {
  if constexpr (kType == DType::f64) return _mm512_set1_epi64(static_cast<int64_t>(key));
  if constexpr (kType == DType::f32) return _mm512_set1_epi32(static_cast<int32_t>(key));
  return _mm512_set1_epi16(static_cast<int16_t>(key));
}

template <DType kType>
MEMTL_INLINE Keys load_keys(const Key<kType>* x) {
  const Keys magnitude = _mm512_and_si512(_mm512_loadu_si512(x), keys<kType>(kPositive<kType>));
  const Keys nan = keys<kType>(kNan<kType>);
  if constexpr (kType == DType::f64) return _mm512_min_epu64(magnitude, nan);
  if constexpr (kType == DType::f32) return _mm512_min_epu32(magnitude, nan);
  return _mm512_min_epu16(magnitude, nan);
}

template <DType kType>
MEMTL_INLINE uint32_t greater_keys(Keys a, Keys b) {
  if constexpr (kType == DType::f64) return _mm512_cmpgt_epi64_mask(a, b);
  if constexpr (kType == DType::f32) return _mm512_cmpgt_epi32_mask(a, b);
  return _mm512_cmpgt_epi16_mask(a, b);
}

template <DType kType>
MEMTL_INLINE void store_keys(Key<kType>* out, Keys a) {
  _mm512_storeu_si512(out, a);
}

#elif defined(__AVX2__)

template <DType kType>
constexpr int kLanes = kType == DType::f64 ? 8 : 32 / sizeof(Key<kType>);
struct Keys {
  __m256i low, high;  // high of float64 alone: a byte of bits for 8 lanes
};

template <DType kType>
MEMTL_INLINE Keys keys(uint64_t key) {
  __m256i all;
  if constexpr (kType == DType::f64) {
    all = _mm256_set1_epi64x(static_cast<int64_t>(key));
  } else if constexpr (kType == DType::f32) {
    all = _mm256_set1_epi32(static_cast<int32_t>(key));
  } else {
    all = _mm256_set1_epi16(static_cast<int16_t>(key));
  }
  return {all, all};
}

template <DType kType>
MEMTL_INLINE Keys load_keys(const Key<kType>* x) {
  const __m256i positive = keys<kType>(kPositive<kType>).low, nan = keys<kType>(kNan<kType>).low;
  const auto half = [&](const Key<kType>* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i magnitude = _mm256_and_si256(bits, positive);
    if constexpr (kType == DType::f64) {
      return _mm256_blendv_epi8(magnitude, nan, _mm256_cmpgt_epi64(magnitude, nan));
    } else if constexpr (kType == DType::f32) {
      return _mm256_min_epu32(magnitude, nan);
    } else {
      return _mm256_min_epu16(magnitude, nan);
    }
  };
  if constexpr (kType == DType::f64) return {half(x), half(x + 4)};
  return {half(x), nan};
}

template <DType kType>
MEMTL_INLINE uint32_t greater_keys(const Keys& a, const Keys& b) {
  if constexpr (kType == DType::f64) {
    const auto half = [](__m256i p, __m256i q) {
      return static_cast<uint32_t>(
          _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(p, q))));
    };
    return half(a.low, b.low) | half(a.high, b.high) << 4;
  } else if constexpr (kType == DType::f32) {
    const __m256 above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(a.low, b.low));
    return static_cast<uint32_t>(_mm256_movemask_ps(above));
  } else {
    const int above = _mm256_movemask_epi8(_mm256_cmpgt_epi16(a.low, b.low));
    return _pext_u32(static_cast<uint32_t>(above), 0x55555555);
  }
}

template <DType kType>
MEMTL_INLINE void store_keys(Key<kType>* out, const Keys& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a.low);
  if constexpr (kType == DType::f64) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4), a.high);
  }
}

#else

template <DType kType>
constexpr int kLanes = 8;
struct Keys {
  int64_t lane[8];
};

template <DType kType>
MEMTL_INLINE Keys keys(uint64_t key) {
  Keys all;
  for (int64_t& lane : all.lane) lane = static_cast<int64_t>(key);
  return all;
}

template <DType kType>
MEMTL_INLINE Keys load_keys(const Key<kType>* x) {
  Keys loaded;
  for (int i = 0; i < 8; ++i) {
    const auto magnitude = static_cast<Key<kType>>(x[i] & kPositive<kType>);
    loaded.lane[i] = static_cast<int64_t>(magnitude < kNan<kType> ? magnitude : kNan<kType>);
  }
  return loaded;
}

template <DType kType>
MEMTL_INLINE uint32_t greater_keys(const Keys& a, const Keys& b) {
  uint32_t above = 0;
  for (int i = 0; i < 8; ++i) above |= static_cast<uint32_t>(a.lane[i] > b.lane[i]) << i;
  return above;
}

template <DType kType>
MEMTL_INLINE void store_keys(Key<kType>* out, const Keys& a) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<Key<kType>>(a.lane[i]);
}

#endif

template <DType kType>
constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kLanes<kType>)-1);

// Calls visit(i, keys, lanes) for groups of kLanes elements from i on, `lanes` having a bit for
// each one that counts.
template <DType kType, class Visit>
MEMTL_INLINE void for_groups(const void* x, const uint8_t* mask, int64_t first, int64_t last,
                             const Visit& visit) {
  constexpr int kBytes = kLanes<kType> / 8;
  const auto* elements = static_cast<const Key<kType>*>(x);
  int64_t i = first;
  for (; i + kLanes<kType> <= last; i += kLanes<kType>) {
    uint32_t lanes = kAllLanes<kType>;
    if (mask != nullptr) {
      lanes = 0;
      std::memcpy(&lanes, mask + i / 8, kBytes);
    }
    visit(i, load_keys<kType>(elements + i), lanes);
  }
  if (i < last) {
    const auto count = static_cast<size_t>(last - i);
    Key<kType> rest[kLanes<kType>] = {};
    std::memcpy(rest, elements + i, count * sizeof *rest);
    uint32_t lanes = ~0u;
    if (mask != nullptr) std::memcpy(&lanes, mask + i / 8, (count + 7) / 8);
    visit(i, load_keys<kType>(rest), lanes & ((1u << count) - 1));
  }
}

// Which of a group are above a range, and which in it.
struct Split {
  uint32_t above, inside;
};

template <DType kType>
struct Splitter {
  Keys below, top;
  inline __attribute__((always_inline)) explicit Splitter(uint64_t lo, uint64_t hi)
      : below(keys<kType>(lo - 1)), top(keys<kType>(hi)) {}
  inline __attribute__((always_inline)) Split operator()(const Keys& group, uint32_t lanes) const {
    const uint32_t above = greater_keys<kType>(group, top);
    return {above & lanes, greater_keys<kType>(group, below) & ~above & lanes};
  }
};

// Calls visit(key) for those in a range; returns how many are above it.
template <DType kType, class Visit>
MEMTL_INLINE int64_t visit_range(const void* x, const uint8_t* mask, int64_t first, int64_t last,
                                 KeyRange range, const Visit& visit) {
  const Splitter<kType> split(range.lo, range.hi);
  int64_t above = 0;
  for_groups<kType>(x, mask, first, last, [&](int64_t, const Keys& group, uint32_t lanes) {
    auto [over, inside] = split(group, lanes);
    above += __builtin_popcount(over);
    if (inside == 0) return;
    Key<kType> key[kLanes<kType>];
    store_keys<kType>(key, group);
    if (inside == kAllLanes<kType>) {
      for (int i = 0; i < kLanes<kType>; ++i) visit(key[i]);
    } else {
      for (; inside != 0; inside &= inside - 1) visit(key[__builtin_ctz(inside)]);
    }
  });
  return above;
}

// Where all go into one bucket, each addition would wait for the last.
template <DType kType>
int64_t count_equal(const void* x, const uint8_t* mask, int64_t first, int64_t last, uint64_t key,
                    uint32_t* bucket) {
  const Splitter<kType> split(key, key);
  int64_t above = 0;
  for_groups<kType>(x, mask, first, last, [&](int64_t, const Keys& group, uint32_t lanes) {
    const Split parts = split(group, lanes);
    above += __builtin_popcount(parts.above);
    *bucket += static_cast<uint32_t>(__builtin_popcount(parts.inside));
  });
  return above;
}

template <DType kType>
int64_t count_typed(const void* x, const uint8_t* mask, int64_t first, int64_t last, KeyRange range,
                    uint32_t* buckets) {
  if (range.lo == range.hi) return count_equal<kType>(x, mask, first, last, range.lo, buckets);
  return visit_range<kType>(x, mask, first, last, range,
                            [&](uint64_t key) { ++buckets[(key - range.lo) >> range.shift]; });
}

template <DType kType>
int64_t collect_typed(const void* x, const uint8_t* mask, int64_t first, int64_t last,
                      KeyRange range, void* found, int64_t* above) {
  auto* out = static_cast<Key<kType>*>(found);
  *above += visit_range<kType>(x, mask, first, last, range, [&](Key<kType> key) { *out++ = key; });
  return out - static_cast<Key<kType>*>(found);
}

template <DType kType>
int64_t mark_typed(const void* x, const uint8_t* mask, int64_t first, int64_t last, uint64_t key,
                   int64_t quota, uint8_t* bits) {
  const Splitter<kType> split(key, key);
  int64_t found = 0;
  for_groups<kType>(x, mask, first, last, [&](int64_t i, const Keys& group, uint32_t lanes) {
    const auto [over, equal] = split(group, lanes);
    const int64_t count = __builtin_popcount(equal);
    uint32_t kept = equal;
    for (int64_t surplus = found + count - quota; surplus > 0 && kept != 0; --surplus) {
      kept &= ~(0x80000000u >> __builtin_clz(kept));  // the last ones go
    }
    found += count;
    const uint32_t set = over | kept;
    const int64_t left = last - i;
    std::memcpy(bits + i / 8, &set,
                static_cast<size_t>(left < kLanes<kType> ? ceil_div(left, 8) : kLanes<kType> / 8));
  });
  return found;
}

int64_t count(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
              KeyRange range, uint32_t* buckets){
    MEMTL_FOR_DTYPE(dtype, count_typed<kType>(x, mask, first, last, range, buckets))}

int64_t collect(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
                KeyRange range, void* found, int64_t* above){
    MEMTL_FOR_DTYPE(dtype, collect_typed<kType>(x, mask, first, last, range, found, above))}

int64_t mark(DType dtype, const void* x, const uint8_t* mask, int64_t first, int64_t last,
             uint64_t key, int64_t quota, uint8_t* bits) {
  MEMTL_FOR_DTYPE(dtype, mark_typed<kType>(x, mask, first, last, key, quota, bits))
}

}  // namespace

const ThresholdKernels threshold = {count, collect, mark};

}  // namespace memtl::MEMTL_ISA_NS
