#include "quant_norm.h"

#include "quant_codes.h"
#include "quant_lanes.h"

namespace memtl::MEMTL_ISA_NS {
namespace {

MEMTL_INLINE void add_to(float* total, Floats x) { store(total, add(load(total), x)); }

template <DType kType, int kBits>
void grad_rows(const void* grad_out, const uint8_t* codes, const uint16_t* params,
               const float* rstd, const Norm& norm, void* grad_x, float* room, float* grad_weight,
               float* grad_bias, int64_t first, int64_t last) {
  const int64_t n = norm.features;
  for (int64_t row = first; row < last; ++row) {
    const int64_t begin = row * n, group = begin / kGroup;
    for (int64_t g = group; g * kGroup < begin + n; ++g) {
      Floats v[kVectors];
      decode<kBits>(codes, params, g, v);
      MEMTL_UNROLL
      for (int i = 0; i < kVectors; ++i) store(room + (g - group) * kGroup + i * kWidth, v[i]);
    }
    float* x_hat = room + begin % kGroup;
    for (int i = 0; i < kNormLanes; ++i) x_hat[n + i] = 0;  // the next row's, which may be NaN
    Lanes means = {}, products = {};
    for (int64_t i = 0; i < n; i += kNormLanes) {
      Lanes grad;
      load_lanes<kType>(grad_out, begin + i, n - i, grad);
      MEMTL_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = i + p * kWidth;
        const Floats product = mul(grad[p], load(x_hat + at)), weight = load(norm.weight + at);
        means[p] = add(means[p], mul(grad[p], weight));
        products[p] = add(products[p], mul(product, weight));
        add_to(grad_weight + at, product);
        add_to(grad_bias + at, grad[p]);
      }
    }
    const Floats mean = floats(norm.centered ? sum(means) / static_cast<float>(n) : 0.0f);
    const Floats slope = floats(sum(products) / static_cast<float>(n)), scale = floats(rstd[row]);
    for (int64_t i = 0; i < n; i += kNormLanes) {
      Lanes grad;
      load_lanes<kType>(grad_out, begin + i, n - i, grad);
      MEMTL_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = i + p * kWidth;
        const Floats own = sub(mul(grad[p], load(norm.weight + at)), mean);
        grad[p] = mul(sub(own, mul(load(x_hat + at), slope)), scale);
      }
      store_lanes<kType>(grad_x, begin + i, n - i, grad);
    }
  }
}

void grad(DType dtype, const void* grad_out, const uint8_t* codes, const uint16_t* params, int bits,
          const float* rstd, const Norm& norm, void* grad_x, float* x_hat, float* grad_weight,
          float* grad_bias, int64_t first, int64_t last) {
  dispatch(dtype, bits, [&]<DType kType, int kBits>() {
    grad_rows<kType, kBits>(grad_out, codes, params, rstd, norm, grad_x, x_hat, grad_weight,
                            grad_bias, first, last);
  });
}

}  // namespace

const QuantNormKernels quant_norm = {grad};

}  // namespace memtl::MEMTL_ISA_NS
