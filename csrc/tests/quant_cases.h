// What the tests of quant's device code share. Include it behind the shim.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "cpu/quant.h"
#include "cuda/quant.cuh"
#include "tests/check.h"

namespace memtl::tests {

template <class T>
constexpr DType kDType = DType::f32;
template <>
inline constexpr DType kDType<double> = DType::f64;
template <>
inline constexpr DType kDType<cuda::BFloat16> = DType::bf16;
template <>
inline constexpr DType kDType<cuda::Half> = DType::f16;

// Calls run.template operator()<T, kBits>() for all of them.
template <class Run>
void for_types(const Run& run) {
  const auto all_bits = [&]<class T>() {
    run.template operator()<T, 8>();
    run.template operator()<T, 4>();
    run.template operator()<T, 3>();
    run.template operator()<T, 2>();
  };
  all_bits.template operator()<float>();
  all_bits.template operator()<double>();
  all_bits.template operator()<cuda::BFloat16>();
  all_bits.template operator()<cuda::Half>();
}

// Normal numbers and ties, both zeros; where `special`, here and there what is not finite, or any
// bits at all. A group in the middle has nothing but one number.
template <class T>
std::vector<T> numbers(int64_t n, Random& random, bool special = true) {
  std::normal_distribution<float> normal;
  std::vector<T> x = random_bits<T>(n, random);
  for (size_t i = 0; i < x.size(); ++i) {
    const unsigned chance = random() % 256;
    float value = normal(random);
    if (chance < 16) value = std::round(value);
    if (chance == 20) value = -0.0f;
    if (i / 64 == 2) value = 1.5f;
    if (special && chance == 21) value = INFINITY;
    if (special && chance == 22) value = NAN;
    if (special && chance == 23) continue;
    x[i] = cuda::from_float<T>(value);
  }
  return x;
}

// Packed numbers.
template <int kBits>
struct PackedNumbers {
  std::vector<uint8_t> codes;
  std::vector<uint32_t> params;

  PackedNumbers(int64_t n, Random& random, bool special = true)
      : PackedNumbers(numbers<float>(n, random, special)) {}
  explicit PackedNumbers(const std::vector<float>& x)
      : codes(static_cast<size_t>(groups(x) * 8 * kBits)), params(static_cast<size_t>(groups(x))) {
    quant_kernels().pack(DType::f32, x.data(), static_cast<int64_t>(x.size()), kBits, 5,
                         codes.data(), pairs(), 0, groups(x));
  }

  uint16_t* pairs() { return reinterpret_cast<uint16_t*>(params.data()); }

 private:
  static int64_t groups(const std::vector<float>& x) {
    return ceil_div(static_cast<int64_t>(x.size()), kGroup);
  }
};

// The same bits, or both NaN.
template <class T>
bool same_numbers(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    const float x = cuda::to_float(a[i]), y = cuda::to_float(b[i]);
    if (!(std::isnan(x) && std::isnan(y)) && std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
      return false;
    }
  }
  return true;
}

// So many elements that take no memory before they are touched, and are zero then.
template <class T>
class Reserved {
 public:
  explicit Reserved(int64_t count)
      : bytes_(static_cast<size_t>(count) * sizeof(T)),
        at_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (at_ == MAP_FAILED) std::abort();
  }
  ~Reserved() { munmap(at_, bytes_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;

  T* data() { return static_cast<T*>(at_); }

 private:
  size_t bytes_;
  void* at_;
};

}  // namespace memtl::tests
