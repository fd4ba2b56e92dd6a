// The kernels of bits and of quant, fused ones too: every instruction set this machine runs against
// the portable ones, byte for byte (query_attention's up to rounding), in buffers of exactly the
// size they may touch (a sanitiser sees one byte beyond).
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "common/isa.h"
#include "common/layout.h"
#include "cpu/bits.h"
#include "cpu/quant.h"
#include "cpu/quant_channel_norm.h"
#include "cpu/quant_fused.h"
#include "cpu/quant_norm.h"
#include "cpu/query_attention.h"
#include "tests/check.h"

namespace {

using namespace memtl;
using namespace memtl::tests;

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* const kTypeNames[] = {"float", "double", "bfloat16", "half"};
constexpr double kScales[] = {1.0, 1.0 / 0.9, -0.3};

enum class Kind { normal, constant, zeros, tiny, huge, wide, broken };
constexpr Kind kKinds[] = {Kind::normal, Kind::constant, Kind::zeros, Kind::tiny,
                           Kind::huge,   Kind::wide,     Kind::broken};

double element(Kind kind, int64_t i, Random& random) {
  const double x = std::normal_distribution<double>()(random);
  switch (kind) {
    case Kind::constant:
      return 0.7;
    case Kind::zeros:
      return i % 2 == 0 ? 0.0 : -0.0;
    case Kind::tiny:
      return x * 1e-41;
    case Kind::huge:
      return x * 1e38;
    case Kind::wide:
      return x * std::pow(10.0, static_cast<double>(i % 60) - 35);
    case Kind::broken:
      if (i % 67 == 5) return std::numeric_limits<double>::quiet_NaN();
      if (i % 91 == 7) return i % 2 == 0 ? INFINITY : -INFINITY;
      return x;
    default:
      return x;
  }
}

// numel elements of a dtype, as bytes.
std::vector<uint8_t> data(DType dtype, Kind kind, int64_t numel, Random& random) {
  std::vector<uint8_t> bytes(static_cast<size_t>(numel * size_of(dtype)));
  for (int64_t i = 0; i < numel; ++i) {
    double x = element(kind, i, random);
    // The float of a double beyond its range is not C++'s to say.
    const double top = std::numeric_limits<float>::max();
    if (std::isfinite(x)) x = std::fmin(std::fmax(x, -top), top);
    if (dtype == DType::f64) {
      std::memcpy(bytes.data() + 8 * i, &x, sizeof x);
    } else {
      store_float(dtype, bytes.data(), i, static_cast<float>(x));
    }
  }
  return bytes;
}

std::vector<uint8_t> buffer(int64_t bytes) {
  return std::vector<uint8_t>(static_cast<size_t>(bytes), 0xa5);
}

// Calls work twice, on the two halves of [0, count): a kernel is given any part of the whole.
template <class F>
void in_parts(int64_t count, F work) {
  work(0, count / 2);
  work(count / 2, count);
}

struct Packed {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> params;
};

Packed pack(const QuantKernels& kernels, DType dtype, const std::vector<uint8_t>& x, int64_t numel,
            int bits) {
  const int64_t groups = ceil_div(numel, kGroup);
  Packed packed{buffer(groups * 8 * bits), std::vector<uint16_t>(static_cast<size_t>(2 * groups))};
  in_parts(groups, [&](int64_t first, int64_t last) {
    kernels.pack(dtype, x.data(), numel, bits, 12345, packed.codes.data(), packed.params.data(),
                 first, last);
  });
  return packed;
}

std::vector<uint8_t> unpack(const QuantKernels& kernels, DType dtype, const Packed& packed,
                            int64_t numel, int bits) {
  std::vector<uint8_t> out = buffer(numel * size_of(dtype));
  in_parts(ceil_div(numel, kGroup), [&](int64_t first, int64_t last) {
    kernels.unpack(dtype, packed.codes.data(), packed.params.data(), bits, out.data(), numel, first,
                   last);
  });
  return out;
}

constexpr QuantRange range_for(int bits) {
  return {-0.17f, 1.13f, static_cast<float>(1.3 / ((1 << bits) - 2))};
}

std::vector<uint8_t> pack_range(const QuantKernels& kernels, DType dtype,
                                const std::vector<uint8_t>& x, int64_t numel, int bits) {
  const int64_t groups = ceil_div(numel, kGroup);
  std::vector<uint8_t> codes = buffer(groups * 8 * bits);
  in_parts(groups, [&](int64_t first, int64_t last) {
    kernels.pack_range(dtype, x.data(), numel, bits, range_for(bits), 12345, codes.data(), first,
                       last);
  });
  return codes;
}

std::vector<uint8_t> unpack_range(const QuantKernels& kernels, DType dtype,
                                  const std::vector<uint8_t>& codes, int64_t numel, int bits) {
  std::vector<uint8_t> out = buffer(numel * size_of(dtype));
  in_parts(ceil_div(numel, kGroup), [&](int64_t first, int64_t last) {
    kernels.unpack_range(dtype, codes.data(), bits, range_for(bits), out.data(), numel, first,
                         last);
  });
  return out;
}

// |x - unpack(pack(x))| is below one step, wherever the group is finite.
void test_error(const std::vector<uint8_t>& x, const Packed& packed, int64_t numel, int bits) {
  const std::vector<uint8_t> decoded = unpack(portable::quant, DType::f32, packed, numel, bits);
  for (int64_t i = 0; i < numel; ++i) {
    const double scale = bfloat16_to_float(packed.params[static_cast<size_t>(i / kGroup * 2)]);
    const double value = load_float(DType::f32, x.data(), i);
    const double error = std::fabs(value - load_float(DType::f32, decoded.data(), i));
    if (std::isnan(scale)) continue;
    // Beyond the step, float's own rounding of offset + code * scale.
    CHECK(error <= scale * (1 + 1e-5) + std::fabs(value) * 1e-6,
          "bits %d, element %ld: %g off by %g, step %g", bits, static_cast<long>(i), value, error,
          scale);
  }
}

void test_quant(const QuantKernels& kernels, const char* isa, Random& random) {
  for (Kind kind : kKinds) {
    for (int64_t numel : kSizes) {
      for (int type = 0; type < 4; ++type) {
        const std::vector<uint8_t> x = data(kTypes[type], kind, numel, random);
        for (int bits : {8, 4, 3, 2}) {
          const Packed wanted = pack(portable::quant, kTypes[type], x, numel, bits);
          const Packed packed = pack(kernels, kTypes[type], x, numel, bits);
          const std::vector<uint8_t> codes =
              pack_range(portable::quant, kTypes[type], x, numel, bits);
          const auto fails = [&](const char* what) {
            return std::string(isa) + ": " + what + ", " + kTypeNames[type] + ", kind " +
                   std::to_string(static_cast<int>(kind)) + ", " + std::to_string(numel) +
                   " elements, bits " + std::to_string(bits);
          };
          CHECK(same_bytes(packed.codes, wanted.codes), "%s", fails("codes").c_str());
          CHECK(same_bytes(packed.params, wanted.params), "%s", fails("params").c_str());
          CHECK(same_bytes(unpack(kernels, kTypes[type], wanted, numel, bits),
                           unpack(portable::quant, kTypes[type], wanted, numel, bits)),
                "%s", fails("unpack").c_str());
          CHECK(same_bytes(pack_range(kernels, kTypes[type], x, numel, bits), codes), "%s",
                fails("pack_range").c_str());
          CHECK(same_bytes(unpack_range(kernels, kTypes[type], codes, numel, bits),
                           unpack_range(portable::quant, kTypes[type], codes, numel, bits)),
                "%s", fails("unpack_range").c_str());
          if (kTypes[type] == DType::f32) test_error(x, packed, numel, bits);
        }
      }
    }
  }
}

// Packed as rows of channels, beside what packs the same numbers, normalised here.
void test_normalized(const QuantKernels& kernels, const char* isa, Random& random) {
  constexpr std::pair<int64_t, int64_t> kPlaces[] = {{1, 1}, {7, 1}, {100, 1}, {5, 9}, {3, 200}};
  for (const auto& [channels, inner] : kPlaces) {
    std::vector<float> mean(static_cast<size_t>(channels + kGroup)), rstd(mean.size());
    for (size_t i = 0; i < mean.size(); ++i) {
      rstd[i] = 0.5f + 0.1f * static_cast<float>(i % static_cast<size_t>(channels));
      mean[i] = -rstd[i] * rstd[i];
    }
    const Channels all{rstd.data(), mean.data(), channels, inner};
    for (int64_t times : {1, 2, 3}) {
      const int64_t numel = channels * inner * times, groups = ceil_div(numel, kGroup);
      for (int type = 0; type < 4; ++type) {
        const std::vector<uint8_t> x = data(kTypes[type], Kind::broken, numel, random);
        std::vector<uint8_t> x_hat = buffer(4 * numel);
        for (int64_t i = 0; i < numel; ++i) {
          const auto c = static_cast<size_t>(i / inner % channels);
          const float centred = load_float(kTypes[type], x.data(), i) - mean[c];
          store_float(DType::f32, x_hat.data(), i, centred * rstd[c]);
        }
        for (int bits : {8, 4, 3, 2}) {
          const Packed wanted = pack(portable::quant, DType::f32, x_hat, numel, bits);
          Packed packed{buffer(groups * 8 * bits), std::vector<uint16_t>(wanted.params.size())};
          in_parts(groups, [&](int64_t first, int64_t last) {
            kernels.pack_normalized(kTypes[type], x.data(), numel, all, bits, 12345,
                                    packed.codes.data(), packed.params.data(), first, last);
          });
          CHECK(same_bytes(packed.codes, wanted.codes) && same_bytes(packed.params, wanted.params),
                "%s: normalized, %s, %ld channels of %ld, %ld times, bits %d", isa,
                kTypeNames[type], static_cast<long>(channels), static_cast<long>(inner),
                static_cast<long>(times), bits);
        }
      }
    }
  }
}

// One NaN for all: of two a vector instruction and a scalar one may hand on different ones.
std::vector<uint8_t> with_one_nan(DType dtype, std::vector<uint8_t> x, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    const float value = load_float(dtype, x.data(), i);
    if (std::isnan(value)) store_float(dtype, x.data(), i, NAN);
  }
  return x;
}

