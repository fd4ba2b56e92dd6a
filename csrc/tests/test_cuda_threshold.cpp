// The device code of threshold_magnitude and threshold_mask, run by the host shim, against scalar
// definitions.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include <algorithm>

#include "cpu/threshold.h"
#include "cuda/threshold.cuh"
#include "tests/check.h"
#include "tests/memory.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

template <class Key>
struct Weights {
  DType dtype;
  std::vector<std::vector<Key>> xs;
  std::vector<std::vector<uint8_t>> masks;  // none, or one for each

  Key infinite() const { return static_cast<Key>(infinite_key(dtype)); }

  Key key(size_t t, size_t i) const {
    const auto bits = static_cast<Key>(xs[t][i] & static_cast<Key>(~0ull >> 1 >> (64 - kBits - 1)));
    return std::min<Key>(bits, static_cast<Key>(infinite() + 1));
  }
  bool counts(size_t t, size_t i) const {
    return masks.empty() || (masks[t][i / 8] >> (i % 8) & 1);
  }

  static constexpr int kBits = 8 * static_cast<int>(sizeof(Key)) - 1;
};

template <class Key>
struct Answer {
  Key value;
  std::vector<int64_t> ties;
};

template <class Key>
Answer<Key> defined(const Weights<Key>& weights, int64_t k) {
  std::vector<Key> all;
  for (size_t t = 0; t < weights.xs.size(); ++t) {
    for (size_t i = 0; i < weights.xs[t].size(); ++i) {
      if (weights.counts(t, i)) all.push_back(weights.key(t, i));
    }
  }
  std::sort(all.begin(), all.end(), std::greater<Key>());
  const Key key = all[static_cast<size_t>(k - 1)];
  int64_t left = k - std::count_if(all.begin(), all.end(), [&](Key each) { return each > key; });
  Answer<Key> answer{key, {}};
  for (size_t t = 0; t < weights.xs.size(); ++t) {
    int64_t equal = 0;
    for (size_t i = 0; i < weights.xs[t].size(); ++i) {
      equal += weights.counts(t, i) && weights.key(t, i) == key;
    }
    answer.ties.push_back(std::min(equal, left));
    left -= answer.ties.back();
  }
  const Key infinite = weights.infinite();
  if (key > infinite) answer.value = static_cast<Key>(infinite | infinite >> 1);
  return answer;
}

// Kernels one after the other, as the operator launches them: `each` tensors a table, blocks of
// `threads` threads, `room` bytes of shared memory.
template <class Key>
Answer<Key> found(const Weights<Key>& weights, int64_t k, size_t each, unsigned threads,
                  int64_t room) {
  std::vector<Shifted<Key>> xs;
  std::vector<cuda::Tensors> tables;
  for (size_t t = 0; t < weights.xs.size(); ++t) {
    xs.emplace_back(weights.xs[t], t % 2);
    if (t % each == 0) tables.push_back(cuda::Tensors::from(t));
    tables.back().add(xs.back().data(), weights.masks.empty() ? nullptr : weights.masks[t].data(),
                      static_cast<int64_t>(weights.xs[t].size()), cuda::tile_size<Key>(threads));
  }
  const Key infinite = weights.infinite();
  const auto over_tables = [&](size_t bytes, auto kernel, auto... arguments) {
    for (const cuda::Tensors& table : tables) {
      const unsigned blocks = std::min(table.tiles, 3u);
      if (blocks > 0) launch(kernel, {{blocks}, {threads}, bytes}, table, arguments...);
    }
  };
  std::vector<cuda::Found> state(1);
  const auto digits = cuda::digits_of(Weights<Key>::kBits, room);
  for (const cuda::Digit& digit : digits) {
    std::vector<cuda::Count> counts(size_t{1} << digit.width);
    const bool is_first = &digit == digits.data();
    if (is_first) {
      over_tables(counts.size() * sizeof(unsigned), &cuda::threshold_first_kernel<Key>, infinite,
                  digit, counts.data());
    } else {
      over_tables(0, &cuda::threshold_next_kernel<Key>, infinite, digit, state.data(),
                  counts.data());
    }
    launch(&cuda::threshold_choose_kernel, {{1}, {threads}}, counts.data(), digit.width,
           is_first ? k : 0, state.data());
  }
  std::vector<int64_t> ties(weights.xs.size());
  over_tables(0, &cuda::threshold_equal_kernel<Key>, infinite, state.data(),
              reinterpret_cast<cuda::Count*>(ties.data()));
  Key value;
  launch(&cuda::threshold_share_kernel<Key>, {{1}, {32}}, state.data(), infinite,
         static_cast<int>(ties.size()), &value, ties.data());
  return {value, ties};
}

