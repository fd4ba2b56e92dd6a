// The device code of bits_pack, bits_pack_between and bits_apply, run by the host shim, against
// scalar definitions.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include <limits>

#include "cuda/bits.cuh"
#include "tests/check.h"
#include "tests/memory.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

// A grid of so many threads a block for tiles of T.
template <class T>
Launch tiles(int64_t numel, unsigned threads) {
  return {{static_cast<unsigned>(ceil_div(numel, cuda::tile_size<T>(threads)))}, {threads}};
}

// x * scale as torch computes it: in float for half the width, rounded once.
double scaled(double x, double scale) { return x * scale; }
float scaled(float x, double scale) { return x * static_cast<float>(scale); }
cuda::BFloat16 scaled(cuda::BFloat16 x, double scale) {
  return {float_to_bfloat16(bfloat16_to_float(x.bits) * static_cast<float>(scale))};
}
cuda::Half scaled(cuda::Half x, double scale) {
  return {float_to_half(half_to_float(x.bits) * static_cast<float>(scale))};
}

template <class Test>
std::vector<uint8_t> packed(int64_t numel, const Test& test) {
  std::vector<uint8_t> bits(static_cast<size_t>(ceil_div(numel, 8)));
  for (int64_t i = 0; i < numel; ++i) {
    bits[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(test(i) << (i % 8));
  }
  return bits;
}

template <class T, class Math>
void test_apply(const char* type, int64_t numel, unsigned threads, size_t shift, Random& random) {
  for (double scale : {1.0, -0.3}) {
    // Any bit pattern: NaN, the infinities and subnormal numbers are among them.
    const std::vector<T> x = random_bits<T>(numel, random);
    const std::vector<uint8_t> bits = random_bits<uint8_t>(ceil_div(numel, 8), random);
    std::vector<T> wanted(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      wanted[i] = bits[i / 8] >> (i % 8) & 1 ? scaled(x[i], scale) : T{};
    }
    std::vector<T> out = random_bits<T>(numel, random);
    launch(&cuda::bits_apply_kernel<T, Math>, tiles<T>(numel, threads), Shifted(x, shift).data(),
           Shifted(bits, shift).data(), static_cast<Math>(scale), numel, out.data());
    CHECK(same_bytes(out, wanted), "%s, %ld elements, scale %g, blocks of %u", type,
          static_cast<long>(numel), scale, threads);
  }
}

template <class T, class Math>
void test_between(const char* type, int64_t numel, unsigned threads, size_t shift, Random& random) {
  constexpr Math kNone = std::numeric_limits<Math>::quiet_NaN();
  std::vector<T> x = random_bits<T>(numel, random);
  const auto at = [&](int64_t i) { return cuda::to_math(x[static_cast<size_t>(i)]); };
  const Math some = numel > 0 ? at(numel / 2) : Math{0};  // a bound that an element equals
  for (auto [lo, hi] : {std::pair<Math, Math>{0, kNone}, {kNone, some}, {-1, 1}, {some, some}}) {
    const auto wanted = packed(numel, [&](int64_t i) { return !(at(i) <= lo || at(i) >= hi); });
    std::vector<uint8_t> bits = random_bits<uint8_t>(ceil_div(numel, 8), random);
    using Test = cuda::IsBetween<T, Math>;
    launch(&cuda::bits_pack_kernel<T, Test>, tiles<T>(numel, threads), Shifted(x, shift).data(),
           Test{lo, hi}, numel, bits.data());
    CHECK(same_bytes(bits, wanted), "%s, %ld elements, from %g to %g, blocks of %u", type,
          static_cast<long>(numel), static_cast<double>(lo), static_cast<double>(hi), threads);
  }
}

void test_pack(int64_t numel, unsigned threads, size_t shift, Random& random) {
  std::vector<uint8_t> mask = random_bits<uint8_t>(numel, random);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] &= i % 3 == 0 ? 0xff : 0x01;
  const auto wanted = packed(numel, [&](int64_t i) { return mask[static_cast<size_t>(i)] != 0; });
  std::vector<uint8_t> bits = random_bits<uint8_t>(ceil_div(numel, 8), random);
  launch(&cuda::bits_pack_kernel<uint8_t, cuda::IsSet>, tiles<uint8_t>(numel, threads),
         Shifted(mask, shift).data(), cuda::IsSet{}, numel, bits.data());
  CHECK(same_bytes(bits, wanted), "%ld elements, blocks of %u", static_cast<long>(numel), threads);
}

template <class T, class Math>
void test_type(const char* type, int64_t numel, unsigned threads, size_t shift, Random& random) {
  test_apply<T, Math>(type, numel, threads, shift, random);
  test_between<T, Math>(type, numel, threads, shift, random);
}

// The last block of a tensor whose offsets need more than 32 bits.
void test_huge(Random& random) {
  constexpr int64_t kNumel = (int64_t{1} << 32) + 1003;
  Huge<uint8_t> mask(kNumel), bits(ceil_div(kNumel, 8));
  Huge<cuda::Half> x(kNumel), out(kNumel);
  const Launch packing = tiles<uint8_t>(kNumel, 256), applying = tiles<cuda::Half>(kNumel, 256);
  constexpr int64_t kFirst = kNumel - 1003;  // where both last blocks begin
  for (int64_t i = kFirst; i < kNumel; ++i) {
    mask[i] = random() % 2;
    x[i].bits = static_cast<uint16_t>(random() % 0x7c00);
  }
  launch_block(&cuda::bits_pack_kernel<uint8_t, cuda::IsSet>, packing, {packing.grid.x - 1},
               mask.data(), cuda::IsSet{}, kNumel, bits.data());
  launch_block(&cuda::bits_apply_kernel<cuda::Half, float>, applying, {applying.grid.x - 1},
               x.data(), bits.data(), 1.0f, kNumel, out.data());
  for (int64_t i = kFirst; i < kNumel; ++i) {
    CHECK((bits[i / 8] >> (i % 8) & 1) == mask[i], "element %ld", static_cast<long>(i));
    CHECK(out[i].bits == (mask[i] ? x[i].bits : 0), "element %ld", static_cast<long>(i));
  }
}

}  // namespace

int main() {
  Random random(1);
  in_orders([&] {
    for (int64_t numel : kSizes) {
      for (unsigned threads : {32u, 256u}) {
        const size_t shift = numel % 2 == 1 ? 1 : 0;
        test_type<float, float>("float", numel, threads, shift, random);
        test_type<double, double>("double", numel, threads, shift, random);
        test_type<cuda::BFloat16, float>("bfloat16", numel, threads, shift, random);
        test_type<cuda::Half, float>("half", numel, threads, shift, random);
        test_pack(numel, threads, shift, random);
      }
    }
  });
  test_huge(random);
  return finish("test_cuda_bits");
}