// Everything in quant_fused on one tensor, one result after the other.
std::vector<std::vector<uint8_t>> fused(const QuantFusedKernels& kernels, DType dtype,
                                        const std::vector<uint8_t>& x, const Packed& packed,
                                        const std::vector<uint8_t>& ranged, int64_t numel,
                                        int bits) {
  std::vector<std::vector<uint8_t>> results;
  const auto run = [&](const auto& kernel) {
    std::vector<uint8_t> out = buffer(numel * size_of(dtype));
    in_parts(ceil_div(numel, kGroup),
             [&](int64_t first, int64_t last) { kernel(out.data(), first, last); });
    results.push_back(with_one_nan(dtype, out, numel));
  };
  const uint8_t* codes = packed.codes.data();
  const uint16_t* params = packed.params.data();
  const std::vector<uint8_t> mask(x.begin(), x.begin() + ceil_div(numel, 8));
  for (const auto& [channels, inner] :
       {std::pair<int64_t, int64_t>{7, 1}, {100, 1}, {5, 9}, {3, 200}}) {
    std::vector<float> weight(static_cast<size_t>(channels + kGroup)), bias(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) {
      weight[i] = 0.5f + 0.1f * static_cast<float>(i % static_cast<size_t>(channels));
      bias[i] = -weight[i] * weight[i];
    }
    const Channels both{weight.data(), bias.data(), channels, inner};
    const Channels factors{weight.data(), nullptr, channels, inner};
    run([&](uint8_t* out, int64_t first, int64_t last) {
      kernels.unpack_affine(dtype, codes, params, bits, both, nullptr, {}, out, numel, first, last);
    });
    run([&](uint8_t* out, int64_t first, int64_t last) {
      kernels.unpack_affine(dtype, codes, params, bits, factors, mask.data(), {0, 6, 3}, out, numel,
                            first, last);
    });
  }
  for (Act act :
       {Act::gelu, Act::gelu_tanh, Act::silu, Act::quick_gelu, Act::hardswish, Act::mish}) {
    run([&](uint8_t* out, int64_t first, int64_t last) {
      kernels.unpack_activation(dtype, codes, params, bits, act, out, numel, first, last);
    });
    run([&](uint8_t* out, int64_t first, int64_t last) {
      kernels.activation_grad(dtype, x.data(), codes, params, bits, act, out, numel, first, last);
    });
    std::vector<uint8_t> slopes = buffer(ceil_div(numel, kGroup) * 8 * bits);
    in_parts(ceil_div(numel, kGroup), [&](int64_t first, int64_t last) {
      kernels.pack_derivative(dtype, x.data(), numel, bits, act, range_for(bits), 12345,
                              slopes.data(), first, last);
    });
    results.push_back(slopes);
  }
  run([&](uint8_t* out, int64_t first, int64_t last) {
    kernels.apply_range(dtype, x.data(), ranged.data(), bits, range_for(bits), out, numel, first,
                        last);
  });
  return results;
}

