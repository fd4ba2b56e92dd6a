// The kernels of threshold, and those that select by bits: every instruction set this machine runs
// against what is written out here, in buffers of exactly the size they may touch.
#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "cpu/bits.h"
#include "cpu/threshold.h"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// Any bits: every kind of number is among them, and some twice.
std::vector<uint8_t> any_numbers(DType dtype, int64_t numel, Random& random) {
  const auto size = static_cast<size_t>(size_of(dtype));
  std::vector<uint8_t> x = random_bits<uint8_t>(numel * size_of(dtype), random);
  for (size_t i = 3; i < static_cast<size_t>(numel); i += 5) {
    std::copy_n(x.data() + (i - 2) * size, size, x.data() + i * size);
  }
  return x;
}

uint64_t key_at(DType dtype, const std::vector<uint8_t>& x, int64_t i) {
  const int64_t size = size_of(dtype);
  uint64_t bits = 0;
  std::memcpy(&bits, x.data() + i * size, static_cast<size_t>(size));
  bits &= (uint64_t{1} << (8 * size - 1)) - 1;
  return std::min(bits, infinite_key(dtype) + 1);
}

bool is_set(const std::vector<uint8_t>& bits, int64_t i) {
  return (bits[static_cast<size_t>(i / 8)] >> (i % 8) & 1) != 0;
}

void test_threshold(const ThresholdKernels& kernels, DType dtype, int64_t numel, const char* isa,
                    Random& random) {
  const std::vector<uint8_t> x = any_numbers(dtype, numel, random);
  const std::vector<uint8_t> mask = random_bits<uint8_t>(ceil_div(numel, 8), random);
  const int64_t size = size_of(dtype);
  const uint64_t infinite = infinite_key(dtype);
  const KeyRange ranges[] = {
      {0, infinite + 1, 8 * static_cast<int>(size) - 8},
      {infinite / 4, infinite / 2, 8 * static_cast<int>(size) - 8},
      {infinite, infinite + 1, 0},
      {0, 0, 0},
  };
  for (const uint8_t* given : {static_cast<const uint8_t*>(nullptr), mask.data()}) {
    for (const KeyRange& range : ranges) {
      std::vector<uint32_t> buckets(256), wanted(256);
      std::vector<uint64_t> inside;
      int64_t above = 0;
      for (int64_t i = 0; i < numel; ++i) {
        const uint64_t key = key_at(dtype, x, i);
        if (given != nullptr && !is_set(mask, i)) continue;
        above += key > range.hi;
        if (key < range.lo || key > range.hi) continue;
        ++wanted[static_cast<size_t>((key - range.lo) >> range.shift)];
        inside.push_back(key);
      }
      const int64_t counted =
          kernels.count(dtype, x.data(), given, 0, numel, range, buckets.data());
      CHECK(counted == above && buckets == wanted, "%s: count, %ld elements", isa,
            static_cast<long>(numel));
      std::vector<uint8_t> found(inside.size() * static_cast<size_t>(size));
      int64_t over = 5;
      const int64_t number =
          kernels.collect(dtype, x.data(), given, 0, numel, range, found.data(), &over);
      bool same = number == static_cast<int64_t>(inside.size()) && over == above + 5;
      for (int64_t i = 0; same && i < number; ++i) {
        same = key_at(dtype, found, i) == inside[static_cast<size_t>(i)];
      }
      CHECK(same, "%s: collect, %ld elements", isa, static_cast<long>(numel));
    }
    if (numel == 0) continue;
    const uint64_t key = key_at(dtype, x, numel / 2);
    for (int64_t quota : {0, 1, 3, 1 << 20}) {
      std::vector<uint8_t> bits(mask.size(), 0xa5), wanted(mask.size());
      int64_t equal = 0;
      for (int64_t i = 0; i < numel; ++i) {
        if (given != nullptr && !is_set(mask, i)) continue;
        const uint64_t each = key_at(dtype, x, i);
        const bool kept = each > key || (each == key && equal < quota);
        equal += each == key;
        wanted[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(kept << (i % 8));
      }
      const int64_t found = kernels.mark(dtype, x.data(), given, 0, numel, key, quota, bits.data());
      CHECK(found == equal && same_bytes(bits, wanted), "%s: mark, %ld elements", isa,
            static_cast<long>(numel));
    }
  }
}

void test_select(const BitsKernels& kernels, DType dtype, int64_t numel, const char* isa,
                 Random& random) {
  const std::vector<uint8_t> x = any_numbers(dtype, numel, random);
  const std::vector<uint8_t> bits = random_bits<uint8_t>(ceil_div(numel, 8), random);
  const auto size = static_cast<size_t>(size_of(dtype));
  std::vector<uint8_t> wanted, dense(x.size());
  for (int64_t i = 0; i < numel; ++i) {
    const auto at = static_cast<size_t>(i) * size;
    if (!is_set(bits, i)) continue;
    wanted.insert(wanted.end(), x.begin() + static_cast<int64_t>(at),
                  x.begin() + static_cast<int64_t>(at + size));
    std::copy_n(x.data() + at, size, dense.data() + at);
  }
  const auto bytes = static_cast<int64_t>(bits.size()), itemsize = size_of(dtype);
  const int64_t set = kernels.count(bits.data(), numel, 0, bytes);
  CHECK(set * itemsize == static_cast<int64_t>(wanted.size()), "%s: count of bits", isa);
  std::vector<uint8_t> values(wanted.size()), out(x.size(), 0xa5);
  int64_t start = 0;
  for (const auto& [first, last] : {std::pair{int64_t{0}, bytes / 2}, {bytes / 2, bytes}}) {
    kernels.select(itemsize, x.data(), bits.data(), numel, values.data() + start * itemsize, first,
                   last);
    kernels.expand(itemsize, wanted.data() + start * itemsize, bits.data(), numel, out.data(),
                   first, last);
    start += kernels.count(bits.data(), numel, first, last);
  }
  CHECK(same_bytes(values, wanted), "%s: select, %ld elements", isa, static_cast<long>(numel));
  CHECK(same_bytes(out, dense), "%s: expand, %ld elements", isa, static_cast<long>(numel));
}

void test_all(const ThresholdKernels& threshold, const BitsKernels& bits, const char* isa,
              Random& random) {
  for (DType dtype : kTypes) {
    for (int64_t numel : kSizes) {
      test_threshold(threshold, dtype, numel, isa, random);
      test_select(bits, dtype, numel, isa, random);
    }
  }
}

}  // namespace

int main() {
  Random random(2);
  test_all(portable::threshold, portable::bits, "portable", random);
  MEMTL_IF_AVX2(
      if (available(Isa::avx2)) { test_all(avx2::threshold, avx2::bits, "avx2", random); })
  MEMTL_IF_AVX512(
      if (available(Isa::avx512)) { test_all(avx512::threshold, avx512::bits, "avx512", random); })
  return finish("test_threshold");
}
