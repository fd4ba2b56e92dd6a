// The kernels of masked linear layers, every instruction set this machine runs, against plain
// loops, in buffers of exactly the size they may read.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/masked.h"
#include "cpu/topk_columns.h"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

struct Kernels {
  const MaskedKernels& masked;
  const TopkGradKernels& tiles;
};

Kernels table(Isa isa) {
  switch (isa) {
    MEMTL_IF_AVX2(case Isa::avx2 : return {avx2::masked, avx2::topk_grad};)
    MEMTL_IF_AVX512(case Isa::avx512 : return {avx512::masked, avx512::topk_grad};)
    default:
      return {portable::masked, portable::topk_grad};
  }
}

std::vector<char> numbers(DType dtype, int64_t count, Random& random) {
  std::vector<char> x(static_cast<size_t>(count * size_of(dtype)));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) store_float(dtype, x.data(), i, normal(random));
  return x;
}

struct Mask {
  std::vector<bool> kept;
  std::vector<uint8_t> bits;

  Mask(int64_t numel, double density, Random& random) : kept(size_t(numel)) {
    bits.resize(size_t(ceil_div(numel, 8)));
    std::bernoulli_distribution keep(density);
    for (size_t i = 0; i < kept.size(); ++i) {
      kept[i] = keep(random);
      if (kept[i]) bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | 1 << i % 8);
    }
  }
};

// Every entry is in the columns of its feature, once, and nothing else is.
void test_sort(Isa isa, const Mask& mask, int64_t outputs, int64_t inputs, DType dtype,
               Random& random) {
  const MaskedKernels& kernels = table(isa).masked;
  const auto values = numbers(dtype, outputs * inputs, random);
  const MaskedWeight weight = {dtype, values.data(), mask.bits.data(), outputs, inputs};
  for (const bool by_inputs : {true, false}) {
    const int64_t tokens = by_inputs ? inputs : outputs, features = by_inputs ? outputs : inputs;
    const int64_t width = 48, panels = ceil_div(features, width);
    std::vector<uint32_t> cursors(size_t(features), 77);
    std::vector<bool> found(mask.kept.size());
    for (int64_t first = 0; first < tokens; first += kTopkTokens) {
      const int64_t last = std::min(tokens, first + kTopkTokens);
      const int64_t entries = kernels.count_entries(weight, by_inputs, first, last, cursors.data());
      ColumnMemory memory;
      std::vector<TopkColumns> columns(static_cast<size_t>(panels));
      kernels.sort(weight, by_inputs, first, last, width, memory.storage(entries, features, panels),
                   columns.data(), cursors.data());
      int64_t seen = 0;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const TopkColumns& column = columns[size_t(panel)];
        int64_t place = 0;
        for (int64_t pair = 0; pair < column.pairs; ++pair) {
          for (int64_t side = 0; side < 2; ++side) {
            const int64_t feature = panel * width + column.features[2 * pair + side];
            for (int64_t i = 0; i < column.lengths[2 * pair + side]; ++i, ++seen) {
              const int64_t token = first + column.tokens[place + 2 * i + side];
              const int64_t at = by_inputs ? feature * inputs + token : token * inputs + feature;
              CHECK(token < last && feature < features, "%s by %d", name(isa), by_inputs);
              CHECK(mask.kept[size_t(at)] && !found[size_t(at)], "%s by %d", name(isa), by_inputs);
              CHECK(column.values[place + 2 * i + side] == load_float(dtype, values.data(), at),
                    "%s by %d dtype %d", name(isa), by_inputs, int(dtype));
              found[size_t(at)] = true;
            }
          }
          place += 2 * column.lengths[2 * pair];
        }
      }
      CHECK(seen == entries, "%s by %d: %d of %d", name(isa), by_inputs, int(seen), int(entries));
    }
    CHECK(found == mask.kept, "%s by %d", name(isa), by_inputs);
  }
}

