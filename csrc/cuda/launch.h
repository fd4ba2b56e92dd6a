// What the host side of every CUDA operator is written with.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "cpu/tensor.h"
#include "cuda/scalar.cuh"

namespace memtl::cuda {

// An error unless this library holds code for the current device, which has that index.
void check_card(int32_t index);

// The device of a tensor is the current one while this lives; kernels go to its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    check_card(x.get_device_index());
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
    stream_ = static_cast<cudaStream_t>(handle);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The dispatcher comes here if one of several tensors is on a GPU.
inline void check_device(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(
      !x.is_cpu() && !other.is_cpu() && other.get_device_index() == x.get_device_index(), op,
      ": expected all tensors on one GPU, but ", name, " is on another device");
}

// What makes a tensor; where there is no memory for it, the error is in torch's words, by which
// programs know to try a smaller batch. Torch 2.11 drops them on the way through its stable ABI.
template <class Make>
Tensor made(const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    const std::string why = error.what();
    STD_TORCH_CHECK(why.find("API call failed") == std::string::npos, "CUDA out of memory. ", why);
    throw;
  }
}

// A tensor beside `like`.
inline Tensor empty_beside(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                           std::optional<ScalarType> dtype = std::nullopt) {
  return made([&] { return torch::stable::new_empty(like, size, dtype); });
}

inline Tensor as_contiguous(const Tensor& x) {
  return made([&] { return torch::stable::contiguous(x); });
}

// Blocks of `each` of `work`; at most `most`, beyond which a kernel's blocks stride over the work.
inline unsigned blocks_of(int64_t work, int64_t each, int64_t most = int64_t{1} << 16) {
  return static_cast<unsigned>(std::min(ceil_div(work, each), most));
}

// Calls run.template operator()<T, Math>() with the type of a dtype's numbers and the one that
// arithmetic on them is done in.
template <class Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f64:
      return run.template operator()<double, double>();
    case DType::bf16:
      return run.template operator()<BFloat16, float>();
    case DType::f16:
      return run.template operator()<Half, float>();
    default:
      return run.template operator()<float, float>();
  }
}

// Whether x begins where 16 bytes may be read at once; a view of a tensor may begin anywhere.
inline bool aligned16(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

}  // namespace memtl::cuda
