// Vectors of sums, and the tiles they make. Here a product may be fused with its sum.
#pragma once

#include "common/simd.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

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

}  // namespace
}  // namespace memtl::MEMTL_ISA_NS