void test_fused(const QuantFusedKernels& kernels, const char* isa, Random& random) {
  for (Kind kind : kKinds) {
    for (int64_t numel : kSizes) {
      for (int type = 0; type < 4; ++type) {
        const std::vector<uint8_t> x = data(kTypes[type], kind, numel, random);
        for (int bits : {8, 4, 3, 2}) {
          const Packed packed = pack(portable::quant, kTypes[type], x, numel, bits);
          const auto ranged = pack_range(portable::quant, kTypes[type], x, numel, bits);
          const auto wanted =
              fused(portable::quant_fused, kTypes[type], x, packed, ranged, numel, bits);
          const auto found = fused(kernels, kTypes[type], x, packed, ranged, numel, bits);
          for (size_t i = 0; i < found.size(); ++i) {
            CHECK(same_bytes(found[i], wanted[i]), "%s: fused %d, %s, kind %d, %ld, bits %d", isa,
                  static_cast<int>(i), kTypeNames[type], static_cast<int>(kind),
                  static_cast<long>(numel), bits);
          }
        }
      }
    }
  }
}

std::vector<std::vector<uint8_t>> norm_grad(const QuantNormKernels& kernels, DType dtype,
                                            const std::vector<uint8_t>& x, const Packed& packed,
                                            int64_t rows, int64_t n, int bits) {
  const auto room = static_cast<size_t>(n + kNormLanes);
  std::vector<float> weight(room, 0.7f), rstd(static_cast<size_t>(rows), 1.3f);
  std::vector<float> x_hat(static_cast<size_t>(n + 2 * kGroup)),
      sums[2] = {std::vector<float>(room), std::vector<float>(room)};
  std::vector<uint8_t> out = buffer(rows * n * size_of(dtype));
  in_parts(rows, [&](int64_t first, int64_t last) {
    kernels.grad(dtype, x.data(), packed.codes.data(), packed.params.data(), bits, rstd.data(),
                 Norm{n, weight.data(), n % 2 == 0}, out.data(), x_hat.data(), sums[0].data(),
                 sums[1].data(), first, last);
  });
  std::vector<std::vector<uint8_t>> results = {with_one_nan(dtype, out, rows * n)};
  for (const std::vector<float>& each : sums) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(each.data());
    results.push_back(with_one_nan(DType::f32, {bytes, bytes + 4 * n}, n));
  }
  return results;
}

