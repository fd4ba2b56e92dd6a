// Every instruction set's top-k kernels against the portable ones and against plain definitions.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/topk_grad.h"
#include "cpu/topk_pack.h"
#include "cpu/topk_read.h"

namespace {

using namespace memtl;

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, context, #condition); \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (false)

char context[256] = "";

// The kernels of one instruction set; those of the portable one are the definition.
struct Kernels {
  const TopkPackKernels& pack;
  const TopkReadKernels& read;
  const TopkGradKernels& grad;
};

const Kernels kPlain = {portable::topk_pack, portable::topk_read, portable::topk_grad};

Kernels table(Isa isa) {
  switch (isa) {
    MEMTL_IF_AVX2(case Isa::avx2 : return {avx2::topk_pack, avx2::topk_read, avx2::topk_grad};)
    MEMTL_IF_AVX512(
        case Isa::avx512 : return {avx512::topk_pack, avx512::topk_read, avx512::topk_grad};)
    default:
      return kPlain;
  }
}

enum class Kind { normal, ties, zeros, special };

std::vector<float> numbers(int64_t count, Kind kind, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  const float inf = std::numeric_limits<float>::infinity();
  for (float& each : x) {
    each = normal(random);
    if (kind == Kind::ties) each = std::round(each * 2) / 2;
    if (kind == Kind::zeros) each = std::max(0.0f, each - 1);
    if (kind == Kind::special && random() % 20 == 0) {
      const float odd[] = {inf, -inf, std::nanf(""), 1e-40f, -1e-40f, 3e38f, 0.0f, -0.0f};
      each = odd[random() % 8];
    }
  }
  return x;
}

// x in another dtype, in memory of exactly its size so that reading beyond it is caught.
std::vector<char> as(DType dtype, const std::vector<float>& x) {
  std::vector<char> data(x.size() * static_cast<size_t>(size_of(dtype)));
  for (size_t i = 0; i < x.size(); ++i) {
    store_float(dtype, data.data(), static_cast<int64_t>(i), x[i]);
  }
  return data;
}

std::vector<float> floats_of(DType dtype, const std::vector<char>& data) {
  std::vector<float> x(data.size() / static_cast<size_t>(size_of(dtype)));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = load_float(dtype, data.data(), static_cast<int64_t>(i));
  return x;
}

struct Packed {
  int64_t rows, n, kept, k;
  DType value;
  bool bitmap;
  std::vector<char> values;
  std::vector<uint8_t> positions;
  std::vector<uint16_t> scale;
  std::vector<int16_t> counts;
  std::vector<int64_t> starts;

  Packed(int64_t rows, int64_t n, int64_t kept, int64_t k, DType value, bool bitmap)
      : rows(rows), n(n), kept(kept), k(k), value(value), bitmap(bitmap) {
    values.resize(static_cast<size_t>(rows * kept * size_of(value)));
    positions.resize(static_cast<size_t>(rows * (bitmap ? ceil_div(n, 8) : kept)));
    if (value == DType::i8) scale.resize(static_cast<size_t>(rows * ceil_div(n, kBlock)));
    counts.resize(static_cast<size_t>(rows * ceil_div(n, kBlock)));
  }

  TopkOutput output() {
    return {value,
            values.data(),
            positions.data(),
            scale.empty() ? nullptr : scale.data(),
            counts.data(),
            kept,
            bitmap};
  }

  TopkPacked reading() {
    const int64_t blocks = ceil_div(n, kBlock);
    starts.clear();
    for (int64_t row = 0; row < rows; ++row) {
      int64_t entries = 0;
      for (int64_t i = 0; i < blocks; ++i) {
        starts.push_back(entries);
        entries += counts[static_cast<size_t>(row * blocks + i)];
      }
      starts.push_back(entries);
    }
    return {value, values.data(), positions.data(), scale.data(), starts.data(), rows, n, kept,
            k,     bitmap};
  }

  bool operator==(const Packed& other) const {
    return values == other.values && positions == other.positions && scale == other.scale &&
           counts == other.counts;
  }
};

// The k largest of count magnitudes, ties cut by position.
std::vector<bool> largest(const float* x, int64_t count, int64_t k) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return (float_bits(x[a]) & 0x7fffffff) > (float_bits(x[b]) & 0x7fffffff);
  });
  std::vector<bool> kept(static_cast<size_t>(count));
  for (int64_t i = 0; i < k; ++i) kept[static_cast<size_t>(order[static_cast<size_t>(i)])] = true;
  return kept;
}

