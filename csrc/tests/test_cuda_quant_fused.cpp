// quant's device code that computes and packs, or decodes and uses, run by the host shim. Against
// the kernels of the CPU bit for bit; curves against float64, within what they may be off.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include "cuda/quant_fused.cuh"
#include "tests/check.h"
#include "tests/quant_cases.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

void test_division(Random& random) {
  for (int i = 0; i < 4000; ++i) {
    const auto wide = [&] { return static_cast<int64_t>(uint64_t{random()} << 31 ^ random()); };
    const int64_t by = 1 + (wide() >> (i % 63)), near = by * (wide() % 1000 % (INT64_MAX / by));
    const cuda::Division division(by);
    for (int64_t x : {wide() >> (i / 63 % 63), near, near + by - 1, int64_t{INT32_MAX}, by}) {
      CHECK(division.quotient(x) == x / by, "%ld / %ld", static_cast<long>(x),
            static_cast<long>(by));
    }
  }
}

// Tables of channels as the CPU's kernels want them, and as those of the GPU do.
struct Tables {
  std::vector<float> weight, bias;
  int64_t channels, inner;

  Tables(int64_t channels, int64_t inner, Random& random)
      : weight(numbers<float>(channels, random, false)),
        bias(numbers<float>(channels, random, false)),
        channels(channels),
        inner(inner) {
    for (auto* table : {&weight, &bias}) {
      for (int i = 0; i < kGroup; ++i) {
        table->push_back((*table)[static_cast<size_t>(i % channels)]);
      }
    }
  }

  cuda::ChannelTables on_gpu() const {
    return {weight.data(), bias.data(), cuda::Division(channels), cuda::Division(inner)};
  }
};

template <class T, int kBits>
void test_channels(int64_t outer, int64_t channels, int64_t inner, Random& random) {
  const int64_t numel = outer * channels * inner, groups = ceil_div(numel, kGroup);
  const Tables tables(channels, inner, random);
  const cuda::ChannelTables on_gpu = tables.on_gpu();
  const Channels all{tables.weight.data(), tables.bias.data(), channels, inner};
  const Launch shape{{2}, {64}};
  const char* what = "%ld channels of %ld, %ld elements, %d bits";
#define CASE \
  what, static_cast<long>(channels), static_cast<long>(inner), static_cast<long>(numel), kBits

  const std::vector<T> x = numbers<T>(numel, random);
  PackedNumbers<kBits> wanted(numel, random), packed = wanted;
  quant_kernels().pack_normalized(kDType<T>, x.data(), numel, all, kBits, 11, wanted.codes.data(),
                                  wanted.pairs(), 0, groups);
  launch(&cuda::quant_pack_normalized_kernel<T, kBits>, shape, x.data(), numel, on_gpu, 11u,
         packed.codes.data(), packed.params.data());
  CHECK(same_bytes(packed.codes, wanted.codes), CASE);
  CHECK(same_bytes(packed.params, wanted.params), CASE);

  const std::vector<uint8_t> mask = random_bits<uint8_t>(ceil_div(numel, 8), random);
  for (int given = 0; given < 12; ++given) {  // what there is of weight, bias, mask, two ends
    Channels some = all;
    cuda::ChannelTables some_on_gpu = on_gpu;
    if (!(given & 1)) some.weight = some_on_gpu.weight = nullptr;
    if (!(given & 2)) some.bias = some_on_gpu.bias = nullptr;
    const uint8_t* bits = given & 12 ? mask.data() : nullptr;
    const Ends ends = given & 8 ? Ends{-0.5f, 0.75f, 0.125f} : Ends{0, 0, 0};
    std::vector<T> wanted_out = random_bits<T>(numel, random), out = wanted_out;
    quant_fused_kernels().unpack_affine(kDType<T>, packed.codes.data(), packed.pairs(), kBits, some,
                                        bits, ends, wanted_out.data(), numel, 0, groups);
    launch(&cuda::quant_unpack_affine_kernel<T, kBits>, shape, packed.codes.data(),
           packed.params.data(), some_on_gpu, bits, ends, numel, out.data());
    CHECK(same_numbers(out, wanted_out), CASE);
  }
#undef CASE
}

