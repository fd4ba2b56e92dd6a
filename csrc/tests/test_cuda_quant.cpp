// quant's device code, run by the host shim, against the kernels of the CPU, bit for bit.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include "cuda/quant.cuh"
#include "tests/check.h"
#include "tests/quant_cases.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

constexpr QuantRange range_of(int bits) {
  const float lo = -0.13f, hi = 1.13f;
  return {lo, hi, static_cast<float>((static_cast<double>(hi) - lo) / ((1 << bits) - 2))};
}

// What the case was, for CHECK.
#define CASE                                                                                 \
  "%ld elements of %d bytes from %d on, %d bits, %u blocks of %u", static_cast<long>(numel), \
      static_cast<int>(sizeof(T)), shift, kBits, grid.x, block.x

template <class T, int kBits>
void test_packing(int64_t numel, int shift, Dim3 grid, Dim3 block, Random& random) {
  const int64_t groups = ceil_div(numel, kGroup);
  const std::vector<T> shifted = numbers<T>(numel + shift, random);
  const T* x = shifted.data() + shift;
  const auto seed = static_cast<uint32_t>(random());
  const QuantRange range = range_of(kBits);
  using Bytes = std::vector<uint8_t>;
  const auto size = static_cast<size_t>(groups * 8 * kBits);
  Bytes wanted(size), codes(size), wanted_range(size), range_codes(size);
  std::vector<uint32_t> wanted_params(static_cast<size_t>(groups)), params(wanted_params.size());
  quant_kernels().pack(kDType<T>, x, numel, kBits, seed, wanted.data(),
                       reinterpret_cast<uint16_t*>(wanted_params.data()), 0, groups);
  quant_kernels().pack_range(kDType<T>, x, numel, kBits, range, seed, wanted_range.data(), 0,
                             groups);
  launch(&cuda::quant_pack_kernel<T, kBits>, {grid, block}, x, numel, seed, codes.data(),
         params.data());
  launch(&cuda::quant_pack_range_kernel<T, kBits>, {grid, block}, x, numel, range, seed,
         range_codes.data());
  CHECK(same_bytes(codes, wanted), CASE);
  CHECK(same_bytes(params, wanted_params), CASE);
  CHECK(same_bytes(range_codes, wanted_range), "a range: " CASE);
}

template <class T, int kBits>
void test_unpacking(int64_t numel, int shift, Dim3 grid, Dim3 block, Random& random) {
  const int64_t groups = ceil_div(numel, kGroup);
  PackedNumbers<kBits> packed(numel, random);
  const QuantRange range = range_of(kBits);
  const std::vector<uint8_t> codes = random_bits<uint8_t>(groups * 8 * kBits, random);
  // Beyond what is written, and before, stays what was there.
  const std::vector<T> before = random_bits<T>(numel + shift + 3, random);
  std::vector<T> wanted = before, out = before, wanted_range = before, range_out = before;
  quant_kernels().unpack(kDType<T>, packed.codes.data(), packed.pairs(), kBits,
                         wanted.data() + shift, numel, 0, groups);
  quant_kernels().unpack_range(kDType<T>, codes.data(), kBits, range, wanted_range.data() + shift,
                               numel, 0, groups);
  launch(&cuda::quant_unpack_kernel<T, kBits>, {grid, block}, packed.codes.data(),
         packed.params.data(), numel, out.data() + shift);
  launch(&cuda::quant_unpack_range_kernel<T, kBits>, {grid, block}, codes.data(), range, numel,
         range_out.data() + shift);
  CHECK(same_numbers(out, wanted), CASE);
  CHECK(same_numbers(range_out, wanted_range), "a range: " CASE);
}

// The last block of so many elements that offsets need more than 32 bits.
template <class T, int kBits>
void test_far(Random& random) {
  const int64_t numel = (int64_t{1} << 32) + 4099, groups = ceil_div(numel, kGroup);
  Reserved<T> x(numel), out(numel), wanted_out(numel);
  Reserved<uint8_t> codes(groups * 8 * kBits), wanted(groups * 8 * kBits);
  Reserved<uint32_t> params(groups), wanted_params(groups);
  const Dim3 block{128}, grid{static_cast<unsigned>(ceil_div(groups, 32))};
  const int64_t first = int64_t{grid.x - 1} * 32;
  const std::vector<T> last = numbers<T>(numel - first * kGroup, random);
  std::memcpy(x.data() + first * kGroup, last.data(), last.size() * sizeof(T));
  quant_kernels().pack(kDType<T>, x.data(), numel, kBits, 3, wanted.data(),
                       reinterpret_cast<uint16_t*>(wanted_params.data()), first, groups);
  quant_kernels().unpack(kDType<T>, wanted.data(),
                         reinterpret_cast<uint16_t*>(wanted_params.data()), kBits,
                         wanted_out.data(), numel, first, groups);
  launch_block(&cuda::quant_pack_kernel<T, kBits>, {grid, block}, {grid.x - 1}, x.data(), numel, 3u,
               codes.data(), params.data());
  launch_block(&cuda::quant_unpack_kernel<T, kBits>, {grid, block}, {grid.x - 1}, codes.data(),
               params.data(), numel, out.data());
  const auto part = [](auto& from, int64_t begin, int64_t end) {
    return std::vector(from.data() + begin, from.data() + end);
  };
  const int64_t byte = first * 8 * kBits, bytes = groups * 8 * kBits;
  CHECK(same_bytes(part(codes, byte, bytes), part(wanted, byte, bytes)), "%d bits", kBits);
  CHECK(same_bytes(part(params, first, groups), part(wanted_params, first, groups)), "%d bits",
        kBits);
  CHECK(same_numbers(part(out, first * kGroup, numel), part(wanted_out, first * kGroup, numel)),
        "%d bits", kBits);
}

}  // namespace

int main() {
  Random random(1);
  for_types([&]<class T, int kBits>() {
    for (int64_t numel : kSizes) {
      if (numel == 0) continue;  // not launched
      for (int shift : {0, 1, 4}) {
        test_packing<T, kBits>(numel, shift, {3}, {128}, random);
        test_unpacking<T, kBits>(numel, shift, {3}, {128}, random);
      }
    }
    in_orders([&] {
      for (Dim3 block : {Dim3{32}, Dim3{96}}) {
        test_packing<T, kBits>(1000, 0, {2}, block, random);
        test_unpacking<T, kBits>(1000, 0, {2}, block, random);
      }
    });
  });
  test_far<float, 4>(random);
  test_far<cuda::BFloat16, 3>(random);
  return finish("test_cuda_quant");
}