std::vector<bool> kept_of(const Kernels& kernels, Packed packed) {
  // Unpacked values may be zero, so ones are unpacked instead.
  Packed ones = packed;
  ones.value = DType::f32;
  ones.values =
      as(DType::f32, std::vector<float>(static_cast<size_t>(packed.rows * packed.kept), 1));
  std::vector<float> dense(static_cast<size_t>(packed.rows * packed.n));
  CHECK(kernels.read.unpack(ones.reading(), 0, packed.rows * packed.n, DType::f32, dense.data()));
  return {dense.begin(), dense.end()};
}

constexpr DType kInputs[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
constexpr DType kValues[] = {DType::f32, DType::bf16, DType::f16, DType::i8};
constexpr Kind kKinds[] = {Kind::normal, Kind::ties, Kind::zeros, Kind::special};

void test_pack(Isa isa) {
  const Kernels kernels = table(isa), &plain = kPlain;
  for (const int64_t n : {1, 7, 255, 256, 257, 600, 768}) {
    for (const Kind kind : kKinds) {
      for (const DType dtype : kInputs) {
        for (const DType value : kValues) {
          for (const int64_t k : {0, 1, 8, 26, 128, 255, 256}) {
            const bool bitmap = (k + n) % 2;
            const int64_t rows = 3, k_tail = std::min(n % kBlock, k);
            std::snprintf(context, sizeof context, "pack %s n %d kind %d dtype %d value %d k %d",
                          name(isa), int(n), int(kind), int(dtype), int(value), int(k));
            const auto x = as(dtype, numbers(rows * n, kind, uint32_t(n + k)));
            const int64_t kept = n / kBlock * k + k_tail;
            Packed got(rows, n, kept, k, value, bitmap), wanted = got;
            kernels.pack.pack(dtype, x.data(), n, k, k_tail, got.output(), 0, rows);
            plain.pack.pack(dtype, x.data(), n, k, k_tail, wanted.output(), 0, rows);
            CHECK(got == wanted);
            const auto numbers = floats_of(dtype, x);
            const auto mask = kept_of(kernels, got);
            for (int64_t at = 0; at < rows * n;) {
              const int64_t size = std::min<int64_t>(kBlock, n - at % n);
              const auto block = largest(&numbers[size_t(at)], size, size == kBlock ? k : k_tail);
              CHECK(std::equal(block.begin(), block.end(), mask.begin() + at));
              at += size;
            }
            std::vector<int64_t> starts(size_t(ceil_div(n, kBlock) + 1));
            if (bitmap) {
              CHECK(kernels.read.starts(got.positions.data(), n, starts.data()));
              CHECK(starts.back() == kept);
            }
          }
        }
      }
    }
  }
}

void test_rows(Isa isa) {
  const Kernels kernels = table(isa), &plain = kPlain;
  for (const int64_t n : {1, 33, 600, 5000}) {
    for (const Kind kind : kKinds) {
      for (const DType dtype : kInputs) {
        std::snprintf(context, sizeof context, "row %s n %d kind %d dtype %d", name(isa), int(n),
                      int(kind), int(dtype));
        const auto x = as(dtype, numbers(n, kind, uint32_t(n)));
        std::vector<uint32_t> keys(size_t(n), 0), keys_plain(keys);
        kernels.pack.keys(dtype, x.data(), n, keys.data());
        plain.pack.keys(dtype, x.data(), n, keys_plain.data());
        CHECK(keys == keys_plain);
        for (const int64_t k : {int64_t{1}, (n + 9) / 10, n}) {
          int64_t above;
          const uint32_t t = kernels.pack.threshold(keys.data(), n, k, 0, 0x7fffffff, &above);
          int64_t over = 0, equal = 0;
          for (const uint32_t key : keys) over += key > t, equal += key == t;
          CHECK(over == above && above <= k && above + equal >= k);

          for (const int64_t room : {int64_t{0}, n / 3, n}) {
            std::vector<uint32_t> stored(size_t(room) + 16);
            const uint32_t lo = t - std::min<uint32_t>(t, 1 << 20), hi = t;
            int64_t inside, between = 0;
            kernels.pack.count(dtype, x.data(), n, lo, hi, &above, &inside, stored.data(), room);
            std::vector<uint32_t> wanted;
            for (const uint32_t key : keys) {
              between += key >= lo && key <= hi;
              if (key >= lo && key <= hi) wanted.push_back(key);
            }
            CHECK(above == over && inside == between);
            const auto count = std::ptrdiff_t(std::min(room, inside));
            CHECK(std::equal(wanted.begin(), wanted.begin() + count, stored.begin()));
          }

          const bool bitmap = k % 2;
          Packed got(1, n, k, 0, DType::i8, bitmap);
          kernels.pack.pack_above(dtype, x.data(), n, 0, 0, ceil_div(n, kBlock), t, k - over, 0,
                                  got.output());
          Packed wanted(1, n, k, 0, DType::i8, bitmap);
          plain.pack.pack_above(dtype, x.data(), n, 0, 0, ceil_div(n, kBlock), t, k - over, 0,
                                wanted.output());
          CHECK(got == wanted);
          CHECK(kept_of(kernels, got) == largest(floats_of(dtype, x).data(), n, k));
        }
      }
    }
  }
}

void test_unpack(Isa isa) {
  const Kernels kernels = table(isa), &plain = kPlain;
  for (const int64_t n : {7, 256, 600}) {
    for (const DType value : kValues) {
      for (const DType dtype : kInputs) {
        std::snprintf(context, sizeof context, "unpack %s n %d value %d dtype %d", name(isa),
                      int(n), int(value), int(dtype));
        const int64_t rows = 4, k = 31, k_tail = std::min<int64_t>(n % kBlock, 5);
        const auto x = numbers(rows * n, Kind::special, 5);
        Packed packed(rows, n, n / kBlock * k + k_tail, k, value, value == DType::f16);
        plain.pack.pack(DType::f32, x.data(), n, k, k_tail, packed.output(), 0, rows);
        const TopkPacked reading = packed.reading();
        for (const auto& [first, last] :
             {std::pair<int64_t, int64_t>{0, rows * n}, {3, rows * n - 2}, {n, n + 1}, {5, 5}}) {
          std::vector<char> got(size_t((last - first) * size_of(dtype))), wanted(got);
          CHECK(kernels.read.unpack(reading, first, last, dtype, got.data()));
          CHECK(plain.read.unpack(reading, first, last, dtype, wanted.data()));
          // NaN has more than one bit pattern.
          const auto a = floats_of(dtype, got), b = floats_of(dtype, wanted);
          for (size_t i = 0; i < a.size(); ++i) {
            CHECK(float_bits(a[i]) == float_bits(b[i]) || (std::isnan(a[i]) && std::isnan(b[i])));
          }
        }
        if (!packed.bitmap) {
          std::swap(packed.positions[0], packed.positions[1]);
          std::vector<char> out(size_t(rows * n * size_of(dtype)));
          CHECK(!kernels.read.unpack(reading, 0, rows * n, dtype, out.data()));
        }
      }
    }
  }
}

// What TopkColumns point to, each array of just the size that is asked for.
struct Columns {
  std::vector<uint32_t> features;
  std::vector<uint16_t> lengths;
  std::vector<uint8_t> tokens;
  std::vector<float> values;

  Columns(int64_t entries, int64_t width, int64_t panels, int64_t blocks = 1)
      : features(size_t(blocks * (width + 2 * panels))),
        lengths(features.size()),
        tokens(size_t(entries + blocks * panels * kTopkTokens)),
        values(tokens.size()) {}

  TopkStorage storage() { return {features.data(), lengths.data(), tokens.data(), values.data()}; }
};

// Floats aligned to 64 bytes.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, size_t(count * 4 + 63) / 64 * 64))) {}
  Floats(const Floats&) = delete;
  ~Floats() { std::free(data_); }
  float* data() { return data_; }

 private:
  float* data_;
};