void test_norm(const QuantNormKernels& kernels, const char* isa, Random& random) {
  for (Kind kind : {Kind::normal, Kind::broken}) {
    for (int64_t n : {1, 15, 16, 43, 64, 130}) {
      for (int64_t rows : {0, 1, 7, 20}) {
        for (int type = 0; type < 4; ++type) {
          const std::vector<uint8_t> x = data(kTypes[type], kind, rows * n, random);
          for (int bits : {8, 4, 3, 2}) {
            const Packed packed = pack(portable::quant, kTypes[type], x, rows * n, bits);
            const auto wanted =
                norm_grad(portable::quant_norm, kTypes[type], x, packed, rows, n, bits);
            const auto found = norm_grad(kernels, kTypes[type], x, packed, rows, n, bits);
            for (size_t i = 0; i < found.size(); ++i) {
              CHECK(same_bytes(found[i], wanted[i]), "%s: norm %d, %s, [%ld, %ld], bits %d", isa,
                    static_cast<int>(i), kTypeNames[type], static_cast<long>(rows),
                    static_cast<long>(n), bits);
            }
          }
        }
      }
    }
  }
}

std::vector<std::vector<uint8_t>> channel_norm_grad(const QuantChannelNormKernels& kernels,
                                                    DType dtype, const std::vector<uint8_t>& x,
                                                    const Packed& packed, int64_t planes,
                                                    int64_t inner, int bits) {
  const int64_t numel = planes * inner;
  std::vector<double> sums(static_cast<size_t>(2 * planes));
  in_parts(planes, [&](int64_t first, int64_t last) {
    kernels.sums(dtype, x.data(), packed.codes.data(), packed.params.data(), bits, numel, inner,
                 sums.data(), first, last);
  });
  const std::vector<ChannelGrad> channels = {{0.1f, 0.2f, 1.3f}, {-0.4f, 0.7f, 0.9f}};
  std::vector<uint8_t> out = buffer(numel * size_of(dtype));
  in_parts(ceil_div(numel, kGroup), [&](int64_t first, int64_t last) {
    kernels.grad(dtype, x.data(), packed.codes.data(), packed.params.data(), bits, numel, inner,
                 channels.data(), 2, out.data(), first, last);
  });
  const auto* bytes = reinterpret_cast<const uint8_t*>(sums.data());
  const std::vector<uint8_t> both(bytes, bytes + 16 * planes);
  return {with_one_nan(dtype, out, numel), with_one_nan(DType::f64, both, 2 * planes)};
}

