// The backward passes of norms from a packed x-hat, run by the host shim, against sums in float64.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include "cuda/quant_channel_norm.cuh"
#include "cuda/quant_norm.cuh"
#include "tests/check.h"
#include "tests/quant_cases.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

template <class T>
constexpr double kUnit = sizeof(T) > 2                   ? 0x1p-24
                         : std::is_same_v<T, cuda::Half> ? 0x1p-11
                                                         : 0x1p-8;

// What x-hat decodes to.
template <int kBits>
std::vector<double> decoded(PackedNumbers<kBits>& packed, int64_t numel) {
  std::vector<double> x(static_cast<size_t>(numel));
  quant_kernels().unpack(DType::f64, packed.codes.data(), packed.pairs(), kBits, x.data(), numel, 0,
                         ceil_div(numel, kGroup));
  return x;
}

// Whether sums of `terms` floats are right: any order is off by this much of the absolute sum.
bool near_sum(double actual, double wanted, double absolute, int64_t terms) {
  return std::fabs(actual - wanted) <= static_cast<double>(terms + 8) * 0x1p-23 * absolute + 1e-30;
}

// Adds up what a sum's parts are, and checks the sums of all channels.
void check_sums(const std::vector<cuda::Sums>& partial, int64_t outer, int64_t channels,
                int64_t inner, const std::vector<double>& grad, const std::vector<double>& x_hat,
                int64_t plane, cuda::ChannelScales scales, const char* what) {
  std::vector<float> weight(static_cast<size_t>(channels)), bias = weight;
  const Launch shape{{static_cast<unsigned>(ceil_div(channels, 32))}, {32, cuda::kSumRows}};
  launch(&cuda::quant_sum_partial_kernel<double>, shape, partial.data(), outer, channels,
         cuda::Division(inner), weight.data(), bias.data(), scales);
  std::vector<double> totals(static_cast<size_t>(4 * channels));
  for (size_t i = 0; i < grad.size(); ++i) {
    double* of = &totals[4 * (static_cast<int64_t>(i) / plane % channels)];
    of[0] += grad[i] * x_hat[i];
    of[1] += std::fabs(grad[i] * x_hat[i]);
    of[2] += grad[i];
    of[3] += std::fabs(grad[i]);
  }
  const auto terms = static_cast<int64_t>(grad.size()) / channels;
  for (size_t c = 0; c < weight.size(); ++c) {
    const double* of = &totals[4 * c];
    CHECK(near_sum(weight[c], of[0], of[1], terms), "%s: weight %zu of %ld: %g, not %g", what, c,
          static_cast<long>(channels), weight[c], of[0]);
    CHECK(near_sum(bias[c], of[2], of[3], terms), "%s: bias %zu of %ld: %g, not %g", what, c,
          static_cast<long>(channels), bias[c], of[2]);
  }
}

template <class T>
std::vector<double> wide(const T* x, int64_t numel) {
  std::vector<double> all(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) all[static_cast<size_t>(i)] = cuda::to_float(x[i]);
  return all;
}