void test_weight_grad(Isa isa) {
  const Kernels kernels = table(isa);
  struct Case {
    int64_t rows, n, features, outputs, width;
  };
  // n is: the features, several tokens, tokens whose blocks are cut anywhere, less than a token
  for (const Case& c :
       {Case{200, 256, 256, 70, 96}, Case{3, 600, 600, 5, 600}, Case{5, 1536, 768, 64, 512},
        Case{3, 57 * 11, 57, 33, 64}, Case{130, 1, 1, 1, 64}, Case{20, 100, 250, 40, 64},
        Case{2, 300, 4, 17, 64}}) {
    for (const DType dtype : kInputs) {
      for (const bool bitmap : {false, true}) {
        std::snprintf(context, sizeof context, "weight_grad %s n %d features %d dtype %d bitmap %d",
                      name(isa), int(c.n), int(c.features), int(dtype), int(bitmap));
        const int64_t tokens = c.rows * c.n / c.features, k = 30;
        const int64_t k_tail = std::min<int64_t>(c.n % kBlock, 9);
        const auto x = numbers(c.rows * c.n, Kind::normal, 11);
        Packed packed(c.rows, c.n, c.n / kBlock * k + k_tail, k, DType::bf16, bitmap);
        kernels.pack.pack(DType::f32, x.data(), c.n, k, k_tail, packed.output(), 0, c.rows);
        const TopkPacked reading = packed.reading();
        std::vector<float> dense(x.size());
        CHECK(kernels.read.unpack(reading, 0, c.rows * c.n, DType::f32, dense.data()));
        const auto grad = as(dtype, numbers(tokens * c.outputs, Kind::normal, 12));
        const auto grad_floats = floats_of(dtype, grad);

        const int64_t panels = ceil_div(c.features, c.width);
        const int64_t blocks = ceil_div(tokens, kTopkTokens);
        std::vector<TopkColumns> columns(size_t(blocks * panels));
        std::vector<uint32_t> cursors(size_t(c.features), 77);
        std::vector<Columns> memory;
        for (int64_t i = 0; i < blocks; ++i) {
          memory.emplace_back(c.rows * packed.kept, c.features, panels);
          CHECK(kernels.grad.transpose(
              reading, c.features, i * kTopkTokens, std::min(tokens, (i + 1) * kTopkTokens),
              c.width, memory.back().storage(), &columns[size_t(i * panels)], cursors.data()));
        }
        std::vector<float> out(size_t(c.outputs * c.features), std::nanf(""));
        // Two tiles at a time, the second of which may be less than one.
        const int64_t tile = kernels.grad.tile, sums_size = (c.width + 1) * tile;
        Floats rows(2 * kTopkTokens * tile), sums(2 * sums_size);
        for (int64_t panel = 0; panel < panels; ++panel) {
          for (int64_t o = 0; o < c.outputs; o += 2 * tile) {
            const int64_t count = std::min(2 * tile, c.outputs - o);
            std::fill_n(sums.data(), 2 * sums_size, 0.0f);
            for (int64_t block = 0; block < blocks; ++block) {
              const int64_t token = block * kTopkTokens;
              kernels.grad.fill(dtype, grad.data(), token * c.outputs + o, c.outputs, 1,
                                std::min<int64_t>(tokens - token, kTopkTokens), count, rows.data(),
                                kTopkTokens * tile);
              for (int64_t i = 0; i * tile < count; ++i) {
                const int64_t some = std::min(count - i * tile, tile);
                kernels.grad.accumulate(
                    columns[size_t(block * panels + panel)], ceil_div(some, kernels.grad.lanes),
                    rows.data() + i * kTopkTokens * tile, sums.data() + i * sums_size);
              }
            }
            const int64_t width = std::min(c.width, c.features - panel * c.width);
            for (int64_t i = 0; i * tile < count; ++i) {
              kernels.grad.write(
                  sums.data() + i * sums_size, 0, 1, width, std::min(count - i * tile, tile),
                  out.data() + (o + i * tile) * c.features + panel * c.width, c.features);
            }
          }
        }
        for (int64_t o = 0; o < c.outputs; ++o) {
          for (int64_t f = 0; f < c.features; ++f) {
            double sum = 0, size = 0;
            for (int64_t t = 0; t < tokens; ++t) {
              const double term = double(grad_floats[size_t(t * c.outputs + o)]) *
                                  double(dense[size_t(t * c.features + f)]);
              sum += term;
              size += std::abs(term);
            }
            // Each of the tokens' additions and products errs by half a unit at most.
            const double bound = double(tokens + 1) * 0x1p-24 * size;
            CHECK(std::abs(out[size_t(o * c.features + f)] - sum) <= bound);
          }
        }
      }
    }
  }
}

