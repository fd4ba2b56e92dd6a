// The device code of bits_select and bits_expand, and the sums over blocks, run by the host shim,
// against scalar definitions.
#include "tests/host_shim.h"
// The shim stands before the device code.
#include "cuda/select.cuh"
#include "tests/check.h"
#include "tests/memory.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

void test_prefix(Random& random) {
  for (int64_t size : {1, 7, 8, 256, 1000, 1025}) {
    std::vector<int64_t> counts(static_cast<size_t>(size)), wanted(counts.size());
    int64_t sum = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      counts[i] = static_cast<int64_t>(random()) << (random() % 16);  // sums exceed 32 bits
      wanted[i] = sum += counts[i];
    }
    for (unsigned threads : {32u, 128u}) {
      std::vector<int64_t> ends = counts;
      launch(&cuda::prefix_kernel<int64_t>, {{1}, {threads}}, ends.data(), size);
      CHECK(ends == wanted, "%ld counts, %u threads", static_cast<long>(size), threads);
    }
  }
}

// What the operators do; count: how many values are asked for, or given.
template <class T>
struct Tensors {
  std::vector<T> x;
  std::vector<uint8_t> bits;
  int64_t numel() const { return static_cast<int64_t>(x.size()); }
  bool is_set(size_t i) const { return bits[i / 8] >> (i % 8) & 1; }

  unsigned tiles() const {
    return static_cast<unsigned>(ceil_div(numel(), cuda::tile_size<T>(cuda::kTileThreads)));
  }

  std::vector<int64_t> ends(size_t shift) const {
    std::vector<int64_t> ends(tiles());
    const auto count = static_cast<int64_t>(ends.size());
    launch(&cuda::bits_count_kernel<T>, {{(tiles() + 1) / 2}, {64}}, Shifted(bits, shift).data(),
           numel(), count, ends.data());
    launch(&cuda::prefix_kernel<int64_t>, {{1}, {32}}, ends.data(), count);
    return ends;
  }

  std::vector<T> select(int64_t count, size_t shift) const {
    std::vector<T> values(static_cast<size_t>(count), T{42});
    launch(&cuda::bits_select_kernel<T>, {{tiles()}, {cuda::kTileThreads}},
           Shifted(x, shift).data(), Shifted(bits, shift).data(), ends(shift).data(), numel(),
           count, values.data());
    return values;
  }

  std::vector<T> expand(const std::vector<T>& values, size_t shift) const {
    std::vector<T> out(x.size(), T{42});
    launch(&cuda::bits_expand_kernel<T>, {{tiles()}, {cuda::kTileThreads}},
           Shifted(values, shift).data(), Shifted(bits, shift).data(), ends(shift).data(), numel(),
           static_cast<int64_t>(values.size()), out.data());
    return out;
  }
};

template <class T>
void test(const char* type, int64_t numel, Random& random) {
  Tensors<T> given{random_bits<T>(numel, random), random_bits<uint8_t>(ceil_div(numel, 8), random)};
  // Few set, about half, and all.
  const auto density = random() % 3;
  for (uint8_t& each : given.bits) {
    if (density == 0) each &= static_cast<uint8_t>(random() & random());
    if (density == 2) each = 0xff;
  }
  std::vector<T> selected, dense(given.x.size());
  for (size_t i = 0; i < given.x.size(); ++i) {
    if (!given.is_set(i)) continue;
    selected.push_back(given.x[i]);
    dense[i] = given.x[i];
  }
  const auto set = static_cast<int64_t>(selected.size());
  const size_t shift = numel % 2 == 1 ? 1 : 0;
  CHECK(same_bytes(given.select(set, shift), selected), "%s, %ld elements", type,
        static_cast<long>(numel));
  CHECK(same_bytes(given.expand(selected, shift), dense), "%s, %ld elements", type,
        static_cast<long>(numel));

  // More values than bits: the rest is left alone. Fewer: as if the last bits were not set.
  std::vector<T> more = selected;
  more.resize(more.size() + 3, T{42});
  CHECK(same_bytes(given.select(set + 3, shift), more), "%s, %ld elements", type,
        static_cast<long>(numel));
  CHECK(same_bytes(given.expand(more, shift), dense), "%s, %ld elements", type,
        static_cast<long>(numel));
  for (size_t i = given.x.size(), left = selected.size() / 3; left > 0; --left) {
    do --i;
    while (!given.is_set(i));
    dense[i] = T{};
    selected.pop_back();
  }
  CHECK(same_bytes(given.select(static_cast<int64_t>(selected.size()), shift), selected),
        "%s, %ld elements", type, static_cast<long>(numel));
  CHECK(same_bytes(given.expand(selected, shift), dense), "%s, %ld elements", type,
        static_cast<long>(numel));
}

// The last block of a tensor whose offsets need more than 32 bits, of which half is selected.
void test_huge(Random& random) {
  constexpr int64_t kNumel = (int64_t{1} << 33) + 1003, kFirst = kNumel - 1003;
  constexpr auto kTiles = static_cast<unsigned>(kNumel / cuda::tile_size<uint16_t>(256) + 1);
  Huge<uint16_t> x(kNumel), values(kNumel), out(kNumel);
  Huge<uint8_t> bits(ceil_div(kNumel, 8));
  Huge<int64_t> ends(kTiles);
  int64_t end = kFirst / 2;
  ends[kTiles - 2] = end;
  for (int64_t i = kFirst; i < kNumel; ++i) {
    x[i] = static_cast<uint16_t>(random() | 1);
    const bool set = random() % 2 == 0;
    bits[i / 8] |= static_cast<uint8_t>(set << (i % 8));
    end += set;
  }
  launch_block(&cuda::bits_count_kernel<uint16_t>, {{kTiles}, {32}}, {kTiles - 1}, bits.data(),
               kNumel, int64_t{kTiles}, ends.data());
  CHECK(ends[kTiles - 1] == end - kFirst / 2, "%ld", static_cast<long>(ends[kTiles - 1]));
  ends[kTiles - 1] = end;
  launch_block(&cuda::bits_select_kernel<uint16_t>, {{kTiles}, {256}}, {kTiles - 1}, x.data(),
               bits.data(), ends.data(), kNumel, end, values.data());
  launch_block(&cuda::bits_expand_kernel<uint16_t>, {{kTiles}, {256}}, {kTiles - 1}, values.data(),
               bits.data(), ends.data(), kNumel, end, out.data());
  for (int64_t i = kFirst; i < kNumel; ++i) {
    CHECK(out[i] == (bits[i / 8] >> (i % 8) & 1 ? x[i] : 0), "element %ld", static_cast<long>(i));
  }
}

}  // namespace

int main() {
  Random random(2);
  in_orders([&] {
    test_prefix(random);
    for (int64_t numel : {1, 8, 65, 1000, 4097, 17000}) {
      test<uint16_t>("16 bits", numel, random);
      test<uint32_t>("32 bits", numel, random);
      test<uint64_t>("64 bits", numel / 4 + 1, random);
    }
  });
  test_huge(random);
  return finish("test_cuda_select");
}