template <class T, int kBits>
void test_apply_range(int64_t numel, int shift, Random& random) {
  const int64_t groups = ceil_div(numel, kGroup);
  const QuantRange range{-0.25f, 1.25f, 1.5f / ((1 << kBits) - 2)};
  const std::vector<uint8_t> codes = random_bits<uint8_t>(groups * 8 * kBits, random);
  const std::vector<T> x = numbers<T>(numel + shift, random);
  std::vector<T> wanted(static_cast<size_t>(numel)), out = wanted;
  quant_fused_kernels().apply_range(kDType<T>, x.data() + shift, codes.data(), kBits, range,
                                    wanted.data(), numel, 0, groups);
  launch(&cuda::quant_apply_range_kernel<T, kBits>, {{2}, {128}}, x.data() + shift, codes.data(),
         range, numel, out.data());
  CHECK(same_numbers(out, wanted), "%ld elements, %d bits", static_cast<long>(numel), kBits);
}

// ------------------------------------------------------------------------------------- curves

constexpr Act kActs[] = {Act::gelu,       Act::gelu_tanh, Act::silu,
                         Act::quick_gelu, Act::hardswish, Act::mish};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double activated(Act act, double x) {
  switch (act) {
    case Act::gelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Act::gelu_tanh:
      return x * sigmoid(2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    case Act::silu:
      return x * sigmoid(x);
    case Act::quick_gelu:
      return x * sigmoid(1.702 * x);
    case Act::hardswish:
      return x * std::fmin(6, std::fmax(0, x + 3)) / 6;
    default:
      return x * std::tanh(std::log1p(std::exp(x)));
  }
}

// By differences, in long steps of high order; good to 1e-9 where the curve is smooth.
double derived(Act act, double x) {
  if (act == Act::hardswish) return x >= 3 ? 1 : x <= -3 ? 0 : x / 3 + 0.5;
  if (std::fabs(x) > 100) return x > 0;
  constexpr double kStep = 1e-2;
  const auto slope = [&](double h) {
    return (activated(act, x + h) - activated(act, x - h)) / (2 * h);
  };
  const double a = slope(kStep), b = slope(2 * kStep), c = slope(3 * kStep);
  return 1.5 * a - 0.6 * b + 0.1 * c;
}

constexpr double kCurveError = 5e-7;

void test_curves(Random& random) {
  std::uniform_real_distribution<float> wide(-12, 12);
  for (Act act : kActs) {
    double worst = 0, worst_slope = 0;
    for (int i = 0; i < 20000; ++i) {
      const float x = i % 2 ? wide(random) : wide(random) / 8;
      float y = 0, slope = 0;
      cuda::with_curve<false>(act, [&](const auto& curve) { y = curve(x); });
      cuda::with_curve<true>(act, [&](const auto& curve) { slope = curve(x); });
      worst = std::fmax(worst, std::fabs(y - activated(act, x)) / std::fmax(1, std::fabs(x)));
      worst_slope = std::fmax(worst_slope, std::fabs(slope - derived(act, x)));
    }
    std::printf("curve %d: off by %.2e, its derivative by %.2e\n", static_cast<int>(act), worst,
                worst_slope);
    CHECK(worst < kCurveError, "curve %d: %g", static_cast<int>(act), worst);
    CHECK(worst_slope < kCurveError, "derivative %d: %g", static_cast<int>(act), worst_slope);
    for (float x : {-INFINITY, -1e30f, -110.0f, 110.0f, 1e30f, INFINITY, NAN}) {
      float y = 0, slope = 0;
      cuda::with_curve<false>(act, [&](const auto& curve) { y = curve(x); });
      cuda::with_curve<true>(act, [&](const auto& curve) { slope = curve(x); });
      const bool limits = x < 0 ? y == 0 && slope == 0 : y == x && slope == 1;
      CHECK(std::isnan(x) ? std::isnan(y) && std::isnan(slope) : limits, "curve %d at %g: %g, %g",
            static_cast<int>(act), x, y, slope);
    }
  }
}

// Whether x is `wanted`, but for `off` and a rounding or two to T.
template <class T>
bool near(T x, double wanted, double off) {
  const float actual = cuda::to_float(x);
  const float rounded = cuda::to_float(cuda::from_float<T>(static_cast<float>(wanted)));
  if (!std::isfinite(rounded)) return std::isnan(rounded) ? std::isnan(actual) : actual == rounded;
  const double unit = sizeof(T) > 2 ? 0x1p-24 : std::is_same_v<T, cuda::Half> ? 0x1p-11 : 0x1p-8;
  const double least = std::is_same_v<T, cuda::Half> ? 0x1p-24 : 0;  // where units stop to shrink
  return std::fabs(actual - wanted) <= off + 2 * unit * std::fabs(wanted) + least;
}

template <class T, int kBits>
void test_activations(int64_t numel, int shift, Dim3 grid, Dim3 block, Random& random) {
  const int64_t groups = ceil_div(numel, kGroup);
  PackedNumbers<kBits> packed(numel, random);
  std::vector<double> x(static_cast<size_t>(numel));
  quant_kernels().unpack(DType::f64, packed.codes.data(), packed.pairs(), kBits, x.data(), numel, 0,
                         groups);
  const std::vector<T> grads = numbers<T>(numel + shift, random, false);
  for (Act act : kActs) {
    std::vector<T> y(x.size()), grad(x.size());
    launch(&cuda::quant_unpack_activation_kernel<T, kBits>, {grid, block}, packed.codes.data(),
           packed.params.data(), act, numel, y.data());
    launch(&cuda::quant_activation_grad_kernel<T, kBits>, {grid, block}, grads.data() + shift,
           packed.codes.data(), packed.params.data(), act, numel, grad.data());
    int wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double g = cuda::to_float(grads[i + static_cast<size_t>(shift)]);
      wrong += !near(y[i], activated(act, x[i]), kCurveError * std::fmax(1, std::fabs(x[i])));
      wrong += !near(grad[i], g * derived(act, x[i]), kCurveError * std::fabs(g));
    }
    CHECK(wrong == 0, "curve %d, %ld elements, %d bits, %u blocks of %u: %d wrong",
          static_cast<int>(act), static_cast<long>(numel), kBits, grid.x, block.x, wrong);
  }
}

