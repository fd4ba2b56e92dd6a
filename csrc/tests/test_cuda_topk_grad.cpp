// topk_weight_grad's device code, run by the host shim, against the sum it is: x decoded by the
// kernel of the CPU and rounded, products added up token by token, the sums of splits afterwards.
// The shim's tensor cores add in that order, so results are the same bits.
#include "tests/host_shim.h"
// The shim stands before its parts and the device code.
#include "tests/host_tensor_core.h"
// The parts stand before the device code.
#include "cpu/topk_read.h"
#include "cuda/topk_grad.cuh"
#include "tests/check.h"
#include "tests/memory.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

template <class Value>
constexpr DType kValue = DType::f32;
template <>
constexpr DType kValue<cuda::BFloat16> = DType::bf16;
template <>
constexpr DType kValue<cuda::Half> = DType::f16;
template <>
constexpr DType kValue<int8_t> = DType::i8;

// Normal numbers, or with `special` any bits at all.
template <class T>
std::vector<T> numbers(int64_t count, bool special, Random& random) {
  if (special) return random_bits<T>(count, random);
  std::vector<T> x(static_cast<size_t>(count));
  for (T& each : x) {
    if constexpr (sizeof(T) == 1) {
      each = static_cast<T>(random() % 253 - 126);
    } else {
      each = cuda::from_math<T>(std::normal_distribution<float>()(random));
    }
  }
  return x;
}

// A packed tensor [tokens, features] whose positions ascend.
template <class Value>
struct Packed {
  int64_t tokens, features, kept = 0;
  int k, k_tail;
  bool bitmap;
  std::vector<Value> values;
  std::vector<uint8_t> positions;
  std::vector<uint16_t> scale;

  Packed(int64_t tokens, int64_t features, double keep, bool bitmap, bool special, Random& random)
      : tokens(tokens), features(features), bitmap(bitmap) {
    const int tail = static_cast<int>(features % kBlock);
    k = std::max(1, static_cast<int>(keep * kBlock));
    k_tail = tail ? std::max(1, static_cast<int>(keep * tail)) : 0;
    kept = features / kBlock * k + k_tail;
    const int64_t blocks = ceil_div(features, kBlock), row_bytes = ceil_div(features, 8);
    values = numbers<Value>(tokens * kept, special, random);
    positions.resize(static_cast<size_t>(tokens * (bitmap ? row_bytes : kept)));
    if (sizeof(Value) == 1) {
      for (int64_t i = 0; i < tokens * blocks; ++i) {
        scale.push_back(static_cast<uint16_t>(0x3c00 + random() % 256));
      }
    }
    size_t at = 0;
    for (int64_t i = 0; i < tokens * blocks; ++i) {
      const int64_t token = i / blocks, block = i % blocks;
      const int64_t size = std::min<int64_t>(kBlock, features - block * kBlock);
      std::vector<int64_t> all(static_cast<size_t>(size));
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random);
      all.resize(static_cast<size_t>(size < kBlock ? k_tail : k));
      std::sort(all.begin(), all.end());
      for (int64_t each : all) {
        if (bitmap) {
          const int64_t element = block * kBlock + each;
          positions[static_cast<size_t>(token * row_bytes + element / 8)] |=
              static_cast<uint8_t>(1 << element % 8);
        } else {
          positions[at++] = static_cast<uint8_t>(each);
        }
      }
    }
  }

  cuda::PackedTokens<Value> tokens_of() const {
    return {values.data(), positions.data(), scale.data(), features, kept, k, k_tail};
  }

  // By the CPU's kernel; bits are read by their starts.
  std::vector<float> decoded() const {
    std::vector<float> x(static_cast<size_t>(tokens * features));
    std::vector<int64_t> starts;
    const TopkReadKernels& kernels = topk_read_kernels();
    if (bitmap) {
      const int64_t blocks = ceil_div(features, kBlock), row_bytes = ceil_div(features, 8);
      starts.resize(static_cast<size_t>(tokens * (blocks + 1)));
      for (int64_t i = 0; i < tokens; ++i) {
        kernels.starts(positions.data() + i * row_bytes, features,
                       starts.data() + i * (blocks + 1));
      }
    }
    const TopkPacked packed = {kValue<Value>,
                               values.data(),
                               positions.data(),
                               scale.data(),
                               bitmap ? starts.data() : nullptr,
                               tokens,
                               features,
                               kept,
                               k,
                               bitmap};
    CHECK(kernels.unpack(packed, 0, tokens * features, DType::f32, x.data()), "positions ascend");
    return x;
  }
};

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

// Element (output, feature) of the sum over tokens [first, last).
template <class T>
float wanted(const std::vector<float>& x, const T* grad_out, int64_t outputs, int64_t features,
             int64_t first, int64_t last, int64_t output, int64_t feature) {
  float sum = 0;
  for (int64_t token = first; token < last; ++token) {
    const T rounded = cuda::from_math<T>(x[static_cast<size_t>(token * features + feature)]);
    sum += cuda::to_math(grad_out[token * outputs + output]) * cuda::to_math(rounded);
  }
  return sum;
}

