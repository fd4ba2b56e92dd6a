// What cuda/tensor_core.cuh has of instructions, for the host shim. Include it behind host_shim.h
// and before the .cuh.
//
// Products are exact and summed in the order of k. Copies are made when they are waited for, so
// that who does not wait reads what was there before.
#pragma once

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "cuda/scalar.cuh"
#include "tests/host_shim.h"

namespace memtl::tests {

struct Copy {
  void* to;
  const void* from;
  bool there;
};
inline std::map<unsigned, std::vector<Copy>> copies;  // of each thread of the running block

inline bool at16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// All lanes of a warp bring an address, and see all of them.
inline std::array<uint64_t, kWarp> gathered(const char* call, uint64_t brought) {
  return running.meet(call, kAllLanes, brought, [](const uint64_t* all) {
    std::array<uint64_t, kWarp> copy;
    std::copy_n(all, kWarp, copy.begin());
    return copy;
  });
}

// What a lane brings to a product.
struct Fragments {
  uint32_t a[4], b[2];
};

// Number `half` of a register.
template <class T>
float number(uint32_t pair, unsigned half) {
  return cuda::to_math(T{static_cast<uint16_t>(pair >> (16 * half))});
}

}  // namespace memtl::tests

namespace memtl::cuda {

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  if (!tests::at16(row)) tests::undefined("a row of a matrix does not begin at 16 bytes");
  const auto rows = tests::gathered("load_transposed", tests::packed(row));
  const unsigned lane = tests::running.thread() % tests::kWarp;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    to[matrix] = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const auto* numbers =
          tests::unpacked<const unsigned char*>(rows[8 * matrix + 2 * (lane % 4) + half]);
      uint16_t bits;
      std::memcpy(&bits, numbers + 2 * (lane / 4), sizeof bits);
      to[matrix] |= static_cast<uint32_t>(bits) << (16 * half);
    }
  }
}

template <class T>
void mma_16x8x16(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const tests::Unseen shim;
  const tests::Fragments own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto all = tests::gathered("mma", tests::packed(&own));
  const unsigned lane = tests::running.thread() % tests::kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    // Lane 4 r + q has of A the rows r and r + 8, of B column r, both at k = 2 q, + 1, + 8, + 9.
    const unsigned high_row = i / 2, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quarter = k % 8 / 2, high_k = k / 8;
      const auto* left = tests::unpacked<const tests::Fragments*>(all[lane / 4 * 4 + quarter]);
      const auto* right = tests::unpacked<const tests::Fragments*>(all[4 * column + quarter]);
      c[i] += tests::number<T>(left->a[2 * high_k + high_row], k % 2) *
              tests::number<T>(right->b[high_k], k % 2);
    }
  }
  tests::gathered("mma", 0);  // until then others read `own`
}

inline void copy16_async(void* to_shared, const void* from, bool there) {
  if (!tests::at16(to_shared) || !tests::at16(from)) tests::undefined("a copy not at 16 bytes");
  const tests::Unseen shim;
  tests::copies[tests::running.thread()].push_back({to_shared, from, there});
}

inline void await_copies() {
  const std::vector<tests::Copy> own = [] {
    const tests::Unseen shim;
    return std::exchange(tests::copies[tests::running.thread()], {});
  }();
  for (const tests::Copy& copy : own) {
    if (copy.there) std::memcpy(copy.to, copy.from, 16);
    if (!copy.there) std::memset(copy.to, 0, 16);
  }
}

template <class T>
uint32_t rounded_pair(T, float low, float high) {
  return from_math<T>(low).bits | static_cast<uint32_t>(from_math<T>(high).bits) << 16;
}

}  // namespace memtl::cuda