template <class Key>
std::vector<uint8_t> marked(const Weights<Key>& weights, size_t t, Key value, int64_t ties,
                            unsigned threads) {
  Shifted<Key> x(weights.xs[t], 1);
  const auto numel = static_cast<int64_t>(weights.xs[t].size());
  const uint8_t* mask = weights.masks.empty() ? nullptr : weights.masks[t].data();
  const auto tiles = static_cast<unsigned>(ceil_div(numel, cuda::tile_size<Key>(threads)));
  std::vector<int64_t> equal(tiles);
  std::vector<uint8_t> bits(static_cast<size_t>(ceil_div(numel, 8)), 0xa5);
  launch(&cuda::threshold_mark_kernel<Key>, {{tiles}, {threads}}, x.data(), mask, &value,
         weights.infinite(), numel, equal.data(), bits.data());
  launch(&cuda::prefix_kernel<int64_t>, {{1}, {32}}, equal.data(), int64_t{tiles});
  launch(&cuda::threshold_trim_kernel<Key>, {{std::min(tiles, 2u)}, {threads}}, x.data(), mask,
         &value, &ties, equal.data(), weights.infinite(), numel, int64_t{tiles}, bits.data());
  return bits;
}

// The bits of what is above `key` and of the first `ties` that have it.
template <class Key>
std::vector<uint8_t> mask_of(const Weights<Key>& weights, size_t t, Key key, int64_t ties) {
  std::vector<uint8_t> bits((weights.xs[t].size() + 7) / 8);
  for (size_t i = 0; i < weights.xs[t].size(); ++i) {
    if (!weights.counts(t, i)) continue;
    const Key each = weights.key(t, i);
    const bool kept = each > key || (each == key && ties-- > 0);
    bits[i / 8] |= static_cast<uint8_t>(kept << (i % 8));
  }
  return bits;
}

// How numbers are distributed: `any` bits; `narrow`: those that differ in their last bits alone, so
// that the next digits have much to count; `few`: ties everywhere.
enum class Kind { any, narrow, few };

template <class Key>
Weights<Key> draw(DType dtype, Kind kind, Random& random) {
  Weights<Key> weights{dtype, {}, {}};
  const std::vector<Key> few = random_bits<Key>(5, random);
  for (int64_t numel : {0, 5, 1, 600, 64, 3001, 0, 257}) {
    std::vector<Key> x = random_bits<Key>(numel, random);
    for (Key& each : x) {
      if (kind == Kind::narrow) each = static_cast<Key>((each & 0x3f) | infinite_key(dtype) / 2);
      if (kind == Kind::few) each = few[each % few.size()];
      if (random() % 50 == 0) each = static_cast<Key>(infinite_key(dtype) + random() % 3);
    }
    weights.xs.push_back(x);
  }
  return weights;
}

template <class Key>
void test(DType dtype, const char* type, Random& random) {
  for (Kind kind : {Kind::any, Kind::narrow, Kind::few}) {
    Weights<Key> weights = draw<Key>(dtype, kind, random);
    int64_t total = 0;
    for (const auto& x : weights.xs) total += static_cast<int64_t>(x.size());
    if (random() % 2 == 0) {
      total = 0;
      for (size_t t = 0; t < weights.xs.size(); ++t) {
        const auto numel = static_cast<int64_t>(weights.xs[t].size());
        weights.masks.push_back(random_bits<uint8_t>(ceil_div(numel, 8), random));
        for (size_t i = 0; i < weights.xs[t].size(); ++i) total += weights.counts(t, i);
      }
    }
    for (int64_t k : {int64_t{1}, total / 50, total / 2, total}) {
      // Digits as wide as a device has them, and narrow ones.
      const bool wide = k == total / 50;
      const Answer<Key> wanted = defined(weights, k);
      const Answer<Key> got =
          found(weights, k, wide ? 128 : 3, wide ? 128 : 64, wide ? 1 << 17 : 1 << 12);
      CHECK(got.value == wanted.value && got.ties == wanted.ties, "%s, kind %d, %ld of %ld", type,
            static_cast<int>(kind), static_cast<long>(k), static_cast<long>(total));
      for (size_t t : {1, 3, 5}) {
        // As a value may have any NaN's bits and a sign, so may this.
        const auto sign = static_cast<Key>(Key{1} << Weights<Key>::kBits);
        const Key key = std::min<Key>(wanted.value, static_cast<Key>(weights.infinite() + 1));
        for (int64_t ties : {wanted.ties[t], int64_t{0}, int64_t{2}, int64_t{-1}}) {
          const auto bits = marked<Key>(weights, t, wanted.value | sign, ties, wide ? 256 : 32);
          CHECK(same_bytes(bits, mask_of(weights, t, key, ties)), "%s, kind %d, %ld ties", type,
                static_cast<int>(kind), static_cast<long>(ties));
        }
      }
    }
    // More than there are, as masks may have it: any result, and nothing is touched outside.
    const Answer<Key> beyond = found(weights, total + 7, 3, 64, 1 << 12);
    int64_t ties = 0;
    for (int64_t each : beyond.ties) ties += each;
    CHECK(ties <= total, "%s, more than there are: %ld", type, static_cast<long>(ties));
  }
}

