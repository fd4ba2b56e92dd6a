#include "cuda/topk_pack.cuh"

#include <algorithm>
#include <tuple>

#include "cpu/topk_tensors.h"
#include "cuda/launch.h"
#include "cuda/topk_sample.cuh"

namespace memtl::cuda {
namespace {

// So many blocks of threads fill a GPU: 4 on each of 132 multiprocessors.
constexpr int64_t kFull = 4 * 132;

// Whether every whole block of 256 of the contiguous rows x begins at 16 bytes.
bool aligned_blocks(const Tensor& x, DType dtype) {
  return aligned16(x) && (x.size(0) == 1 || x.size(1) * size_of(dtype) % 16 == 0);
}

std::tuple<Tensor, Tensor, Tensor> topk_pack_cuda(const Tensor& x, int64_t k, int64_t k_tail,
                                                  ScalarType value_dtype, bool bitmap) {
  const DType dtype = check_rows("topk_pack", x);
  const DType value = value_type("topk_pack", value_dtype);
  check_quota(x, k, k_tail);
  const OnDevice on(x);
  const Tensor dense = as_contiguous(x);
  const Packing packing =
      allocate_packing(dense, kept_of(x.size(1), k, k_tail), value_dtype, value, bitmap);
  // Rows of whole blocks are one row.
  const bool whole = x.size(1) % kBlock == 0;
  const int64_t rows = whole ? 1 : x.size(0), n = whole ? x.numel() : x.size(1);
  const int64_t blocks = rows * ceil_div(n, kBlock);
  if (blocks > 0) {
    with_type(dtype, [&]<class T, class>() {
      constexpr int64_t kAtOnce = kFull * kTopkWarps * kTogether<T>;
      const int64_t run = std::clamp<int64_t>(ceil_div(blocks, kAtOnce), 1, 16);
      const unsigned grid = blocks_of(blocks, kTopkWarps * kTogether<T> * run);
      topk_pack_kernel<T><<<grid, kTopkThreads, 0, on.stream()>>>(
          static_cast<const T*>(dense.const_data_ptr()), rows, n, static_cast<int>(k),
          static_cast<int>(k_tail), aligned_blocks(dense, dtype), static_cast<int>(run),
          packing.out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {packing.values, packing.positions, packing.scale};
}

// Memory for so many T, for the time of a call.
template <class T>
T* reserve(const Tensor& beside, int64_t count, Tensor* memory) {
  const int64_t size[] = {count * static_cast<int64_t>(sizeof(T))};
  *memory = empty_beside(beside, size, ScalarType::Byte);
  return static_cast<T*>(memory->mutable_data_ptr());
}

template <class T>
void pack_sample(const Tensor& x, DType dtype, int64_t k, const TopkOutput& out,
                 cudaStream_t stream) {
  const int64_t n = x.size(1), blocks = ceil_div(n, kBlock), chunks = ceil_div(blocks, kChunk);
  const int64_t rows = x.size(0), most = ceil_div(blocks, 2 * kTopkWarps);
  const SampleRows cut = {rows, n, std::clamp<int64_t>(2 * kFull / rows, 1, most)};
  const int64_t digits = cut.parts > 1 ? kDigits : 0;
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  const bool aligned = aligned_blocks(x, dtype);

  Tensor memory[6];
  auto* histogram = reserve<unsigned long long>(x, rows * digits, &memory[0]);
  auto* done = reserve<unsigned>(x, rows, &memory[1]);
  auto* thresholds = reserve<Threshold>(x, rows, &memory[2]);
  const SampleCounts counts = {reserve<uint32_t>(x, rows * blocks, &memory[3]),
                               reserve<int64_t>(x, rows * chunks, &memory[4]),
                               reserve<int64_t>(x, rows * chunks, &memory[5])};
  if (digits > 0) torch::stable::zero_(memory[0]);
  torch::stable::zero_(memory[1]);

  const unsigned grid = blocks_of(rows * cut.parts, 1);
  bool first = true;
  for (const Pass pass : Passes<T>::kPasses) {
    sample_digit_kernel<T><<<grid, kTopkThreads, 0, stream>>>(
        from, cut, aligned, pass, first, std::max<int64_t>(k, 1), histogram, done, thresholds);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    first = false;
  }
  sample_count_kernel<T>
      <<<grid, kTopkThreads, 0, stream>>>(from, cut, aligned, thresholds, counts, done);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned packing = blocks_of(rows * ceil_div(blocks, kTogether<T>), kTopkWarps);
  sample_pack_kernel<T>
      <<<packing, kTopkThreads, 0, stream>>>(from, cut, k, aligned, thresholds, counts, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_pack_sample_cuda(const Tensor& x, int64_t k,
                                                                 ScalarType value_dtype,
                                                                 bool bitmap) {
  const DType dtype = check_rows("topk_pack_sample", x);
  const DType value = value_type("topk_pack_sample", value_dtype);
  check_sample_quota(x, k);
  const OnDevice on(x);
  const Tensor dense = as_contiguous(x);
  Packing packing = allocate_packing(dense, k, value_dtype, value, bitmap);
  const int64_t counts_size[] = {x.size(0), ceil_div(x.size(1), kBlock)};
  const Tensor counts = empty_beside(dense, counts_size, ScalarType::Short);
  packing.out.counts = data<int16_t>(counts);
  if (x.numel() > 0) {
    with_type(dtype,
              [&]<class T, class>() { pack_sample<T>(dense, dtype, k, packing.out, on.stream()); });
  }
  return {packing.values, packing.positions, packing.scale, counts};
}

}  // namespace
}  // namespace memtl::cuda

STABLE_TORCH_LIBRARY_IMPL(memtl, CUDA, m) {
  m.impl("topk_pack", TORCH_BOX(&memtl::cuda::topk_pack_cuda));
  m.impl("topk_pack_sample", TORCH_BOX(&memtl::cuda::topk_pack_sample_cuda));
}
