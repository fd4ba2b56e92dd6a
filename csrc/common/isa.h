// The instruction sets a kernel is compiled for, and the one in use.
#pragma once

namespace memtl {

enum class Isa { portable, avx2, avx512 };

// The instruction set in use. At first: MEMTL_ISA, else the best that was built and that this
// machine runs. Throws std::invalid_argument where MEMTL_ISA names one that cannot be used.
Isa isa();
Isa detected();
void set_isa(Isa wanted);  // throws std::invalid_argument where the machine or the build lacks it

bool available(Isa wanted);          // built, and this machine runs it
const char* name(Isa isa);           // "portable", "avx2", "avx512"
Isa parse_isa(const char* spelled);  // throws std::invalid_argument

// MEMTL_HAS_AVX2 and MEMTL_HAS_AVX512 say which tables CMakeLists.txt had compiled.
#if defined(MEMTL_HAS_AVX2)
#define MEMTL_IF_AVX2(...) __VA_ARGS__
#else
#define MEMTL_IF_AVX2(...)
#endif
#if defined(MEMTL_HAS_AVX512)
#define MEMTL_IF_AVX512(...) __VA_ARGS__
#else
#define MEMTL_IF_AVX512(...)
#endif

// Inside namespace memtl, declares a family's table of kernels once for every instruction set, and
// <family>_kernels(), the table of the one in use.
#define MEMTL_DECLARE_KERNELS(Table, family)                     \
  namespace portable {                                           \
  extern const Table family;                                     \
  }                                                              \
  namespace avx2 {                                               \
  extern const Table family;                                     \
  }                                                              \
  namespace avx512 {                                             \
  extern const Table family;                                     \
  }                                                              \
  static inline const Table& family##_kernels() {                \
    switch (isa()) {                                             \
      MEMTL_IF_AVX512(case Isa::avx512 : return avx512::family;) \
      MEMTL_IF_AVX2(case Isa::avx2 : return avx2::family;)       \
      default:                                                   \
        return portable::family;                                 \
    }                                                            \
  }

}  // namespace memtl