void test_channel_norm(const QuantChannelNormKernels& kernels, const char* isa, Random& random) {
  for (Kind kind : {Kind::normal, Kind::broken}) {
    for (int64_t inner : {1, 15, 16, 49, 64, 1100}) {
      for (int64_t planes : {0, 2, 6}) {
        for (int type = 0; type < 4; ++type) {
          const std::vector<uint8_t> x = data(kTypes[type], kind, planes * inner, random);
          for (int bits : {8, 4, 3, 2}) {
            const Packed packed = pack(portable::quant, kTypes[type], x, planes * inner, bits);
            const auto wanted = channel_norm_grad(portable::quant_channel_norm, kTypes[type], x,
                                                  packed, planes, inner, bits);
            const auto found =
                channel_norm_grad(kernels, kTypes[type], x, packed, planes, inner, bits);
            for (size_t i = 0; i < found.size(); ++i) {
              CHECK(same_bytes(found[i], wanted[i]), "%s: channel norm %d, %s, [%ld, %ld], bits %d",
                    isa, static_cast<int>(i), kTypeNames[type], static_cast<long>(planes),
                    static_cast<long>(inner), bits);
            }
          }
        }
      }
    }
  }
}

struct Queries {
  int64_t queries, keys, width, value_width;
  bool mask;
};

// out, J and dq of two heads, rows of k and v one element apart, in buffers of exactly their size.
std::vector<std::vector<uint8_t>> attend(const QueryAttentionKernels& kernels, DType dtype,
                                         DType jacobian_dtype, const Queries& shape,
                                         const std::vector<std::vector<uint8_t>>& in) {
  const int64_t t = shape.queries, n = shape.keys, d = shape.width, e = shape.value_width;
  QueryAttention a{};
  a.dtype = dtype;
  a.heads = 2;
  a.queries = t;
  a.keys = n;
  a.width = d;
  a.value_width = e;
  a.scale = 0.3;
  a.q = {in[0].data(), 0, t * d, d};
  a.k = {in[1].data(), 0, n * (d + 1), d + 1};
  a.v = {in[2].data(), 0, n * (e + 1), e + 1};
  a.mask = {shape.mask ? in[4].data() : nullptr, 0, 0, 1};
  a.mask_dtype = dtype;
  const QueryRows grads{in[3].data(), 0, t * e, e};
  const int64_t sizes[] = {t * e * size_of(dtype), t * d * e * size_of(jacobian_dtype),
                           t * d * size_of(dtype)};
  std::vector<std::vector<uint8_t>> results;
  for (int64_t size : sizes) results.push_back(buffer(2 * size));
  for (int64_t first = 0; first < 2 * t; first += kQueryTile) {
    for (bool grad : {false, true}) {
      const int64_t bytes = kernels.room(a, !grad, grad);
      std::vector<uint8_t> memory = buffer(bytes + 64);
      void* room = memory.data();
      size_t space = memory.size();
      std::align(64, static_cast<size_t>(bytes), room, space);
      for (int64_t head = 0; head < 2; ++head) {
        const int64_t last = std::min(t, first + kQueryTile);
        if (first >= last) continue;
        if (grad) {
          kernels.grad(a, grads, head, first, last, results[2].data(), room);
        } else {
          kernels.forward(a, head, first, last, results[0].data(), jacobian_dtype,
                          results[1].data(), room);
        }
      }
    }
  }
  return results;
}