void test_digits() {
  for (int bits : {15, 31, 63}) {
    for (int64_t room : {int64_t{4}, int64_t{48} << 10, int64_t{99} << 10, int64_t{227} << 10}) {
      const auto digits = cuda::digits_of(bits, room);
      CHECK((int64_t{4} << digits[0].width) <= room, "%d bits", bits);
      int below = bits;
      for (const cuda::Digit& digit : digits) {
        below -= digit.width;
        CHECK(digit.shift == below, "%d bits, shift %d", bits, digit.shift);
      }
      CHECK(below == 0, "%d bits", bits);
    }
  }
  CHECK(cuda::digits_of(15, 227 << 10).size() == 1 && cuda::digits_of(31, 99 << 10).size() == 2,
        "more digits than have to be");
}

// The last tiles of a tensor whose offsets need more than 32 bits.
void test_huge(Random& random) {
  constexpr int64_t kNumel = (int64_t{1} << 32) + 1003, kFirst = kNumel - 1003;
  constexpr uint32_t kInfinite = 0x7f800000;
  constexpr unsigned kThreads = 256;
  Huge<uint32_t> x(kNumel);
  Huge<uint8_t> bits(ceil_div(kNumel, 8));
  for (int64_t i = kFirst; i < kNumel; ++i) x[i] = random() % 2 << 31 | random() % 3;
  int64_t ones = 0;
  for (int64_t i = kFirst; i < kNumel; ++i) ones += (x[i] & 3) == 1;

  cuda::Tensors table = cuda::Tensors::from(0);
  table.add(x.data(), nullptr, kNumel, cuda::tile_size<uint32_t>(kThreads));
  const cuda::Found found{1, 1};
  cuda::Count equal = 0;
  launch_block(&cuda::threshold_equal_kernel<uint32_t>, {{table.tiles}, {kThreads}},
               {table.tiles - 1}, table, kInfinite, &found, &equal);
  CHECK(equal == static_cast<cuda::Count>(ones), "%ld", static_cast<long>(ones));

  Huge<int64_t> ends(table.tiles);
  const uint32_t value = 1;
  launch_block(&cuda::threshold_mark_kernel<uint32_t>, {{table.tiles}, {kThreads}},
               {table.tiles - 1}, x.data(), nullptr, &value, kInfinite, kNumel, ends.data(),
               bits.data());
  CHECK(ends[table.tiles - 1] == ones, "%ld", static_cast<long>(ones));
  // As many before as there are elements before, and 10 of this tile are kept.
  const int64_t ties = kFirst + 10;
  ends[table.tiles - 2] = kFirst;
  ends[table.tiles - 1] += kFirst;
  launch_block(&cuda::threshold_trim_kernel<uint32_t>, {{table.tiles}, {kThreads}},
               {table.tiles - 1}, x.data(), nullptr, &value, &ties, ends.data(), kInfinite, kNumel,
               int64_t{table.tiles}, bits.data());
  int64_t left = 10;
  for (int64_t i = kFirst; i < kNumel; ++i) {
    const bool kept = (x[i] & 3) == 2 || ((x[i] & 3) == 1 && left-- > 0);
    CHECK((bits[i / 8] >> (i % 8) & 1) == kept, "element %ld", static_cast<long>(i));
  }
}

}  // namespace

int main() {
  Random random(3);
  in_orders([&] {
    test<uint32_t>(DType::f32, "float", random);
    test<uint64_t>(DType::f64, "double", random);
    test<uint16_t>(DType::bf16, "bfloat16", random);
    test<uint16_t>(DType::f16, "half", random);
  });
  test_digits();
  test_huge(random);
  return finish("test_cuda_threshold");
}
