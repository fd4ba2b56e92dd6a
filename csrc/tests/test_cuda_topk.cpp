// The top-k device code, run by the host shim, against the portable CPU kernels, bit for bit.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include <limits>

#include "cpu/topk_read.h"
#include "cuda/topk_read.cuh"
#include "cuda/topk_sample.cuh"
#include "tests/check.h"
#include "tests/memory.h"

namespace {

using namespace memtl;
using namespace memtl::tests;
using cuda::BFloat16;
using cuda::Half;

const TopkPackKernels& kPack = portable::topk_pack;
const TopkReadKernels& kRead = portable::topk_read;

constexpr DType kValues[] = {DType::f32, DType::bf16, DType::f16, DType::i8};

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<BFloat16> = DType::bf16;
template <>
constexpr DType kDType<Half> = DType::f16;

// Calls run.template operator()<T>() for every type of input.
template <class Run>
void for_types(const Run& run) {
  run.template operator()<float>();
  run.template operator()<double>();
  run.template operator()<BFloat16>();
  run.template operator()<Half>();
}

// scaled: about any power of two, the least and the largest too; bits: any pattern, of NaN too
enum class Kind { normal, ties, zeros, special, scaled, bits };
constexpr Kind kKinds[] = {Kind::normal,  Kind::ties,   Kind::zeros,
                           Kind::special, Kind::scaled, Kind::bits};

template <class T>
std::vector<T> numbers(int64_t count, Kind kind, Random& random) {
  if (kind == Kind::bits) return random_bits<T>(count, random);
  const float inf = std::numeric_limits<float>::infinity();
  const float odd[] = {inf, -inf, std::nanf(""), 1e-40f, -1e-40f, 3e38f, 0.0f, -0.0f};
  const int power = random() % 2 ? -149 + int(random() % 24) : -149 + int(random() % 277);
  std::normal_distribution<float> normal;
  std::vector<T> x(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    float each = normal(random);
    if (kind == Kind::ties) each = std::round(each * 2) / 2;
    if (kind == Kind::zeros) each = std::max(0.0f, each - 1);
    if (kind == Kind::special && random() % 20 == 0) each = odd[random() % 8];
    if (kind == Kind::scaled) each = std::ldexp(each, power);
    store_float(kDType<T>, x.data(), i, each);
  }
  return x;
}

// Packed rows, each array of just the size that is asked for, behind a place at 16 bytes.
struct Packed {
  int64_t rows, n, kept;
  DType value;
  bool bitmap;
  Shifted<uint8_t> values, positions;
  std::vector<uint16_t> scale;
  std::vector<int16_t> counts;

  Packed(int64_t rows, int64_t n, int64_t kept, DType value, bool bitmap, size_t shift = 0)
      : rows(rows),
        n(n),
        kept(kept),
        value(value),
        bitmap(bitmap),
        values(std::vector<uint8_t>(size_t(rows * kept * size_of(value)), 0xa5),
               shift * size_t(size_of(value))),
        positions(std::vector<uint8_t>(size_t(rows * (bitmap ? ceil_div(n, 8) : kept)), 0xa5),
                  shift),
        scale(size_t(value == DType::i8 ? rows * ceil_div(n, kBlock) : 0)),
        counts(size_t(rows * ceil_div(n, kBlock))) {}

  TopkOutput output(bool counted) {
    return {value, values.data(), positions.data(), scale.data(), counted ? counts.data() : nullptr,
            kept,  bitmap};
  }

  bool same(Packed& other) {
    return std::equal(values.data(), values.data() + rows * kept * size_of(value),
                      other.values.data()) &&
           std::equal(positions.data(), positions.data() + rows * (bitmap ? ceil_div(n, 8) : kept),
                      other.positions.data()) &&
           scale == other.scale && counts == other.counts;
  }