void test_dot(Isa isa, const Mask& mask, int64_t outputs, int64_t inputs, int64_t tokens,
              DType dtype, Random& random) {
  const auto [kernels, tiles] = table(isa);
  const auto grad = numbers(dtype, tokens * outputs, random);
  const auto x = numbers(dtype, tokens * inputs, random);
  const MaskedWeight weight = {dtype, nullptr, mask.bits.data(), outputs, inputs};
  const int64_t first_row = outputs / 3, rows = outputs - first_row;
  const int64_t chunk = 2 * tiles.tile, row_tile = rows * tiles.tile;
  const int64_t input_tile = kMaskedFeatures * tiles.tile;
  const Workspace of_rows = workspace(rows * chunk), of_inputs = workspace(2 * input_tile);
  std::vector<float> out(size_t(outputs * inputs), std::nanf(""));
  for (int64_t feature = 0; feature < inputs; feature += kMaskedFeatures) {
    const int64_t features = std::min<int64_t>(inputs - feature, kMaskedFeatures);
    std::vector<uint8_t> lengths(static_cast<size_t>(rows));
    std::vector<uint8_t> positions(static_cast<size_t>(rows * features));
    const int64_t count = kernels.list(weight, first_row, outputs, feature, features,
                                       lengths.data(), positions.data());
    const MaskedEntries entries = {rows, lengths.data(), positions.data()};
    std::vector<float> sums(static_cast<size_t>(ceil_div(count, tiles.lanes) * tiles.lanes));
    for (int64_t token = 0; token < tokens;) {
      const int64_t left = tokens - token, both = left >= chunk ? 2 : 1;
      const int64_t size = std::min(left, both * tiles.tile);
      tiles.fill(dtype, grad.data(), token * outputs + first_row, 1, outputs, rows, size,
                 of_rows.get(), row_tile);
      tiles.fill(dtype, x.data(), token * inputs + feature, 1, inputs, features, size,
                 of_inputs.get(), input_tile);
      kernels.dot(entries, both, ceil_div(std::min(size, tiles.tile), tiles.lanes), of_rows.get(),
                  row_tile, of_inputs.get(), input_tile, sums.data());
      token += size;
    }
    kernels.spread(entries, sums.data(), features, out.data() + first_row * inputs + feature,
                   inputs);
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < inputs; ++i) {
      const float got = out[size_t(o * inputs + i)];
      if (o < first_row) {
        CHECK(std::isnan(got), "%s wrote row %d", name(isa), int(o));
        continue;
      }
      double sum = 0, size = 0;
      for (int64_t t = 0; t < tokens && mask.kept[size_t(o * inputs + i)]; ++t) {
        const double term = double(load_float(dtype, grad.data(), t * outputs + o)) *
                            double(load_float(dtype, x.data(), t * inputs + i));
        sum += term;
        size += std::abs(term);
      }
      // Each of the additions and products errs by half a unit at most.
      CHECK(std::abs(got - sum) <= double(tokens + 17) * 0x1p-24 * size,
            "%s [%d, %d] of %d tokens, dtype %d: %g, not %g", name(isa), int(o), int(i),
            int(tokens), int(dtype), double(got), sum);
    }
  }
}

void test(Isa isa) {
  struct Case {
    int64_t outputs, inputs, tokens;
    double density;
  };
  Random random(1);
  for (const Case& c :
       {Case{5, 9, 3, 0.3}, Case{70, 200, 131, 0.1}, Case{1, 1, 1, 1.0}, Case{130, 70, 300, 0.2},
        Case{33, 64, 64, 1.0}, Case{300, 129, 17, 0.05}, Case{7, 65, 90, 0.0}}) {
    const Mask mask(c.outputs * c.inputs, c.density, random);
    const int64_t kept = std::count(mask.kept.begin(), mask.kept.end(), true);
    const auto bytes = static_cast<int64_t>(mask.bits.size());
    CHECK(table(isa).masked.count(mask.bits.data(), bytes) == kept, "%s", name(isa));
    for (const DType dtype : kTypes) {
      test_sort(isa, mask, c.outputs, c.inputs, dtype, random);
      test_dot(isa, mask, c.outputs, c.inputs, c.tokens, dtype, random);
    }
  }
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (available(isa)) test(isa);
  }
  return finish("masked");
}