template <class T, class Value>
auto kernel_of(bool bitmap) {
  return bitmap ? &cuda::topk_weight_grad_kernel<T, Value, cuda::BitReader>
                : &cuda::topk_weight_grad_kernel<T, Value, cuda::ByteReader>;
}

struct Case {
  int64_t tokens, outputs, features;
  double keep;
  int64_t split_tokens = 1 << 20;
  bool special = false;
  bool misaligned = false;
};

template <class T, class Value>
void test(const Case& c, bool bitmap, Random& random) {
  const Packed<Value> packed(c.tokens, c.features, c.keep, bitmap, c.special, random);
  const std::vector<float> x = packed.decoded();
  const int shift = c.misaligned;
  auto memory = numbers<T>(c.tokens * c.outputs + shift, c.special, random);
  const T* grad_out = memory.data() + shift;
  const bool aligned = !c.misaligned && c.outputs % 8 == 0;
  const int64_t splits = ceil_div(c.tokens, c.split_tokens), numel = c.outputs * c.features;
  std::vector<float> out = random_bits<float>(numel, random);
  std::vector<float> parts = random_bits<float>((splits - 1) * numel, random);
  const int64_t tiles = ceil_div(c.outputs, 128) * ceil_div(c.features, 256);
  launch(kernel_of<T, Value>(bitmap), {{static_cast<unsigned>(tiles * splits)}, {256}},
         packed.tokens_of(), grad_out, aligned, c.tokens, c.outputs, c.split_tokens, out.data(),
         parts.data());
  int64_t wrong = 0;
  for (int64_t split = 0; split < splits; ++split) {
    const float* part = split == 0 ? out.data() : parts.data() + (split - 1) * numel;
    const int64_t first = split * c.split_tokens;
    const int64_t last = std::min(c.tokens, first + c.split_tokens);
    for (int64_t i = 0; i < numel; ++i) {
      const float sum =
          wanted(x, grad_out, c.outputs, c.features, first, last, i / c.features, i % c.features);
      wrong += !same(part[i], sum);
    }
  }
  CHECK(wrong == 0,
        "%ld of %ld tokens, %ld outputs, %ld features, keep %g, split %ld, values %d, bitmap %d: "
        "wrong",
        static_cast<long>(wrong), static_cast<long>(c.tokens), static_cast<long>(c.outputs),
        static_cast<long>(c.features), c.keep, static_cast<long>(c.split_tokens),
        static_cast<int>(kValue<Value>), bitmap);
}

template <class T, class Value>
void test_both(const Case& c, Random& random) {
  test<T, Value>(c, false, random);
  test<T, Value>(c, true, random);
}

void test_grad(Random& random) {
  using cuda::BFloat16;
  using cuda::Half;
  // Every type, and what may be anything: NaN, infinities, codes of both, subnormal numbers.
  for (bool special : {false, true}) {
    test_both<BFloat16, int8_t>({35, 24, 256, 0.1, 1 << 20, special}, random);
    test_both<Half, int8_t>({35, 24, 256, 0.1, 1 << 20, special}, random);
    test_both<BFloat16, float>({35, 24, 256, 0.1, 1 << 20, special}, random);
    test_both<Half, BFloat16>({35, 24, 256, 0.1, 1 << 20, special}, random);
    test_both<BFloat16, Half>({35, 24, 256, 0.1, 1 << 20, special}, random);
  }
  // Tiles, edges, splits, addresses; few and many entries.
  for (const Case& c : {Case{1, 1, 1, 0.5}, Case{33, 131, 257, 0.03}, Case{64, 8, 7, 1},
                        Case{70, 136, 512, 0.06, 32}, Case{97, 10, 300, 0.25, 64},
                        Case{40, 16, 256, 1}, Case{33, 16, 256, 0.03, 1 << 20, false, true}}) {
    test_both<BFloat16, int8_t>(c, random);
  }
}

// Positions that do not ascend, bits that are more or fewer than the values: nothing outside is
// read or written, which the sanitiser sees.
void test_wrong_data(Random& random) {
  for (bool bitmap : {false, true}) {
    if (kSeesRaces && !bitmap) continue;  // of positions that are there twice either may win
    for (int64_t features : {256, 300}) {
      Packed<int8_t> packed(40, features, 0.1, bitmap, true, random);
      packed.positions =
          random_bits<uint8_t>(static_cast<int64_t>(packed.positions.size()), random);
      const auto grad_out = numbers<cuda::Half>(40 * 8, false, random);
      std::vector<float> out(static_cast<size_t>(8 * features));
      const auto blocks = static_cast<unsigned>(ceil_div(features, kBlock));
      launch(kernel_of<cuda::Half, int8_t>(bitmap), {{blocks}, {256}}, packed.tokens_of(),
             grad_out.data(), true, 40, 8, 64, out.data(), nullptr);
      CHECK(std::any_of(out.begin(), out.end(), [](float each) { return each != 0; }), "no sums");
    }
  }
}

