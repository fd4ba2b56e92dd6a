// bits_apply's device code, run by the host shim, against a scalar definition.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include "cuda/bits.cuh"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

// x * scale as torch computes it: in float for half the width, rounded once.
double scaled(double x, double scale) { return x * scale; }
float scaled(float x, double scale) { return x * static_cast<float>(scale); }
cuda::BFloat16 scaled(cuda::BFloat16 x, double scale) {
  return {float_to_bfloat16(bfloat16_to_float(x.bits) * static_cast<float>(scale))};
}
cuda::Half scaled(cuda::Half x, double scale) {
  return {float_to_half(half_to_float(x.bits) * static_cast<float>(scale))};
}

template <class T, class Math>
void test(const char* type, Dim3 grid, Dim3 block, Random& random) {
  for (int64_t numel : kSizes) {
    for (double scale : {1.0, 1.0 / 0.9, -0.3}) {
      // Any bit pattern: NaN, the infinities and subnormal numbers are among them.
      const std::vector<T> x = random_bits<T>(numel, random);
      const std::vector<uint8_t> bits = random_bits<uint8_t>(ceil_div(numel, 8), random);
      std::vector<T> wanted(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        wanted[i] = bits[i / 8] >> (i % 8) & 1 ? scaled(x[i], scale) : T{};
      }
      std::vector<T> out = random_bits<T>(numel, random);
      launch(&cuda::bits_apply_kernel<T, Math>, {grid, block}, x.data(), bits.data(),
             static_cast<Math>(scale), numel, out.data());
      CHECK(same_bytes(out, wanted), "%s, %ld elements, scale %g, %u blocks of %u", type,
            static_cast<long>(numel), scale, grid.x, block.x);
    }
  }
}

}  // namespace

int main() {
  Random random(1);
  in_orders([&] {
    for (Dim3 grid : {Dim3{1}, Dim3{3}, Dim3{17}}) {
      for (Dim3 block : {Dim3{32}, Dim3{256}}) {
        test<float, float>("float", grid, block, random);
        test<double, double>("double", grid, block, random);
        test<cuda::BFloat16, float>("bfloat16", grid, block, random);
        test<cuda::Half, float>("half", grid, block, random);
      }
    }
  });
  return finish("test_cuda_bits");
}