// kQuads 0: rows and columns apart.
template <class T, int kBits, int kQuads>
void test_norm(int64_t rows, int64_t features, Dim3 grid, Dim3 block, int shift, Random& random) {
  const int64_t numel = rows * features;
  PackedNumbers<kBits> packed(numel, random, false);
  const std::vector<double> x_hat = decoded(packed, numel);
  const std::vector<T> shifted = numbers<T>(numel + shift, random, false);
  const T* grad_out = shifted.data() + shift;
  const std::vector<double> grad = wide(grad_out, numel);
  const std::vector<float> rstd = numbers<float>(rows, random, false);
  const std::vector<float> weight = numbers<float>(features, random, false);
  for (bool plain : {false, true}) {  // RMS norm without a weight
    const cuda::NormRows norm{rstd.data(), plain ? nullptr : weight.data(),  rows,
                              features,    1 / static_cast<float>(features), !plain};
    std::vector<T> grad_x(static_cast<size_t>(numel));
    std::vector<cuda::Sums> partial;
    if constexpr (kQuads > 0) {
      partial.resize(grid.x * static_cast<size_t>(features));
      launch(&cuda::quant_norm_grad_kernel<T, kBits, kQuads>, {grid, block}, grad_out,
             packed.codes.data(), packed.params.data(), norm, grad_x.data(), partial.data());
    } else {
      const Dim3 slices{static_cast<unsigned>(ceil_div(features, 128)), grid.x};
      partial.resize(slices.y * 4 * static_cast<size_t>(features));
      launch(&cuda::quant_norm_rows_kernel<T, kBits>, {grid, block}, grad_out, packed.codes.data(),
             packed.params.data(), norm, grad_x.data());
      launch(&cuda::quant_sum_columns_kernel<T, kBits>, {slices, {32, 4}}, grad_out,
             packed.codes.data(), packed.params.data(), rows, features, partial.data());
    }
    const auto parts = static_cast<int64_t>(partial.size()) / features;
    check_sums(partial, parts, features, 1, grad, x_hat, 1, {}, "norm");
    int wrong = 0;
    for (int64_t row = 0; row < rows; ++row) {
      double slope = 0, mean = 0, sizes = 0;
      const auto at = [&](int64_t f) { return static_cast<size_t>(row * features + f); };
      const auto factor = [&](int64_t f) {
        return plain ? 1.0 : static_cast<double>(weight[static_cast<size_t>(f)]);
      };
      for (int64_t f = 0; f < features; ++f) {
        slope += grad[at(f)] * factor(f) * x_hat[at(f)] / static_cast<double>(features);
        mean += plain ? 0 : grad[at(f)] * factor(f) / static_cast<double>(features);
        sizes += std::fabs(grad[at(f)] * factor(f)) * (1 + std::fabs(x_hat[at(f)]));
      }
      sizes /= static_cast<double>(features);
      for (int64_t f = 0; f < features; ++f) {
        const double scale = rstd[static_cast<size_t>(row)], own = grad[at(f)] * factor(f);
        const double wanted = (own - mean - x_hat[at(f)] * slope) * scale;
        const double size =
            std::fabs(scale) * (std::fabs(own) + sizes * (1 + std::fabs(x_hat[at(f)])));
        const double off = static_cast<double>(features + 8) * 0x1p-23 * size;
        const double actual = cuda::to_float(grad_x[at(f)]);
        wrong += !(std::fabs(actual - wanted) <= off + kUnit<T> * std::fabs(wanted) + 0x1p-24);
      }
    }
    CHECK(wrong == 0, "%ld rows of %ld, %d bits, %d quads, %u blocks of %u by %u: %d wrong",
          static_cast<long>(rows), static_cast<long>(features), kBits, kQuads, grid.x, block.x,
          block.y, wrong);
  }
}