// Levels are the CPU's, or next to them where the derivative's error crosses a boundary: the chance
// of which is twice the error a level's width.
template <class T, int kBits>
void test_derivative(int64_t numel, Random& random) {
  const int64_t groups = ceil_div(numel, kGroup);
  const QuantRange range{-0.13f, 1.13f, 1.26f / ((1 << kBits) - 2)};
  const std::vector<T> x = numbers<T>(numel, random);
  for (Act act : kActs) {
    std::vector<uint8_t> wanted(static_cast<size_t>(groups * 8 * kBits)), codes = wanted;
    quant_fused_kernels().pack_derivative(kDType<T>, x.data(), numel, kBits, act, range, 9,
                                          wanted.data(), 0, groups);
    launch(&cuda::quant_pack_derivative_kernel<T, kBits>, {{2}, {128}}, x.data(), numel, act, range,
           9u, codes.data());
    std::vector<float> levels(static_cast<size_t>(numel)), wanted_levels = levels;
    const QuantRange each{0, static_cast<float>((1 << kBits) - 2), 1};
    for (auto [from, to] : {std::pair{&codes, &levels}, std::pair{&wanted, &wanted_levels}}) {
      quant_kernels().unpack_range(DType::f32, from->data(), kBits, each, to->data(), numel, 0,
                                   groups);
    }
    int apart = 0, wrong = 0;
    for (size_t i = 0; i < levels.size(); ++i) {
      const float a = levels[i], b = wanted_levels[i];
      apart += a != b && !(std::isnan(a) && std::isnan(b));
      wrong += std::isnan(a) != std::isnan(b) || std::fabs(a - b) > 1;
    }
    CHECK(wrong == 0 && apart <= 2 + numel / 1000, "curve %d, %ld elements, %d bits: %d apart",
          static_cast<int>(act), static_cast<long>(numel), kBits, apart);
  }
}

}  // namespace

int main() {
  Random random(1);
  test_division(random);
  test_curves(random);
  for_types([&]<class T, int kBits>() {
    test_channels<T, kBits>(3, 40, 1, random);
    test_channels<T, kBits>(7, 3, 1, random);
    test_channels<T, kBits>(5, 6, 3, random);
    test_channels<T, kBits>(3, 5, 49, random);
    test_channels<T, kBits>(2, 3, 64, random);
    test_channels<T, kBits>(1, 1, 5, random);
    for (int64_t numel : {1, 63, 130, 1000}) {
      test_apply_range<T, kBits>(numel, 0, random);
      test_apply_range<T, kBits>(numel, 1, random);
      test_activations<T, kBits>(numel, 0, {2}, {128}, random);
      test_derivative<T, kBits>(numel, random);
    }
  });
  in_orders([&] {
    test_channels<float, 4>(3, 5, 7, random);
    test_activations<float, 4>(1000, 1, {1}, {96}, random);
    test_activations<cuda::BFloat16, 3>(1000, 1, {3}, {32}, random);
  });
  return finish("test_cuda_quant_fused");
}
