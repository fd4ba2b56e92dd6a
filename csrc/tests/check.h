// The native tests' own assertion: it works in every build type and counts instead of stopping.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace memtl::tests {

inline int failures = 0;

// Says where a condition fails, and what the case was; main returns finish().
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition) && ++memtl::tests::failures <= 20) {                  \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
    }                                                                      \
  } while (false)

inline int finish(const char* test) {
  std::printf("%s: %s (%d failures)\n", test, failures == 0 ? "passed" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}

constexpr int64_t kSizes[] = {0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 1000, 4097};

using Random = std::mt19937;

template <class T>
std::vector<T> random_bits(int64_t n, Random& random) {
  std::vector<T> x(static_cast<size_t>(n));
  auto* bytes = reinterpret_cast<unsigned char*>(x.data());
  for (size_t i = 0; i < x.size() * sizeof(T); ++i) bytes[i] = static_cast<unsigned char>(random());
  return x;
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace memtl::tests