// each 0: by columns.
template <class T, int kBits>
void test_channel_norm(int64_t samples, int64_t channels, int64_t inner, int64_t each,
                       unsigned width, int shift, Random& random) {
  const int64_t planes = samples * channels, numel = planes * inner;
  PackedNumbers<kBits> packed(numel, random, false);
  const std::vector<double> x_hat = decoded(packed, numel);
  const std::vector<T> shifted = numbers<T>(numel + shift, random, false);
  const T* grad_out = shifted.data() + shift;
  const std::vector<double> grad = wide(grad_out, numel);
  const std::vector<float> rstd = numbers<float>(channels, random, false);
  const std::vector<float> weight = numbers<float>(channels, random, false);
  std::vector<cuda::ChannelSlope> slopes(static_cast<size_t>(channels));
  const auto elements = static_cast<double>(samples * inner);
  const cuda::ChannelScales scales{rstd.data(), weight.data(), elements, slopes.data()};
  if (each > 0) {
    const cuda::PlaneParts cut{planes, inner, ceil_div(inner, each), each};
    std::vector<cuda::Sums> partial(static_cast<size_t>(planes * cut.parts));
    launch(&cuda::quant_sum_planes_kernel<T, kBits>, {{3}, {64}}, grad_out, packed.codes.data(),
           packed.params.data(), cut, width, partial.data());
    check_sums(partial, samples, channels, cut.parts, grad, x_hat, inner, scales, "planes");
  } else {
    const int64_t n = channels * inner;
    const Dim3 grid{static_cast<unsigned>(ceil_div(n, 128)), 2};
    std::vector<cuda::Sums> partial(static_cast<size_t>(8 * n));
    launch(&cuda::quant_sum_columns_kernel<T, kBits>, {grid, {32, 4}}, grad_out,
           packed.codes.data(), packed.params.data(), samples, n, partial.data());
    check_sums(partial, 8, channels, inner, grad, x_hat, inner, scales, "columns");
  }
  std::vector<T> grad_x(static_cast<size_t>(numel));
  const cuda::ChannelShape shape{cuda::Division(channels), cuda::Division(inner)};
  launch(&cuda::quant_channel_norm_grad_kernel<T, kBits>, {{2}, {96}}, grad_out,
         packed.codes.data(), packed.params.data(), shape, slopes.data(), numel, grad_x.data());
  std::vector<double> mean(slopes.size()), slope = mean;
  for (size_t i = 0; i < grad.size(); ++i) {
    const size_t c = i / static_cast<size_t>(inner) % slopes.size();
    mean[c] += grad[i] / elements;
    slope[c] += grad[i] * x_hat[i] / elements;
  }
  int wrong = 0;
  for (size_t i = 0; i < grad.size(); ++i) {
    const size_t c = i / static_cast<size_t>(inner) % slopes.size();
    const double wanted = (grad[i] - mean[c] - x_hat[i] * slope[c]) * (rstd[c] * weight[c]);
    const double off =
        (elements + 8) * 0x1p-23 * (20 + 20 * std::fabs(x_hat[i])) * std::fabs(rstd[c] * weight[c]);
    const double actual = cuda::to_float(grad_x[i]);
    wrong += !(std::fabs(actual - wanted) <= off + kUnit<T> * std::fabs(wanted) + 0x1p-24);
  }
  CHECK(wrong == 0, "[%ld, %ld, %ld], %d bits: %d wrong", static_cast<long>(samples),
        static_cast<long>(channels), static_cast<long>(inner), kBits, wrong);
}

// Codes of one element, and of four, are those of a group.
template <int kBits>
void test_decoding(Random& random) {
  constexpr int64_t kNumel = 320;
  PackedNumbers<kBits> packed(kNumel, random, false);
  const std::vector<double> x = decoded(packed, kNumel);
  for (int64_t i = 0; i < kNumel; ++i) {
    float four[4];
    cuda::decode_four<kBits>(packed.codes.data(), packed.params.data(), i / 4 * 4, four);
    const float one = cuda::decode_one<kBits>(packed.codes.data(), packed.params.data(), i);
    const double wanted = x[static_cast<size_t>(i)];
    CHECK(four[i % 4] == wanted && one == wanted, "element %ld, %d bits", static_cast<long>(i),
          kBits);
  }
}

// What is not finite stays in its row, and comes into the sums.
void test_not_finite(Random& random) {
  constexpr int64_t kRows = 6, kFeatures = 64;
  std::vector<float> x = numbers<float>(kRows * kFeatures, random, false);
  x[2 * kFeatures + 5] = INFINITY;
  PackedNumbers<4> packed(x);
  const std::vector<float> grad(x.size(), 1.0f), rstd(kRows, 1.0f);
  std::vector<float> grad_x(x.size());
  std::vector<cuda::Sums> partial(2 * kFeatures);
  launch(&cuda::quant_norm_grad_kernel<float, 4, 1>, {{2}, {32, 2}}, grad.data(),
         packed.codes.data(), packed.params.data(),
         cuda::NormRows{rstd.data(), nullptr, kRows, kFeatures, 1.0f / kFeatures, true},
         grad_x.data(), partial.data());
  int wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) wrong += std::isnan(grad_x[i]) != (i / kFeatures == 2);
  CHECK(wrong == 0, "%d", wrong);
  CHECK(std::isnan(partial[3].at[0] + partial[kFeatures + 3].at[0]), "a sum without its NaN");
}