void test_query_attention(const QueryAttentionKernels& kernels, const char* isa, Random& random) {
  const Queries shapes[] = {{1, 197, 64, 64, false}, {3, 7, 5, 3, true},      {33, 1, 8, 17, false},
                            {2, 600, 64, 31, true},  {2, 1100, 64, 64, true}, {2, 0, 4, 4, false},
                            {1, 20, 0, 4, false},    {1, 20, 4, 0, true}};
  for (const Queries& shape : shapes) {
    for (int type = 0; type < 4; ++type) {
      const DType dtype = kTypes[type], jacobian_dtype = kTypes[(type + shape.keys) % 4];
      const int64_t t = shape.queries, d = shape.width, e = shape.value_width;
      const int64_t sizes[] = {2 * t * d, 2 * shape.keys * (d + 1), 2 * shape.keys * (e + 1),
                               2 * t * e, shape.keys};
      std::vector<std::vector<uint8_t>> in;
      for (int64_t size : sizes) in.push_back(data(dtype, Kind::normal, size, random));
      const auto wanted = attend(portable::query_attention, dtype, jacobian_dtype, shape, in);
      const auto found = attend(kernels, dtype, jacobian_dtype, shape, in);
      for (size_t i = 0; i < found.size(); ++i) {
        const DType each = i == 1 ? jacobian_dtype : dtype;
        const double step = each == DType::bf16 ? 0x1p-7 : each == DType::f16 ? 0x1p-10 : 2e-5;
        const auto count = static_cast<int64_t>(found[i].size()) / size_of(each);
        for (int64_t j = 0; j < count; ++j) {
          const double x = load_float(each, found[i].data(), j);
          const double y = load_float(each, wanted[i].data(), j);
          CHECK(std::fabs(x - y) <= 2e-4 + step * std::fabs(y),
                "%s: query attention %d, %s, keys %ld, element %ld: %g, %g", isa,
                static_cast<int>(i), kTypeNames[type], static_cast<long>(shape.keys),
                static_cast<long>(j), x, y);
        }
      }
    }
  }
}

void test_bits(const BitsKernels& kernels, const char* isa, Random& random) {
  for (int64_t numel : kSizes) {
    const int64_t bytes = ceil_div(numel, 8);
    std::vector<uint8_t> mask = random_bits<uint8_t>(numel, random);
    for (uint8_t& each : mask) each = each < 128 ? 0 : each;
    std::vector<uint8_t> wanted(static_cast<size_t>(bytes));
    for (int64_t i = 0; i < numel; ++i) {
      wanted[static_cast<size_t>(i / 8)] |=
          static_cast<uint8_t>((mask[static_cast<size_t>(i)] != 0) << (i % 8));
    }
    std::vector<uint8_t> bits = buffer(bytes);
    in_parts(bytes, [&](int64_t first, int64_t last) {
      kernels.pack(mask.data(), numel, bits.data(), first, last);
    });
    CHECK(same_bytes(bits, wanted), "%s: pack, %ld elements", isa, static_cast<long>(numel));
    for (int type = 0; type < 4; ++type) {
      const int64_t size = size_of(kTypes[type]);
      const std::vector<uint8_t> x = data(kTypes[type], Kind::broken, numel, random);
      for (double scale : kScales) {
        std::vector<uint8_t> out = buffer(numel * size);
        in_parts(bytes, [&](int64_t first, int64_t last) {
          kernels.apply(kTypes[type], x.data(), bits.data(), scale, numel, out.data(), first, last);
        });
        std::vector<uint8_t> product = buffer(numel * size);
        for (int64_t i = 0; i < numel; ++i) {
          const bool keep = mask[static_cast<size_t>(i)] != 0;
          if (kTypes[type] == DType::f64) {
            double value;
            std::memcpy(&value, x.data() + 8 * i, sizeof value);
            value = keep ? value * scale : 0.0;
            std::memcpy(product.data() + 8 * i, &value, sizeof value);
          } else {
            const float value = load_float(kTypes[type], x.data(), i) * static_cast<float>(scale);
            store_float(kTypes[type], product.data(), i, keep ? value : 0.0f);
          }
        }
        CHECK(same_bytes(out, product), "%s: apply, %s, %ld elements, scale %g", isa,
              kTypeNames[type], static_cast<long>(numel), scale);
      }
    }
  }
}

