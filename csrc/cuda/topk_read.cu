#include "cuda/topk_read.cuh"

#include "cpu/topk_tensors.h"
#include "cuda/launch.h"

namespace memtl::cuda {
namespace {

Tensor topk_unpack_cuda(const Tensor& values, const Tensor& positions, const Tensor& scale,
                        const Tensor& counts, int64_t n, int64_t k, int64_t k_tail, bool bitmap,
                        ScalarType dtype) {
  const char* op = "topk_unpack";
  const DType wanted = floating(op, "the result", dtype);
  const DType value = check_packed(op, values, positions, scale, counts, n, k, k_tail, bitmap);
  check_device(op, values, "positions", positions);
  check_device(op, values, "scale", scale);
  check_device(op, values, "counts", counts);
  const OnDevice on(values);
  const int64_t rows = values.size(0), blocks = ceil_div(n, kBlock);
  const int64_t size[] = {rows, n};
  Tensor result = empty_beside(values, size, dtype);
  if (result.numel() == 0) return result;

  const Tensor flat[] = {as_contiguous(values), as_contiguous(positions), as_contiguous(scale),
                         as_contiguous(counts)};
  const bool counted = counts.numel() > 0;
  PackedRows packed = {value,
                       flat[0].const_data_ptr(),
                       static_cast<const uint8_t*>(flat[1].const_data_ptr()),
                       static_cast<const uint16_t*>(flat[2].const_data_ptr()),
                       counted ? static_cast<const int16_t*>(flat[3].const_data_ptr()) : nullptr,
                       nullptr,
                       rows,
                       n,
                       values.size(1),
                       static_cast<int>(k),
                       static_cast<int>(k_tail),
                       bitmap};
  Tensor before;
  if (counted) {
    const int64_t chunks[] = {rows, ceil_div(blocks, kChunk)};
    before = empty_beside(values, chunks, ScalarType::Long);
    auto* entries = data<int64_t>(before);
    count_before_kernel<<<blocks_of(rows, 1), kTopkThreads, 0, on.stream()>>>(packed, entries);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    packed.before = entries;
  }
  const bool aligned = aligned16(result) && (rows == 1 || n * size_of(wanted) % 16 == 0);
  const unsigned grid = blocks_of(rows * ceil_div(blocks, kRun), kTopkWarps);
  with_type(wanted, [&]<class Out, class>() {
    topk_unpack_kernel<Out><<<grid, kTopkThreads, 0, on.stream()>>>(
        packed, aligned, static_cast<Out*>(result.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("topk_unpack", TORCH_BOX(&memtl::cuda::topk_unpack_cuda));
}