// The last block of threads of a launch whose tensors have more than 2^31 elements.
void test_large_offsets(Random& random) {
  using T = cuda::BFloat16;
  const int64_t features = 8192, outputs = 600, k = 26, blocks = features / kBlock;
  const int64_t kept = blocks * k, split_tokens = 8416, splits = 500, last = 40;
  const int64_t tokens = (splits - 1) * split_tokens + last, numel = outputs * features;
  Huge<int8_t> values(tokens * kept);
  Huge<uint8_t> positions(tokens * kept);
  Huge<uint16_t> scale(tokens * blocks);
  Huge<T> grad_out(tokens * outputs);
  Huge<float> parts((splits - 1) * numel);
  CHECK(std::min(tokens * outputs, (splits - 2) * numel) > int64_t{1} << 31, "too small");
  const Packed<int8_t> packed(last, features, 26.5 / 256, false, false, random);
  CHECK(packed.kept == kept, "%ld", static_cast<long>(packed.kept));
  std::copy(packed.values.begin(), packed.values.end(), &values[(tokens - last) * kept]);
  std::copy(packed.positions.begin(), packed.positions.end(), &positions[(tokens - last) * kept]);
  std::copy(packed.scale.begin(), packed.scale.end(), &scale[(tokens - last) * blocks]);
  const auto grad = numbers<T>(last * outputs, false, random);
  std::copy(grad.begin(), grad.end(), &grad_out[(tokens - last) * outputs]);
  const cuda::PackedTokens<int8_t> x = {
      values.data(), positions.data(), scale.data(), features, kept, k, 0};
  const auto grid = static_cast<unsigned>(ceil_div(outputs, 128) * blocks * splits);
  launch_block(kernel_of<T, int8_t>(false), {{grid}, {256}}, {grid - 1, 0, 0}, x, grad_out.data(),
               true, tokens, outputs, split_tokens, static_cast<float*>(nullptr), parts.data());
  const std::vector<float> decoded = packed.decoded();
  const float* part = &parts[(splits - 2) * numel];
  for (int64_t o = outputs - outputs % 128; o < outputs; ++o) {
    for (int64_t f = features - kBlock; f < features; ++f) {
      const float sum = wanted(decoded, grad.data(), outputs, features, 0, last, o, f);
      CHECK(same(part[o * features + f], sum), "%ld, %ld", static_cast<long>(o),
            static_cast<long>(f));
    }
    CHECK(part[o * features + features - kBlock - 1] == 0, "another tile was written to");
  }
}

template <int kWide>
void test_parts(int64_t numel, int64_t count, Dim3 grid, Random& random) {
  const auto parts = numbers<float>(count * numel, false, random);
  auto out = numbers<float>(numel, false, random), sums = out;
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < numel; ++i) {
      sums[static_cast<size_t>(i)] += parts[static_cast<size_t>(part * numel + i)];
    }
  }
  launch(&cuda::add_parts_kernel<kWide>, {grid, {64}}, parts.data(), count, numel, out.data());
  CHECK(same_bytes(out, sums), "%ld parts of %ld numbers", static_cast<long>(count),
        static_cast<long>(numel));
}

// What one instruction reads of eight rows is in different banks.
template <int kColumns>
void test_banks() {
  auto tile = std::make_unique<cuda::SharedTile<cuda::Half, kColumns>>();
  for (int column = 0; column < kColumns; column += 8) {
    unsigned banks = 0;
    for (int row = 8; row < 16; ++row) {
      banks |= 1u << (tile->piece(row, column) - tile->piece(0, 0)) / 8 % 8;
    }
    CHECK(banks == 0xff, "column %d of %d: %x", column, kColumns, banks);
  }
}

// Every token is in one split, splits have work, and parts stay small.
void test_splits() {
  for (int64_t tokens : {1, 31, 33, 1000, 12608, 100000}) {
    for (int64_t outputs : {1, 768, 3072}) {
      for (int64_t features : {1, 768, 4096, 65536}) {
        const int64_t each = cuda::split_tokens_of(tokens, outputs, features, 132);
        const int64_t splits = ceil_div(tokens, each);
        CHECK(each > 0 && each % 32 == 0 && (splits - 1) * outputs * features <= 8 << 20,
              "%ld tokens in splits of %ld", static_cast<long>(tokens), static_cast<long>(each));
        const int64_t tiles = ceil_div(outputs, 128) * ceil_div(features, 256);
        CHECK(splits == 1 || tiles * splits <= 4 * 132, "%ld splits", static_cast<long>(splits));
      }
    }
  }
  CHECK(ceil_div(12608, cuda::split_tokens_of(12608, 768, 768, 132)) == 7, "18 tiles");
  CHECK(cuda::split_tokens_of(12608, 8192, 8192, 132) >= 12608, "2048 tiles");
}

}  // namespace

int main() {
  Random random(1);
  in_orders([&] {
    test_grad(random);
    test_wrong_data(random);
    for (Dim3 grid : {Dim3{1}, Dim3{5}}) {
      test_parts<1>(301, 3, grid, random);
      test_parts<4>(1300, 2, grid, random);
    }
  });
  test_large_offsets(random);
  test_splits();
  test_banks<cuda::kGradOutputs>();
  test_banks<kBlock>();
  return finish("test_cuda_topk_grad");
}