// The number formats, on all 65536 patterns: what F16C's instructions would give.
void test_formats() {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const auto x = static_cast<uint16_t>(i);
    const bool half_nan = (x & 0x7fff) > 0x7c00;
    const uint16_t quiet = half_nan ? x | 0x200 : x;
    CHECK(float_to_half_portable(half_to_float_portable(x)) == quiet, "half %04x", x);
    const bool bfloat_nan = (x & 0x7fff) > 0x7f80;
    CHECK(float_to_bfloat16(bfloat16_to_float(x)) == (bfloat_nan ? 0x7fc0 : x), "bfloat16 %04x", x);
    if (bfloat_nan || half_nan) continue;
    // Between two neighbours of half: the tie goes to the even one.
    const float low = half_to_float_portable(x);
    const float high = half_to_float_portable(static_cast<uint16_t>(x + 1));
    if ((x & 0x7fff) < 0x7bff) {
      const uint16_t even = x % 2 == 0 ? x : static_cast<uint16_t>(x + 1);
      CHECK(float_to_half_portable((low + high) / 2) == even, "half above %04x", x);
    }
    const float exact = bfloat16_to_float(x);
    CHECK(bfloat16_down(exact) == exact && bfloat16_up(exact) == exact, "bfloat16 %04x", x);
    if ((x & 0x7fff) < 0x7f7f && (x & 0x7fff) != 0) {
      const float above = std::nextafterf(exact, INFINITY);
      CHECK(bfloat16_down(above) == exact && bfloat16_up(above) > exact, "bfloat16 above %04x", x);
    }
  }
  CHECK(float_to_half_portable(65519.0f) == 0x7bff, "the largest half");
  CHECK(float_to_half_portable(65520.0f) == 0x7c00, "beyond the largest half");
}

}  // namespace

int main() {
  Random random(1);
  test_formats();
  test_bits(portable::bits, "portable", random);
  test_quant(portable::quant, "portable", random);
  test_normalized(portable::quant, "portable", random);
  test_fused(portable::quant_fused, "portable", random);
  test_norm(portable::quant_norm, "portable", random);
  test_channel_norm(portable::quant_channel_norm, "portable", random);
  test_query_attention(portable::query_attention, "portable", random);
  MEMTL_IF_AVX2(if (available(Isa::avx2)) {
    test_bits(avx2::bits, "avx2", random);
    test_quant(avx2::quant, "avx2", random);
    test_normalized(avx2::quant, "avx2", random);
    test_fused(avx2::quant_fused, "avx2", random);
    test_norm(avx2::quant_norm, "avx2", random);
    test_channel_norm(avx2::quant_channel_norm, "avx2", random);
    test_query_attention(avx2::query_attention, "avx2", random);
  })
  MEMTL_IF_AVX512(if (available(Isa::avx512)) {
    test_bits(avx512::bits, "avx512", random);
    test_quant(avx512::quant, "avx512", random);
    test_normalized(avx512::quant, "avx512", random);
    test_fused(avx512::quant_fused, "avx512", random);
    test_norm(avx512::quant_norm, "avx512", random);
    test_channel_norm(avx512::quant_channel_norm, "avx512", random);
    test_query_attention(avx512::query_attention, "avx512", random);
  })
  return finish("test_kernels");
}
