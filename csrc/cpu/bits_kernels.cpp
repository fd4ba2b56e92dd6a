#include "bits.h"
#include "common/simd.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

// The byte of 8 mask bytes.
MEMTL_INLINE uint8_t pack_byte(const uint8_t* mask) {
  uint64_t x;
  std::memcpy(&x, mask, sizeof x);
  x |= x >> 4;  // gathers every byte's bits in its lowest one
  x |= x >> 2;
  x |= x >> 1;
  return static_cast<uint8_t>(((x & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

void pack(const uint8_t* mask, int64_t numel, uint8_t* bits, int64_t first, int64_t last) {
  int64_t i = first;
  const int64_t full = last < numel / 8 ? last : numel / 8;
#if defined(__AVX512F__)
  for (; i + 8 <= full; i += 8) {
    const __m512i bytes = _mm512_loadu_si512(mask + 8 * i);
    const __mmask64 set = _mm512_test_epi8_mask(bytes, bytes);
    std::memcpy(bits + i, &set, sizeof set);
  }
#elif defined(__AVX2__)
  for (; i + 4 <= full; i += 4) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 8 * i));
    const __m256i zero = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    const uint32_t set = ~static_cast<uint32_t>(_mm256_movemask_epi8(zero));
    std::memcpy(bits + i, &set, sizeof set);
  }
#endif
  for (; i < full; ++i) bits[i] = pack_byte(mask + 8 * i);
  if (i < last) {
    uint8_t padded[8] = {};
    std::memcpy(padded, mask + 8 * i, static_cast<size_t>(numel - 8 * i));
    bits[i] = pack_byte(padded);
  }
}

template <DType kType>
MEMTL_INLINE bool is_between(const void* x, int64_t i, double lo, double hi) {
  if constexpr (kType == DType::f64) {
    const double value = static_cast<const double*>(x)[i];
    return !(value <= lo) & !(value >= hi);
  } else {
    const float value = load_float(kType, x, i);
    return !(value <= static_cast<float>(lo)) & !(value >= static_cast<float>(hi));
  }
}

// A bit for each of kWidth numbers.
#if defined(__AVX512F__)
MEMTL_INLINE void store_between(Floats x, Floats lo, Floats hi, uint8_t* bits) {
  const __mmask16 outside =
      _mm512_cmp_ps_mask(x, lo, _CMP_LE_OQ) | _mm512_cmp_ps_mask(x, hi, _CMP_GE_OQ);
  const auto set = static_cast<uint16_t>(~outside);
  std::memcpy(bits, &set, sizeof set);
}
#elif defined(__AVX2__)
MEMTL_INLINE void store_between(Floats x, Floats lo, Floats hi, uint8_t* bits) {
  const __m256 outside =
      _mm256_or_ps(_mm256_cmp_ps(x, lo, _CMP_LE_OQ), _mm256_cmp_ps(x, hi, _CMP_GE_OQ));
  *bits = static_cast<uint8_t>(~_mm256_movemask_ps(outside));
}
#endif

template <DType kType>
void pack_between_typed(const void* x, double lo, double hi, int64_t i, int64_t end,
                        uint8_t* bits) {
#if defined(__AVX2__)
  if constexpr (kType != DType::f64) {
    const Floats low = floats(static_cast<float>(lo)), high = floats(static_cast<float>(hi));
    for (; i + kWidth <= end; i += kWidth) {
      store_between(load<kType>(x, i), low, high, bits + i / 8);
    }
  }
#endif
  for (; i + 64 <= end; i += 64) {  // a byte an element first: the compiler vectorises that
    uint8_t inside[64];
    for (int64_t j = 0; j < 64; ++j) inside[j] = is_between<kType>(x, i + j, lo, hi);
    for (int64_t j = 0; j < 64; j += 8) bits[(i + j) / 8] = pack_byte(inside + j);
  }
  for (; i < end; i += 8) {
    unsigned byte = 0;
    const int64_t count = end - i < 8 ? end - i : 8;
    for (int64_t j = 0; j < count; ++j) {
      byte |= static_cast<unsigned>(is_between<kType>(x, i + j, lo, hi)) << j;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

void pack_between(DType dtype, const void* x, double lo, double hi, int64_t numel, uint8_t* bits,
                  int64_t first, int64_t last) {
  const int64_t begin = 8 * first;
  const int64_t end = 8 * last < numel ? 8 * last : numel;
  MEMTL_FOR_DTYPE(dtype, pack_between_typed<kType>(x, lo, hi, begin, end, bits))
}

// 8 elements.
#if defined(__AVX512F__)
MEMTL_INLINE void apply_doubles(const double* x, const uint8_t* bits, double scale, double* out) {
  _mm512_storeu_pd(out, _mm512_maskz_mul_pd(*bits, _mm512_loadu_pd(x), _mm512_set1_pd(scale)));
}
#elif defined(__AVX2__)
MEMTL_INLINE void apply_doubles(const double* x, const uint8_t* bits, double scale, double* out) {
  for (int half = 0; half < 2; ++half) {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i byte = _mm256_set1_epi64x(*bits >> (4 * half));
    const __m256i keep = _mm256_cmpeq_epi64(_mm256_and_si256(byte, bit), bit);
    const __m256d product = _mm256_mul_pd(_mm256_loadu_pd(x + 4 * half), _mm256_set1_pd(scale));
    _mm256_storeu_pd(out + 4 * half, _mm256_and_pd(product, _mm256_castsi256_pd(keep)));
  }
}
#endif

// The 8 elements from i on, byte telling which to keep, or as many of them as there are.
template <DType kType>
MEMTL_INLINE void apply_byte(const void* x, uint8_t byte, double scale, void* out, int64_t i,
                             int64_t count) {
  for (int64_t j = 0; j < count; ++j) {  // no branch on the bits: they are hard to predict
    const uint32_t keep = 0u - ((byte >> j) & 1u);
    if constexpr (kType == DType::f64) {
      const double product = static_cast<const double*>(x)[i + j] * scale;
      uint64_t raw;
      std::memcpy(&raw, &product, sizeof raw);
      raw &= static_cast<uint64_t>(keep) << 32 | keep;
      std::memcpy(static_cast<double*>(out) + i + j, &raw, sizeof raw);
    } else {
      const float product = load_float(kType, x, i + j) * static_cast<float>(scale);
      store_float(kType, out, i + j, bits_float(float_bits(product) & keep));
    }
  }
}

template <DType kType>
void apply_typed(const void* x, const uint8_t* bits, double scale, void* out, int64_t i,
                 int64_t end) {
#if defined(__AVX2__)
  if constexpr (kType == DType::f64) {
    for (; i + 8 <= end; i += 8) {
      apply_doubles(static_cast<const double*>(x) + i, bits + i / 8, scale,
                    static_cast<double*>(out) + i);
    }
  } else {
    const Floats factor = floats(static_cast<float>(scale));
    for (; i + kWidth <= end; i += kWidth) {
      const Floats product = mul(load<kType>(x, i), factor);
      store<kType>(out, i, select(mask_of_bits(bits + i / 8), product, floats(0.0f)));
    }
  }
#endif
  for (; i + 8 <= end; i += 8) apply_byte<kType>(x, bits[i / 8], scale, out, i, 8);
  if (i < end) apply_byte<kType>(x, bits[i / 8], scale, out, i, end - i);
}

void apply(DType dtype, const void* x, const uint8_t* bits, double scale, int64_t numel, void* out,
           int64_t first, int64_t last) {
  const int64_t begin = 8 * first;
  const int64_t end = 8 * last < numel ? 8 * last : numel;
  switch (dtype) {
    case DType::f64:
      return apply_typed<DType::f64>(x, bits, scale, out, begin, end);
    case DType::bf16:
      return apply_typed<DType::bf16>(x, bits, scale, out, begin, end);
    case DType::f16:
      return apply_typed<DType::f16>(x, bits, scale, out, begin, end);
    default:
      return apply_typed<DType::f32>(x, bits, scale, out, begin, end);
  }
}

// The bits of elements [i, i + 64), of the first numel.
MEMTL_INLINE uint64_t word_at(const uint8_t* bits, int64_t i, int64_t numel) {
  uint64_t word = 0;
  const int64_t left = numel - i;
  if (left >= 64) {
    std::memcpy(&word, bits + i / 8, sizeof word);
    return word;
  }
  std::memcpy(&word, bits + i / 8, static_cast<size_t>(ceil_div(left, 8)));
  return word & ((uint64_t{1} << left) - 1);
}

int64_t count(const uint8_t* bits, int64_t numel, int64_t first, int64_t last) {
  const int64_t end = 8 * last < numel ? 8 * last : numel;
  int64_t set = 0;
  for (int64_t i = 8 * first; i < end; i += 64) {
    set += __builtin_popcountll(word_at(bits, i, end));
  }
  return set;
}

#if defined(__AVX512F__)
// 64 bytes of elements: those whose bit is set side by side, or apart again.
template <class T>
MEMTL_INLINE __m512i compress(uint64_t set, __m512i x) {
  if constexpr (sizeof(T) == 8) return _mm512_maskz_compress_epi64(static_cast<__mmask8>(set), x);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), x);
  return _mm512_maskz_compress_epi16(static_cast<__mmask32>(set), x);
}

template <class T>
MEMTL_INLINE __m512i spread(uint64_t set, __m512i x) {
  if constexpr (sizeof(T) == 8) return _mm512_maskz_expand_epi64(static_cast<__mmask8>(set), x);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_expand_epi32(static_cast<__mmask16>(set), x);
  return _mm512_maskz_expand_epi16(static_cast<__mmask32>(set), x);
}

// 64 bytes at p, or fewer, where no more are p's.
MEMTL_INLINE __m512i load_up_to(const void* p, int64_t bytes) {
  return bytes >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first_bytes(bytes), p);
}

MEMTL_INLINE void store_up_to(void* p, __m512i x, int64_t bytes) {
  if (bytes >= 64) {
    _mm512_storeu_si512(p, x);
  } else {
    _mm512_mask_storeu_epi8(p, first_bytes(bytes), x);
  }
}
#endif

template <class T>
void select_typed(const T* x, const uint8_t* bits, int64_t numel, T* selected, int64_t first,
                  int64_t last) {
  const int64_t end = 8 * last < numel ? 8 * last : numel;
#if defined(__AVX512F__)
  constexpr int kLanes = 64 / sizeof(T);
  T* const stop = selected + count(bits, numel, first, last);
#endif
  for (int64_t i = 8 * first; i < end; i += 64) {
    uint64_t word = word_at(bits, i, end);
#if defined(__AVX512F__)
    const int64_t here = end - i < 64 ? end - i : 64;
    for (int j = 0; j < here; j += kLanes) {
      const uint64_t set = word >> j & ((uint64_t{1} << kLanes) - 1);
      const __m512i read = load_up_to(x + i + j, (end - i - j) * static_cast<int64_t>(sizeof(T)));
      store_up_to(selected, compress<T>(set, read),
                  (stop - selected) * static_cast<int64_t>(sizeof(T)));
      selected += __builtin_popcountll(set);
    }
#else
    for (; word != 0; word &= word - 1) *selected++ = x[i + __builtin_ctzll(word)];
#endif
  }
}

template <class T>
void expand_typed(const T* values, const uint8_t* bits, int64_t numel, T* out, int64_t first,
                  int64_t last) {
  const int64_t end = 8 * last < numel ? 8 * last : numel;
#if defined(__AVX512F__)
  constexpr int kLanes = 64 / sizeof(T);
  const T* const stop = values + count(bits, numel, first, last);
#endif
  for (int64_t i = 8 * first; i < end; i += 64) {
    uint64_t word = word_at(bits, i, end);
    const int64_t here = end - i < 64 ? end - i : 64;
#if defined(__AVX512F__)
    for (int j = 0; j < here; j += kLanes) {
      const uint64_t set = word >> j & ((uint64_t{1} << kLanes) - 1);
      const __m512i read = load_up_to(values, (stop - values) * static_cast<int64_t>(sizeof(T)));
      store_up_to(out + i + j, spread<T>(set, read),
                  (end - i - j) * static_cast<int64_t>(sizeof(T)));
      values += __builtin_popcountll(set);
    }
#else
    std::memset(out + i, 0, static_cast<size_t>(here) * sizeof(T));
    for (; word != 0; word &= word - 1) out[i + __builtin_ctzll(word)] = *values++;
#endif
  }
}

// `call` with the unsigned integer of that many bytes as T.
#define MEMTL_FOR_SIZE(size, call) \
  if ((size) == 8) {               \
    using T = uint64_t;            \
    call;                          \
  } else if ((size) == 4) {        \
    using T = uint32_t;            \
    call;                          \
  } else {                         \
    using T = uint16_t;            \
    call;                          \
  }

void select(int64_t size, const void* x, const uint8_t* bits, int64_t numel, void* selected,
            int64_t first, int64_t last) {
  MEMTL_FOR_SIZE(size, select_typed(static_cast<const T*>(x), bits, numel,
                                    static_cast<T*>(selected), first, last))
}

void expand(int64_t size, const void* values, const uint8_t* bits, int64_t numel, void* out,
            int64_t first, int64_t last) {
  MEMTL_FOR_SIZE(size, expand_typed(static_cast<const T*>(values), bits, numel,
                                    static_cast<T*>(out), first, last))
}

}  // namespace

const BitsKernels bits = {pack, pack_between, apply, count, select, expand};

}  // namespace memtl::MEMTL_ISA_NS
