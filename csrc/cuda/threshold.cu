#include "cuda/threshold.cuh"

#include <limits>
#include <tuple>

#include "cpu/threshold.h"
#include "cpu/threshold_checks.h"
#include "cuda/tiles.h"

namespace memtl::cuda {
namespace {

int attribute(const Tensor& x, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device_index()));
  return value;
}

// The tensors as kernels take them.
std::vector<Tensors> tables(const std::vector<Tensor>& xs, const std::vector<Tensor>& masks,
                            int64_t tile) {
  std::vector<Tensors> all;
  for (size_t t = 0; t < xs.size(); ++t) {
    if (t % Tensors::kMost == 0) all.push_back(Tensors::from(t));
    const void* mask = masks.empty() ? nullptr : masks[t].const_data_ptr();
    all.back().add(xs[t].const_data_ptr(), static_cast<const uint8_t*>(mask), xs[t].numel(), tile);
  }
  return all;
}

// The search for the k-th largest key.
template <class Key>
class Search {
 public:
  Search(const std::vector<Tensor>& xs, const std::vector<Tensor>& masks, DType dtype)
      : on_(xs[0]),
        like_(xs[0]),
        infinite_(static_cast<Key>(infinite_key(dtype))),
        tables_(tables(xs, masks, tile_size<Key>(kCountThreads))),
        processors_(attribute(xs[0], cudaDevAttrMultiProcessorCount)) {}

  // Writes the magnitude, and to `ties`, of zeros, those of each tensor.
  void find(int64_t k, Tensor& value, Tensor& ties) {
    const std::vector<Digit> digits =
        digits_of(8 * sizeof(Key) - 1, attribute(like_, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    Tensor found = empty_beside(like_, {2}, ScalarType::Long);
    auto* state = reinterpret_cast<Found*>(found.mutable_data_ptr());
    for (const Digit& digit : digits) {
      const int64_t size = int64_t{1} << digit.width;
      Tensor zeros = torch::stable::new_zeros(like_, {size}, ScalarType::Long);
      auto* counts = static_cast<Count*>(zeros.mutable_data_ptr());
      const bool is_first = &digit == digits.data();
      if (is_first) {
        const auto bytes = static_cast<unsigned>(size) * unsigned{sizeof(unsigned)};
        STD_CUDA_CHECK(cudaFuncSetAttribute(threshold_first_kernel<Key>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(bytes)));
        launch(bytes, threshold_first_kernel<Key>, infinite_, digit, counts);
      } else {
        launch(0, threshold_next_kernel<Key>, infinite_, digit, state, counts);
      }
      threshold_choose_kernel<<<1, kCountThreads, 0, on_.stream()>>>(counts, digit.width,
                                                                     is_first ? k : 0, state);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    launch(0, threshold_equal_kernel<Key>, infinite_, state,
           static_cast<Count*>(ties.mutable_data_ptr()));
    threshold_share_kernel<Key>
        <<<1, kWarp, 0, on_.stream()>>>(state, infinite_, static_cast<int>(ties.numel()),
                                        static_cast<Key*>(value.mutable_data_ptr()),
                                        static_cast<int64_t*>(ties.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  // The kernel over all tensors, by a block a multiprocessor: those registers suffice for.
  template <class... Parameters, class... Arguments>
  void launch(unsigned bytes, void (*kernel)(Tensors, Parameters...), Arguments... arguments) {
    for (const Tensors& table : tables_) {
      const unsigned blocks = blocks_of(table.tiles, 1, processors_);
      if (blocks == 0) continue;
      kernel<<<blocks, kCountThreads, bytes, on_.stream()>>>(table, arguments...);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  const OnDevice on_;
  const Tensor like_;
  const Key infinite_;
  const std::vector<Tensors> tables_;
  const int processors_;
};

std::tuple<Tensor, Tensor> threshold_magnitude_cuda(const std::vector<Tensor>& xs,
                                                    const std::vector<Tensor>& masks, int64_t k) {
  constexpr const char* kOp = "threshold_magnitude";
  const DType dtype = check_lists(kOp, xs, masks);
  std::vector<Tensor> read, bits;  // contiguous ones
  int64_t total = 0;
  for (const Tensor& x : xs) {
    check_device(kOp, xs[0], "one of xs", x);
    total += x.numel();
    read.push_back(as_contiguous(x));
  }
  for (const Tensor& mask : masks) bits.push_back(as_contiguous(mask));
  check_k(kOp, k, total);
  const OnDevice on(xs[0]);
  Tensor value = empty_beside(xs[0], {});
  Tensor ties =
      torch::stable::new_zeros(xs[0], {static_cast<int64_t>(xs.size())}, ScalarType::Long);
  if (k == 0) {
    torch::stable::fill_(value, std::numeric_limits<double>::infinity());
  } else {
    with_integer(dtype, [&]<class Key>() { Search<Key>(read, bits, dtype).find(k, value, ties); });
  }
  return {value, ties};
}

Tensor threshold_mask_cuda(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& value,
                           const Tensor& ties) {
  constexpr const char* kOp = "threshold_mask";
  const DType dtype = check_threshold(kOp, x, mask, value, ties);
  check_device(kOp, x, "value", value);
  check_device(kOp, x, "ties", ties);
  const OnDevice on(x);
  const Tensor flat = as_contiguous(x);
  const Tensor packed = mask ? as_contiguous(*mask) : flat;
  const auto* outer = mask ? static_cast<const uint8_t*>(packed.const_data_ptr()) : nullptr;
  const int64_t numel = flat.numel();
  Tensor bits = empty_beside(flat, {ceil_div(numel, 8)}, ScalarType::Byte);
  if (numel == 0) return bits;
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  with_integer(dtype, [&]<class Key>() {
    const unsigned tiles = tiles_of<Key>(numel);
    const auto* in = static_cast<const Key*>(flat.const_data_ptr());
    const auto* threshold = static_cast<const Key*>(value.const_data_ptr());
    const auto infinite = static_cast<Key>(infinite_key(dtype));
    Tensor equal = empty_beside(flat, {tiles}, ScalarType::Long);
    auto* counts = static_cast<int64_t*>(equal.mutable_data_ptr());
    threshold_mark_kernel<Key><<<tiles, kTileThreads, 0, on.stream()>>>(
        in, outer, threshold, infinite, numel, counts, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_up(equal, on);
    const int64_t most = 8 * attribute(x, cudaDevAttrMultiProcessorCount);
    threshold_trim_kernel<Key><<<blocks_of(tiles, 1, most), kTileThreads, 0, on.stream()>>>(
        in, outer, threshold, static_cast<const int64_t*>(ties.const_data_ptr()), counts, infinite,
        numel, tiles, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return bits;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("threshold_magnitude", TORCH_BOX(&memtl::cuda::threshold_magnitude_cuda));
  m.impl("threshold_mask", TORCH_BOX(&memtl::cuda::threshold_mask_cuda));
}
