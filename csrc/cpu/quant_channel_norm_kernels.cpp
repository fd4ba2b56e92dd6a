#include "quant_channel_norm.h"

#include "quant_codes.h"
#include "quant_lanes.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

constexpr int64_t kBatch = 16 * kGroup;  // elements that are decoded at a time

// Calls batch(start, stop), then run(plane, first, last, start) for the parts of planes in there,
// for all of [begin, end); start is the beginning of a group.
template <class Batch, class Run>
MEMTL_INLINE void for_runs(int64_t begin, int64_t end, int64_t inner, const Batch& batch,
                           const Run& run) {
  int64_t plane = begin / inner, stop = (plane + 1) * inner;
  for (int64_t i = begin; i < end;) {
    const int64_t start = i / kGroup * kGroup;
    const int64_t limit = start + kBatch < end ? start + kBatch : end;
    batch(start, limit);
    while (i < limit) {
      const int64_t last = stop < limit ? stop : limit;
      run(plane, i, last, start);
      i = last;
      if (i == stop) {
        ++plane;
        stop += inner;
      }
    }
  }
}

template <int kBits>
MEMTL_INLINE void decode_all(const uint8_t* codes, const uint16_t* params, int64_t start,
                             int64_t stop, float* x_hat) {
  for (int64_t i = start; i < stop; i += kGroup, x_hat += kGroup) {
    Floats v[kVectors];
    decode<kBits>(codes, params, i / kGroup, v);
    MEMTL_UNROLL
    for (int j = 0; j < kVectors; ++j) store(x_hat + j * kWidth, v[j]);
  }
}

constexpr uint32_t kAll = ~uint32_t{0};
alignas(64) constexpr uint32_t kLanesBefore[2 * kNormLanes] = {
    kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll};

// Zero from lane `count` on, whatever was there.
MEMTL_INLINE void keep_lanes(int64_t count, Lanes& v) {
  const uint32_t* mask = kLanesBefore + kNormLanes - count;
  MEMTL_UNROLL
  for (int p = 0; p < kParts; ++p) {
    v[p] = as_floats(bit_and(as_ints(v[p]), load(mask + p * kWidth)));
  }
}

template <DType kType, int kBits>
void sum_planes(const void* grad_out, const uint8_t* codes, const uint16_t* params, int64_t numel,
                int64_t inner, double* sums, int64_t first, int64_t last) {
  alignas(64) float x_hat[kBatch + kNormLanes] = {};
  const auto batch = [&](int64_t start, int64_t stop) {
    decode_all<kBits>(codes, params, start, stop, x_hat);
  };
  const auto run = [&](int64_t plane, int64_t i, int64_t stop, int64_t start) {
    Lanes grads = {}, products = {};
    for (; i < stop; i += kNormLanes) {
      Lanes grad, product;
      load_lanes<kType>(grad_out, i, numel - i, grad);
      MEMTL_UNROLL
      for (int p = 0; p < kParts; ++p) {
        product[p] = mul(grad[p], load(x_hat + (i - start) + p * kWidth));
      }
      if (stop - i < kNormLanes) {
        keep_lanes(stop - i, grad);
        keep_lanes(stop - i, product);
      }
      MEMTL_UNROLL
      for (int p = 0; p < kParts; ++p) {
        grads[p] = add(grads[p], grad[p]);
        products[p] = add(products[p], product[p]);
      }
    }
    sums[2 * plane] += static_cast<double>(sum(grads));
    sums[2 * plane + 1] += static_cast<double>(sum(products));
  };
  for_runs(first * inner, last * inner, inner, batch, run);
}

template <DType kType, int kBits>
void grad_groups(const void* grad_out, const uint8_t* codes, const uint16_t* params, int64_t numel,
                 int64_t inner, const ChannelGrad* channels, int64_t count, void* grad_x,
                 int64_t first, int64_t last) {
  alignas(64) float x_hat[kBatch + kNormLanes] = {};
  alignas(64) float own[kBatch + kNormLanes];
  const int64_t end = last * kGroup < numel ? last * kGroup : numel;
  int64_t channel = first * kGroup / inner % count, current = first * kGroup / inner;
  const auto batch = [&](int64_t start, int64_t stop) {
    decode_all<kBits>(codes, params, start, stop, x_hat);
  };
  const auto run = [&](int64_t plane, int64_t i, int64_t stop, int64_t start) {
    if (plane != current) {  // the next one
      current = plane;
      channel = channel + 1 < count ? channel + 1 : 0;
    }
    const ChannelGrad all = channels[channel];
    const Floats mean = floats(all.mean), slope = floats(all.slope), scale = floats(all.scale);
    const bool ends = stop == end || stop - start == kBatch;
    // A few lanes at a time: what comes beyond the run is written next.
    for (; i < stop; i += kNormLanes) {
      Lanes grad;
      load_lanes<kType>(grad_out, i, numel - i, grad);
      MEMTL_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = i - start + p * kWidth;
        const Floats along = mul(load(x_hat + at), slope);
        store(own + at, mul(sub(sub(grad[p], mean), along), scale));
      }
    }
    if (!ends) return;
    for (int64_t g = start / kGroup; g * kGroup < stop; ++g) {
      Floats v[kVectors];
      MEMTL_UNROLL
      for (int j = 0; j < kVectors; ++j) v[j] = load(own + g * kGroup - start + j * kWidth);
      store_group<kType>(grad_x, numel, g, v);
    }
  };
  for_runs(first * kGroup, end, inner, batch, run);
}

void sums(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params, int bits,
          int64_t numel, int64_t inner, double* sums, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    sum_planes<kType, kBits>(grad_out, codes, params, numel, inner, sums, first, last);
  });
}

void grad(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params, int bits,
          int64_t numel, int64_t inner, const ChannelGrad* channels, int64_t count, void* grad_x,
          int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    grad_groups<kType, kBits>(grad_out, codes, params, numel, inner, channels, count, grad_x, first,
                              last);
  });
}

}  // namespace

const QuantChannelNormKernels quant_channel_norm = {sums, grad};

}  // namespace memtl::MEMTL_ISA_NS