// The entries of images, times rows that are shifted by 0, 1, ... for every set.
void test_conv_grad(Isa isa) {
  const Kernels kernels = table(isa);
  struct Case {
    int64_t images, channels, pixels, between, sets, outputs, width;
  };
  for (const Case& c :
       {Case{3, 5, 100, 0, 1, 5, 64}, Case{1, 70, 300, 7, 3, 70, 64}, Case{4, 9, 49, 3, 9, 16, 64},
        Case{2, 3, 1, 0, 20, 33, 16}, Case{2, 300, 2, 1, 2, 1, 128}}) {
    for (const bool channels_last : {false, true}) {
      for (const bool bitmap : {false, true}) {
        std::snprintf(context, sizeof context, "conv_grad %s channels %d pixels %d last %d",
                      name(isa), int(c.channels), int(c.pixels), int(channels_last));
        const int64_t n = c.channels * c.pixels, k = 60, k_tail = std::min<int64_t>(n % kBlock, 3);
        const auto x = numbers(c.images * n, Kind::normal, 13);
        Packed packed(c.images, n, n / kBlock * k + k_tail, k, DType::i8, bitmap);
        kernels.pack.pack(DType::f32, x.data(), n, k, k_tail, packed.output(), 0, c.images);
        const TopkPacked reading = packed.reading();
        std::vector<float> dense(x.size());
        CHECK(kernels.read.unpack(reading, 0, c.images * n, DType::f32, dense.data()));

        // Every fifth pixel is left out, the others stand backwards.
        std::vector<int32_t> tokens(size_t(c.pixels), -1);
        for (int64_t p = 0; p < c.pixels; ++p) {
          if (p % 5 != 4) tokens[size_t(p)] = int32_t(c.pixels - 1 - p);
        }
        const int64_t step = c.pixels + c.between, blocks = ceil_div(c.images * step, kTopkTokens);
        const TopkImages images = {c.channels,    c.pixels, channels_last,
                                   tokens.data(), step,     blocks};
        const int64_t panels = ceil_div(c.channels, c.width);
        std::vector<TopkColumns> columns(size_t(blocks * panels));
        std::vector<uint32_t> cursors(size_t(blocks * c.channels), 77);
        Columns memory(c.images * packed.kept, c.channels, panels, blocks);
        CHECK(kernels.grad.transpose_images(reading, images, 0, c.images, c.width, memory.storage(),
                                            columns.data(), cursors.data()));

        const int64_t count = std::min(c.outputs, kernels.grad.tile);
        const int64_t vectors = ceil_div(count, kernels.grad.lanes);
        const int64_t row = vectors * kernels.grad.lanes;
        const int64_t places = blocks * kTopkTokens + c.sets;
        const auto random = numbers(places * row, Kind::normal, 14);
        const int64_t set_size = (c.width + 1) * row;
        Floats rows(places * row), sums(c.sets * set_size);
        std::copy(random.begin(), random.end(), rows.data());
        std::vector<float> out(size_t(count * c.channels * c.sets), std::nanf(""));
        for (int64_t panel = 0; panel < panels; ++panel) {
          std::fill_n(sums.data(), c.sets * set_size, 0.0f);
          for (int64_t set = 0; set < c.sets; ++set) {
            for (int64_t block = 0; block < blocks; ++block) {
              kernels.grad.accumulate(columns[size_t(block * panels + panel)], vectors,
                                      rows.data() + (block * kTopkTokens + set) * row,
                                      sums.data() + set * set_size);
            }
          }
          const int64_t first = panel * c.width;
          kernels.grad.write(sums.data(), set_size, c.sets, std::min(c.width, c.channels - first),
                             count, out.data() + first * c.sets, c.channels * c.sets);
        }
        for (int64_t o = 0; o < count; ++o) {
          for (int64_t channel = 0; channel < c.channels; ++channel) {
            for (int64_t set = 0; set < c.sets; ++set) {
              double sum = 0, size = 0;
              for (int64_t image = 0; image < c.images; ++image) {
                for (int64_t p = 0; p < c.pixels; ++p) {
                  if (tokens[size_t(p)] < 0) continue;
                  const int64_t place = image * step + tokens[size_t(p)] + set;
                  const int64_t at =
                      channels_last ? p * c.channels + channel : channel * c.pixels + p;
                  const double term = double(dense[size_t(image * n + at)]) *
                                      double(random[size_t(place * row + o)]);
                  sum += term;
                  size += std::abs(term);
                }
              }
              const double bound = double(c.images * c.pixels + 1) * 0x1p-24 * size;
              const float got = out[size_t((o * c.channels + channel) * c.sets + set)];
              CHECK(std::abs(got - sum) <= bound);
            }
          }
        }
        if (!bitmap && packed.kept > 1) {
          std::swap(packed.positions[0], packed.positions[1]);
          CHECK(!kernels.grad.transpose_images(packed.reading(), images, 0, c.images, c.width,
                                               memory.storage(), columns.data(), cursors.data()));
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (!available(isa)) continue;
    test_pack(isa);
    test_rows(isa);
    test_unpack(isa);
    test_weight_grad(isa);
    test_conv_grad(isa);
    std::printf("topk: %s agrees\n", name(isa));
  }
}