template <class T, int kBits>
void test_far(Random& random) {
  constexpr int64_t features = 512;
  const int64_t rows = (int64_t{1} << 32) / features + 9, numel = rows * features;
  Reserved<T> grad(numel), grad_x(numel);
  Reserved<uint8_t> codes(numel / 8 * kBits);
  Reserved<uint32_t> params(numel / kGroup);
  Reserved<float> rstd(rows);
  const std::vector<T> last = numbers<T>(features, random, false);
  PackedNumbers<kBits> packed(features, random, false);
  const int64_t begin = numel - features;
  std::memcpy(grad.data() + begin, last.data(), last.size() * sizeof(T));
  std::memcpy(codes.data() + begin / 8 * kBits, packed.codes.data(), packed.codes.size());
  std::memcpy(params.data() + begin / kGroup, packed.params.data(), packed.params.size() * 4);
  rstd.data()[rows - 1] = 2;
  const float one = 2;
  std::vector<T> wanted(last.size());
  std::vector<cuda::Sums> partial(last.size()), wanted_partial = partial;
  const auto kernel = &cuda::quant_norm_grad_kernel<T, kBits, 1>;
  launch(kernel, {{1}, {128}}, last.data(), packed.codes.data(), packed.params.data(),
         cuda::NormRows{&one, nullptr, 1, features, 1.0f / features, true}, wanted.data(),
         wanted_partial.data());
  // A block a row: of the partial sums only the last block's have a place.
  const auto blocks = static_cast<unsigned>(rows);
  launch_block(kernel, {{blocks}, {128}}, {blocks - 1}, grad.data(), codes.data(), params.data(),
               cuda::NormRows{rstd.data(), nullptr, rows, features, 1.0f / features, true},
               grad_x.data(), partial.data() - static_cast<int64_t>(blocks - 1) * features);
  CHECK(same_bytes(std::vector<T>(grad_x.data() + begin, grad_x.data() + numel), wanted), "far");
  CHECK(same_bytes(partial, wanted_partial), "far sums");
}

}  // namespace

int main() {
  Random random(1);
  test_decoding<8>(random);
  test_decoding<4>(random);
  test_decoding<3>(random);
  test_decoding<2>(random);
  for_types([&]<class T, int kBits>() {
    test_norm<T, kBits, 1>(7, 64, {2}, {32, 3}, 0, random);
    test_norm<T, kBits, 2>(5, 200, {1}, {32, 2}, 0, random);
    test_norm<T, kBits, 2>(3, 767, {2}, {96}, 0, random);
    test_norm<T, kBits, 1>(9, 37, {2}, {32, 2}, 1, random);
    test_norm<T, kBits, 0>(9, 301, {2}, {64}, 0, random);
    test_norm<T, kBits, 0>(5, 132, {2}, {32}, 1, random);
    test_channel_norm<T, kBits>(3, 5, 49, 52, 8, 0, random);
    test_channel_norm<T, kBits>(2, 3, 150, 40, 32, 1, random);
    test_channel_norm<T, kBits>(9, 40, 1, 0, 0, 0, random);
    test_channel_norm<T, kBits>(9, 5, 7, 0, 0, 1, random);
  });
  in_orders([&] {
    test_norm<float, 4, 1>(11, 100, {3}, {32, 4}, 0, random);
    test_norm<cuda::BFloat16, 3, 2>(11, 300, {2}, {96, 2}, 0, random);
    test_norm<float, 8, 0>(4, 300, {2}, {64}, 0, random);
    test_channel_norm<float, 4>(3, 2, 100, 32, 8, 0, random);
    test_not_finite(random);
  });
  test_far<cuda::BFloat16, 4>(random);
  return finish("test_cuda_quant_norm");
}