  cuda::PackedRows reading(int64_t k, int64_t k_tail, bool counted) {
    return {value,
            values.data(),
            positions.data(),
            scale.data(),
            counted ? counts.data() : nullptr,
            nullptr,
            rows,
            n,
            kept,
            static_cast<int>(k),
            static_cast<int>(k_tail),
            bitmap};
  }
};

bool aligned_rows(const void* x, int64_t rows, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && (rows == 1 || row_bytes % 16 == 0);
}

// ------------------------------------------------------------------------------------------ pack

template <class T>
void test_pack(int64_t n, Kind kind, DType value, int64_t k, bool bitmap, size_t shift, Dim3 grid,
               Random& random) {
  const int64_t rows = random() % 4 == 0 ? 1 : n < 256 ? 11 : 3;
  const int64_t k_tail = std::min(n % kBlock, (k + 1) / 2);
  const int64_t kept = n / kBlock * k + (n % kBlock ? k_tail : 0);
  Shifted<T> x(numbers<T>(rows * n, kind, random), shift);
  Packed got(rows, n, kept, value, bitmap, shift), wanted(rows, n, kept, value, bitmap);
  const bool aligned = aligned_rows(x.data(), rows, n * int64_t(sizeof(T)));
  // Rows of whole blocks are one row, without a tail.
  const bool whole = n % kBlock == 0 && random() % 2;
  launch(&cuda::topk_pack_kernel<T>, {grid, {cuda::kTopkThreads}}, x.data(), whole ? 1 : rows,
         whole ? rows * n : n, k, whole ? -1 : k_tail, aligned, 1 + int(random() % 3),
         got.output(false));
  kPack.pack(kDType<T>, x.data(), n, k, k_tail, wanted.output(false), 0, rows);
  CHECK(got.same(wanted), "dtype %d rows %d n %d kind %d value %d k %d bitmap %d shift %d whole %d",
        int(kDType<T>), int(rows), int(n), int(kind), int(value), int(k), bitmap, int(shift),
        whole);
}

// Both ways to compare keys with a threshold.
void test_keys(Random& random) {
  for (int i = 0; i < 100000; ++i) {
    const auto key = static_cast<uint32_t>(random()) >> (1 + random() % 31);
    const uint32_t of_key[] = {0x80000000, 1, key, key + 1, static_cast<uint32_t>(random()) >> 1};
    const uint32_t least = std::max(of_key[random() % 5], 1u), reached = key >= least;
    CHECK(cuda::reached_of_word(key, least) == reached, "%x %x", key, least);
    CHECK(cuda::reached_at_once(key, least) == reached, "%x %x", key, least);

    const auto other = static_cast<uint32_t>(random()) >> (17 + random() % 15);
    const uint32_t low = key & 0x7fff, keys = low | other << 16;
    const uint32_t of_low[] = {0x8000, 1, low, low + 1, static_cast<uint32_t>(random()) >> 17};
    const uint32_t half = std::max(of_low[random() % 5], 1u);
    const uint32_t both = (low >= half) | static_cast<uint32_t>(other >= half) << 16;
    CHECK(cuda::reached_of_halves(keys, half) == both, "%x %x", keys, half);
    CHECK(cuda::reached_at_once_of_halves(keys, half) == both, "%x %x", keys, half);
  }
}

// Codes are those of a division, whatever the scale.
void test_division(Random& random) {
  const float rounder = 12582912.0f, largest = std::numeric_limits<float>::max();
  for (int i = 0; i < 1000000; ++i) {
    // From the least scale there is to that of the largest number.
    const auto high = static_cast<uint32_t>(0x80 + random() % (0x7c04 - 0x80));
    const float scale = __uint_as_float((i % 4 == 0 ? high % 0x1000 + 0x80 : high) << 16);
    // Half a level, or any part of one.
    const float level = static_cast<float>(random() % 253) / 2;
    const float part = i % 2 ? static_cast<float>(random()) * 0x1p-32f : 0;
    const float x = std::min(std::min(level + part, 126.0f) * scale, largest);
    const float got = cuda::Divisor::of(scale).divide(x);
    CHECK(float_bits(got + rounder) == float_bits(x / scale + rounder), "%a / %a: %a", x, scale,
          got);
  }
}

// One of `among` cases is tested, drawn anew in every order.
bool drawn(unsigned among, Random& random) { return random() % among == 0; }

size_t shift_drawn(Random& random) { return drawn(3, random) ? random() % 7 : 0; }

void test_packs(Random& random) {
  for (const int64_t n : {1, 7, 255, 256, 257, 600, 1032, 2048}) {
    for (const Kind kind : kKinds) {
      for (const int64_t k : {0, 1, 8, 26, 128, 255, 256}) {
        for_types([&]<class T>() {
          if (!drawn(6, random)) return;
          test_pack<T>(n, kind, kValues[random() % 4], k, random() % 2, shift_drawn(random),
                       {unsigned(1 + random() % 2)}, random);
        });
      }
    }
  }
}

// The last block of threads of a tensor that has more than 2^31 elements.
void test_large_pack(Random& random) {
  const int64_t n = 264, rows = (int64_t{1} << 31) / 258 + 100, k = 250, k_tail = 8,
                kept = k + k_tail;
  const int64_t blocks = 2 * rows, run = 2;
  const int64_t each = cuda::kTopkWarps * cuda::kTogether<BFloat16> * run;
  Huge<BFloat16> x(rows * n);
  Huge<uint8_t> values(rows * kept), positions(rows * kept);
  Huge<uint16_t> scale(blocks);
  const int64_t first = rows - 40;
  const auto numbers_there = numbers<BFloat16>(40 * n, Kind::normal, random);
  std::copy(numbers_there.begin(), numbers_there.end(), x.data() + first * n);
  const TopkOutput out = {DType::i8, values.data(), positions.data(), scale.data(), nullptr,
                          kept,      false};
  const auto grid = static_cast<unsigned>(ceil_div(blocks, each));
  launch_block(&cuda::topk_pack_kernel<BFloat16>, {{grid}, {cuda::kTopkThreads}}, {grid - 1},
               x.data(), rows, n, k, k_tail, true, run, out);
  Packed wanted(40, n, kept, DType::i8, false);
  kPack.pack(DType::bf16, x.data() + first * n, n, k, k_tail, wanted.output(false), 0, 40);
  const int64_t done = (blocks - int64_t{grid - 1} * each) / 2, start = (40 - done) * kept;
  CHECK(done > 0 && std::equal(wanted.values.data() + start, wanted.values.data() + 40 * kept,
                               values.data() + first * kept + start),
        "values of the last %d rows", int(done));
  CHECK(std::equal(wanted.positions.data() + start, wanted.positions.data() + 40 * kept,
                   positions.data() + first * kept + start),
        "positions of the last %d rows", int(done));
}

// ---------------------------------------------------------------------------------------- sample

// The launches of topk_pack_sample.
template <class T>
void pack_sample(const T* x, cuda::SampleRows rows, int64_t k, bool aligned,
                 const TopkOutput& out) {
  const int64_t blocks = ceil_div(rows.n, kBlock);
  const int64_t chunks = ceil_div(blocks, cuda::kChunk);
  std::vector<unsigned long long> histogram(
      static_cast<size_t>(rows.parts > 1 ? rows.count * cuda::kDigits : 0));
  std::vector<unsigned> done(static_cast<size_t>(rows.count));
  std::vector<cuda::Threshold> thresholds(done.size());
  std::vector<uint32_t> of_blocks(static_cast<size_t>(rows.count * blocks), 77);
  std::vector<int64_t> above(static_cast<size_t>(rows.count * chunks), 77), equal(above);
  const cuda::SampleCounts counts = {of_blocks.data(), above.data(), equal.data()};
  const auto grid =
      static_cast<unsigned>(rows.count * rows.parts + 1) / 2;  // every block has two tasks
  const Dim3 threads = {cuda::kTopkThreads};
  bool first = true;
  for (const cuda::Pass pass : cuda::Passes<T>::kPasses) {
    launch(&cuda::sample_digit_kernel<T>, {{grid}, threads}, x, rows, aligned, pass, first,
           std::max<int64_t>(k, 1), histogram.data(), done.data(), thresholds.data());
    first = false;
  }
  launch(&cuda::sample_count_kernel<T>, {{grid}, threads}, x, rows, aligned, thresholds.data(),
         counts, done.data());
  launch(&cuda::sample_pack_kernel<T>, {{3}, threads}, x, rows, k, aligned, thresholds.data(),
         counts, out);
  CHECK(std::all_of(done.begin(), done.end(), [](unsigned count) { return count == 0; }) &&
            std::all_of(histogram.begin(), histogram.end(), [](auto count) { return count == 0; }),
        "memory that is not left as it was");
}

template <class T>
void plain_pack_sample(const T* x, int64_t rows, int64_t n, int64_t k, const TopkOutput& out) {
  std::vector<uint32_t> keys(static_cast<size_t>(n));
  for (int64_t row = 0; row < rows; ++row) {
    kPack.keys(kDType<T>, x + row * n, n, keys.data());
    int64_t above = 0;
    uint32_t threshold = 0x7fffffff;
    if (k > 0) threshold = kPack.threshold(keys.data(), n, k, 0, 0x7fffffff, &above);
    kPack.pack_above(kDType<T>, x, n, row, 0, ceil_div(n, kBlock), threshold, k - above, 0, out);
  }
}

template <class T>
void test_sample(int64_t n, Kind kind, DType value, int64_t k, bool bitmap, size_t shift,
                 int64_t parts, Random& random) {
  const int64_t rows = 1 + random() % 2;
  Shifted<T> x(numbers<T>(rows * n, kind, random), shift);
  Packed got(rows, n, k, value, bitmap, shift), wanted(rows, n, k, value, bitmap);
  const bool aligned = aligned_rows(x.data(), rows, n * int64_t(sizeof(T)));
  pack_sample<T>(x.data(), {rows, n, parts}, k, aligned, got.output(true));
  plain_pack_sample<T>(x.data(), rows, n, k, wanted.output(true));
  CHECK(got.same(wanted), "dtype %d n %d kind %d value %d k %d bitmap %d shift %d parts %d",
        int(kDType<T>), int(n), int(kind), int(value), int(k), bitmap, int(shift), int(parts));
}

void test_samples(Random& random) {
  for (const int64_t n : {1, 33, 256, 600, 9999, 10240}) {
    for (const Kind kind : kKinds) {
      for (const int64_t k : {int64_t{0}, (n + 9) / 10, n}) {
        for_types([&]<class T>() {
          if (!drawn(n < 1000 ? 3 : 6, random)) return;
          const int64_t parts = n < 1000 ? 1 : 1 + random() % 3;
          test_sample<T>(n, kind, kValues[random() % 4], k, random() % 2, shift_drawn(random),
                         parts, random);
        });
      }
    }
  }
}

// The last blocks of a row of more than 2^31 elements, whose entries have places beyond 2^31 too.
void test_large_sample(Random& random) {
  const int64_t n = (int64_t{1} << 31) + 300, k = (int64_t{1} << 31) + 60;
  const int64_t blocks = ceil_div(n, kBlock), chunks = ceil_div(blocks, cuda::kChunk);
  const int64_t first = (blocks - 1) / cuda::kTogether<BFloat16> * cuda::kTogether<BFloat16>,
                size = n - first * kBlock;
  const auto x_there = numbers<BFloat16>(size, Kind::ties, random);
  Huge<BFloat16> x(n);
  std::copy(x_there.begin(), x_there.end(), x.data() + first * kBlock);
  Packed wanted(1, size, 60, DType::bf16, true);
  plain_pack_sample<BFloat16>(x_there.data(), 1, size, 60, wanted.output(true));

  std::vector<uint32_t> keys(x_there.size());
  kPack.keys(DType::f32, numbers<float>(1, Kind::normal, random).data(), 0, keys.data());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = x_there[i].bits & 0x7fff;
  std::vector<uint32_t> sorted = keys;
  std::sort(sorted.rbegin(), sorted.rend());
  const uint32_t key = sorted[59];
  int64_t above = 0;
  for (const uint32_t each : keys) above += each > key;
  // Everything before is above the threshold.
  Huge<uint32_t> of_blocks(blocks);
  Huge<int64_t> above_before(chunks), equal_before(chunks);
  for (int64_t i = first / cuda::kChunk * cuda::kChunk; i < first; ++i) of_blocks[i] = 256;
  above_before[chunks - 1] = k - 60 - (first - first / cuda::kChunk * cuda::kChunk) * kBlock;
  for (int64_t i = 0; i < size; ++i) {
    of_blocks[first + i / kBlock] += (keys[size_t(i)] > key) + 0x10000u * (keys[size_t(i)] == key);
  }
  const cuda::Threshold threshold = {key, 60 - above};
  Huge<BFloat16> values(k);
  Huge<uint8_t> positions(ceil_div(n, 8));
  Huge<int16_t> counts(blocks);
  const TopkOutput out = {DType::bf16, values.data(), positions.data(), nullptr, counts.data(),
                          k,           true};
  const auto grid = static_cast<unsigned>(
      ceil_div(ceil_div(blocks, cuda::kTogether<BFloat16>), cuda::kTopkWarps));
  // The other warps of the last block of threads find nothing above the threshold.
  launch_block(&cuda::sample_pack_kernel<BFloat16>, {{grid}, {cuda::kTopkThreads}}, {grid - 1},
               x.data(), cuda::SampleRows{1, n, 1}, k, true, &threshold,
               cuda::SampleCounts{of_blocks.data(), above_before.data(), equal_before.data()}, out);
  CHECK(std::memcmp(values.data() + k - 60, wanted.values.data(), 120) == 0, "values");
  CHECK(std::equal(wanted.positions.data(), wanted.positions.data() + ceil_div(size, 8),
                   positions.data() + first * kBlock / 8),
        "positions");
  CHECK(std::equal(wanted.counts.begin(), wanted.counts.end(), counts.data() + first), "counts");
}

// ---------------------------------------------------------------------------------------- unpack

// The launches of topk_unpack.
template <class Out>
void unpack(cuda::PackedRows rows, bool aligned, Out* out) {
  std::vector<int64_t> before(
      static_cast<size_t>(rows.rows * ceil_div(rows.blocks(), cuda::kChunk)), 77);
  if (rows.counts) {
    launch(&cuda::count_before_kernel, {{2}, {cuda::kTopkThreads}}, rows, before.data());
    rows.before = before.data();
  }
  launch(&cuda::topk_unpack_kernel<Out>, {{2}, {cuda::kTopkThreads}}, rows, aligned, out);
}

template <class Out>
void test_unpack(int64_t n, Kind kind, DType value, int64_t k, bool bitmap, bool counted,
                 size_t shift, Random& random) {
  const int64_t rows = 3, blocks = ceil_div(n, kBlock), k_tail = std::min(n % kBlock, k);
  const int64_t kept = counted ? n * k / kBlock : n / kBlock * k + (n % kBlock ? k_tail : 0);
  const std::vector<float> x = numbers<float>(rows * n, kind, random);
  Packed packed(rows, n, kept, value, bitmap, shift);
  if (counted) {
    plain_pack_sample<float>(x.data(), rows, n, kept, packed.output(true));
  } else {
    kPack.pack(DType::f32, x.data(), n, k, k_tail, packed.output(true), 0, rows);
  }
  std::vector<int64_t> starts;
  for (int64_t row = 0; row < rows; ++row) {
    starts.push_back(0);
    for (int64_t i = 0; i < blocks; ++i) {
      starts.push_back(starts.back() + packed.counts[size_t(row * blocks + i)]);
    }
  }
  const TopkPacked plain = {value,
                            packed.values.data(),
                            packed.positions.data(),
                            packed.scale.data(),
                            starts.data(),
                            rows,
                            n,
                            kept,
                            k,
                            bitmap};
  const std::vector<Out> noise = random_bits<Out>(rows * n, random);
  std::vector<Out> wanted = noise;
  CHECK(kRead.unpack(plain, 0, rows * n, kDType<Out>, wanted.data()), "ascending");
  Shifted<Out> got(noise, shift);
  unpack(packed.reading(k, k_tail, counted),
         aligned_rows(got.data(), rows, n * int64_t(sizeof(Out))), got.data());
  CHECK(std::memcmp(got.data(), wanted.data(), wanted.size() * sizeof(Out)) == 0,
        "dtype %d n %d kind %d value %d k %d bitmap %d counts %d shift %d", int(kDType<Out>),
        int(n), int(kind), int(value), int(k), bitmap, counted, int(shift));
}

void test_unpacks(Random& random) {
  for (const int64_t n : {1, 7, 255, 256, 600, 1032, 10240}) {
    for (const DType value : kValues) {
      for (const int64_t k : {0, 26, 256}) {
        for_types([&]<class Out>() {
          if (!drawn(3, random)) return;
          test_unpack<Out>(n, random() % 3 ? Kind::special : Kind::ties, value, k, random() % 2,
                           random() % 2, shift_drawn(random), random);
        });
      }
    }
  }
}

// Whatever packed rows say, nothing outside of them is read or written.
template <class Out>
void test_malformed(DType value, bool bitmap, bool counted, Random& random) {
  if (kSeesRaces && !bitmap) return;  // of positions that are there twice either may win
  const int64_t rows = 3, n = 8504, k = 30, k_tail = 9, kept = n / kBlock * k + k_tail;
  Packed packed(rows, n, kept, value, bitmap);
  for (int64_t i = 0; i < rows * kept; ++i) {
    if (value == DType::i8) {
      packed.values.data()[i] = 1;
    } else {
      store_float(value, packed.values.data(), i, 1);
    }
  }
  const auto noise = random_bits<uint8_t>(rows * (bitmap ? ceil_div(n, 8) : kept), random);
  std::copy(noise.begin(), noise.end(), packed.positions.data());
  for (uint16_t& each : packed.scale) each = 0x3f80;
  for (int16_t& each : packed.counts) each = static_cast<int16_t>(random());
  std::vector<Out> out(static_cast<size_t>(rows * n));
  unpack(packed.reading(k, k_tail, counted), true, out.data());
  int64_t ones = 0, zeros = 0;
  for (const Out each : out) {
    ones += cuda::to_math(each) == 1;
    zeros += cuda::to_math(each) == 0;
  }
  CHECK(ones > 0 && ones <= rows * kept && zeros + ones == rows * n,
        "value %d bitmap %d counts %d: %d ones", int(value), bitmap, counted, int(ones));
}

void test_large_unpack(Random& random) {
  if (kSeesRaces) return;  // all positions of rows but the last are zero
  const int64_t n = 264, rows = (int64_t{1} << 31) / 258 + 100, k = 250, k_tail = 8,
                kept = k + k_tail;
  Huge<BFloat16> values(rows * kept), out(rows * n);
  Huge<uint8_t> positions(rows * kept);
  const auto x = numbers<float>(n, Kind::normal, random);
  Packed last(1, n, kept, DType::bf16, false);
  kPack.pack(DType::f32, x.data(), n, k, k_tail, last.output(false), 0, 1);
  std::memcpy(values.data() + (rows - 1) * kept, last.values.data(), size_t(kept) * 2);
  std::memcpy(positions.data() + (rows - 1) * kept, last.positions.data(), size_t(kept));
  cuda::PackedRows packed = last.reading(k, k_tail, false);
  packed.values = values.data();
  packed.positions = positions.data();
  packed.rows = rows;
  const auto grid = static_cast<unsigned>(ceil_div(rows, cuda::kTopkWarps));
  launch_block(&cuda::topk_unpack_kernel<BFloat16>, {{grid}, {cuda::kTopkThreads}}, {grid - 1},
               packed, true, out.data());
  std::vector<BFloat16> wanted(static_cast<size_t>(n));
  unpack(last.reading(k, k_tail, false), true, wanted.data());
  CHECK(std::memcmp(out.data() + (rows - 1) * n, wanted.data(), size_t(n) * 2) == 0, "last row");
}

}  // namespace

int main() {
  Random random(1);
  test_keys(random);
  test_division(random);
  in_orders([&] {
    test_packs(random);
    test_samples(random);
    test_unpacks(random);
  });
  for (const DType value : kValues) {
    for (const bool bitmap : {false, true}) {
      for (const bool counted : {false, true}) {
        test_malformed<float>(value, bitmap, counted, random);
        test_malformed<Half>(value, bitmap, counted, random);
      }
    }
  }
  test_large_pack(random);
  test_large_sample(random);
  test_large_unpack(random);
  return finish("test_cuda_topk");
}
